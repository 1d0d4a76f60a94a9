"""Training with compiled layers: the losses of the same run without, few graphs, and nothing left of it afterwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mmfast.adapt import compilation
from mmfast.train import TrainConfig, load_recipe, train
from mmfast.train.plan import knobs
from mmfast.train.setup import build_model, enter_stage, resolve_stage

MakeConfig = Callable[..., TrainConfig]
# Names of the graphs' counter in `torch._dynamo.utils.counters`.
GRAPHS = "unique_graphs"


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is traced as ever, forward and backward, but runs PyTorch's own kernels."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.utils.counters.clear()


def losses(config: TrainConfig, out: Path, **fields: Any) -> list[float]:
    train(dataclasses.replace(config, out=str(out), **fields))
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"][GRAPHS])


def compare(config: TrainConfig, folder: Path, rel: float = 1e-5) -> int:
    """Checks the losses of a compiled run against those of the same run; gives the number of its graphs."""
    expected = losses(config, folder / "plain")
    assert losses(config, folder / "compiled", compile=True) == pytest.approx(expected, rel=rel)
    return graphs()


def lora_alone(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, stages=config.stages[1:])


def small(recipe: str, stage: int = -1, **changes: Any) -> TrainConfig:
    """A recipe of the embedded world, of one stage with five steps on few samples."""
    config = load_recipe(recipe)
    values = {"batch_size": 6, "micro_batch_size": 3, "max_steps": 5, **changes}
    chosen = dataclasses.replace(config.stages[stage], **values)
    return dataclasses.replace(config, stages=[chosen], eval_data=None)


@pytest.mark.parametrize(
    ("recipe", "most"),
    # Two forms of layers, the last one computing labelled positions alone; in llama-adapter-v2 also those with and
    # without learned prompts, for samples with and without an image, of one row and of several.
    [("minigpt4-world", 4), ("video-chatgpt-world", 4), ("llama-adapter-v2-world", 16), ("lavin-world", 4)],
)
def test_every_system_has_the_losses_of_its_run_without(recipe: str, most: int, tmp_path: Path) -> None:
    assert 0 < compare(small(recipe), tmp_path) <= most


@pytest.mark.parametrize(
    "fields",
    [
        {"packing": True},
        {"recompute": "full", "optimize": False, "base_dtype": "int8"},
        {"recompute": "offload", "base_dtype": "nf4"},
        {"dtype": "bfloat16", "group_by_length": True},
    ],
    ids=lambda fields: "-".join(f"{name}={value}" for name, value in fields.items()),
)
def test_with_what_else_a_run_can_have(fields: dict[str, Any], make_config: MakeConfig, tmp_path: Path) -> None:
    """LoRA and accumulation; 24 micro-batches of as many lengths share the graphs of the first ones."""
    config = lora_alone(make_config(lora={"lora_dropout": 0.0, "max_steps": 8}, **fields))
    bound = 1e-5 if fields.get("dtype") != "bfloat16" else 1e-3
    assert 0 < compare(config, tmp_path, bound) <= 5


def test_inductor_computes_what_the_layers_do(make_config: MakeConfig, monkeypatch: Any) -> None:
    """Loss and gradients, with adapters away from the zero where they start, which would hide theirs."""
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    config = lora_alone(make_config(lora={"lora_dropout": 0.0}))
    model = build_model(config)
    enter_stage(model, resolve_stage(model, config.stages[0]), torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.train()
    ids = torch.randint(5, 60, (3, 37))
    labels = ids.where(torch.arange(37) >= 20, -100)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels, loss_reduction="sum").loss
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return {"loss": loss.detach(), **gradients}

    expected = step()
    with compilation.LayerCompiler(torch.device("cpu")).applied(model.language_model):
        found = step()
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
    assert sum("lora_b" in name for name in expected) > 0


def test_a_compiled_run_continues_bit_for_bit(
    train_until_crash: Callable[[TrainConfig, int], None], tmp_path: Path
) -> None:
    """With dropout, micro-batches of three rows and of one; and what it writes has the names of layers as they are."""
    # Its LoRA has two linear layers of seven: to trace a mask takes seconds, and there is one for each of them.
    config = small("minigpt-v2-world", batch_size=4, lora_dropout=0.2)
    config = dataclasses.replace(config, save_every=1)
    whole = losses(config, tmp_path / "whole", compile=True)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"), compile=True)
    train_until_crash(broken, 3)
    train(broken, resume=True)
    assert [json.loads(line)["loss"] for line in (tmp_path / "broken" / "log.jsonl").open()] == whole
    names = safe_open(tmp_path / "broken" / "model" / "trained.safetensors", "pt").keys()
    assert any("lora" in name for name in names) and not any("_orig_mod" in name for name in names)


def test_nothing_is_compiled_but_steps(make_config: MakeConfig, data: str) -> None:
    """Held-out losses and what follows a stage run the layers as they are; afterwards the model is a plain one."""
    seen = []

    def after(model: Any, result: Any) -> None:
        before = graphs()
        for length in (5, 6):
            model.generate(torch.full((1, length), 7), max_new_tokens=3)
        seen.append(graphs() - before)

    config = lora_alone(make_config(compile=True, lora={"lora_dropout": 0.0}, eval_data=data, eval_every=2))
    result = train(config, after_stage=after)
    assert seen == [0]
    model = result.model.train()
    before = graphs()
    ids = torch.full((2, 9), 7)
    model(input_ids=ids, labels=ids).loss.backward()
    assert graphs() == before > 0
    assert not any(layer.gradient_checkpointing for layer in model.get_decoder().layers)


def test_what_cannot_be_traced_is_refused_before_anything(make_config: MakeConfig, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"config: recompute is 'full\*1,mlp\*1' and compile is true, but mlp works"):
        make_config(compile=True, recompute="full*1,mlp*1")
    with pytest.raises(ValueError, match=r"config: stages\.recompute is 'product' and compile is true"):
        make_config(compile=True, lora={"recompute": "product"})
    with pytest.raises(ValueError, match="config: sharding is 'fsdp' and compile is true"):
        make_config(compile=True, sharding="fsdp")
    with pytest.raises(ValueError, match="config: compile is 1; true or false"):
        make_config(compile=1)

    def missing(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler g++")

    monkeypatch.setattr(compilation, "BACKEND", missing)
    with pytest.raises(RuntimeError, match=r"nothing can be compiled for cpu on this machine: .*no compiler g\+\+"):
        train(make_config(compile=True, llm="/nowhere"))


def test_a_graph_break_is_an_error(make_config: MakeConfig, monkeypatch: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def broken(self: Any, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    with pytest.raises(RuntimeError, match="a layer of this LlamaForCausalLM cannot be compiled whole"):
        train(make_config(compile=True, optimize=False))


def test_the_plan_keeps_to_what_can_be_compiled(make_config: MakeConfig) -> None:
    plain = lora_alone(make_config(max_length=200, lora={"lora_dropout": 0.0}))
    compiled = dataclasses.replace(plain, compile=True)
    names, expected = ([name for name, _ in knobs(config, 0)] for config in (compiled, plain))
    assert "recompute: mlp" in expected
    assert names == [name for name in expected if name != "recompute: mlp"]
