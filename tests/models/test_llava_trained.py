"""The folder of a trained model: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfast.models import Llava, LoraSpec, get_system

SMALL = LoraSpec(rank=2, alpha=4, dropout=0.1)


def train(model: Llava, tiny: Any, stage_name: str) -> None:
    """One step of a stage, so that everything it trains has moved."""
    stage = model.stages()[stage_name]
    stage = replace(stage, lora=SMALL) if stage.lora else stage
    model.set_stage(stage)
    optimizer = torch.optim.SGD(model.parameter_groups(stage), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**tiny.batch()).loss.backward()
        optimizer.step()
    model.eval()


def logits(model: Llava, tiny: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**tiny.batch(), "labels": None}).logits


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("align", {"connector"}),
        ("instruct", {"connector", "language_model"}),
        ("instruct_lora", {"connector", "lora"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_save_trained_and_open(
    tiny: Any, write_llm: Callable[..., Path], encoder: Path, tmp_path: Path, stage: str, parts: set[str], tied: bool
) -> None:
    model = Llava.from_parts(write_llm(tied=tied), encoder)
    train(model, tiny, stage)
    model.processor.max_length, model.processor.pad_to_square = 99, True
    model.save_trained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["mmfast.json", "trained.safetensors"]
    names = set(load_file(tmp_path / "model" / "trained.safetensors"))
    assert names == {name for part in parts for name in model.part_parameters(part)}
    # Both the folder itself and the run folder around it.
    for folder in (tmp_path / "model", tmp_path):
        opened = Llava.from_pretrained(folder)
        assert torch.equal(logits(opened, tiny), logits(model, tiny))
        assert opened.trained_parts == parts
        assert opened.lora_spec == model.lora_spec
        assert (opened.processor.max_length, opened.processor.pad_to_square) == (99, True)
        assert not opened.training


def test_trained_parts_add_up_over_stages(tiny: Any, llm: Path, encoder: Path, tmp_path: Path) -> None:
    model = Llava.from_parts(llm, encoder)
    for stage in ("align", "instruct", "instruct_lora", "align"):
        train(model, tiny, stage)
    model.save_trained(tmp_path)
    opened = Llava.from_pretrained(tmp_path)
    assert opened.trained_parts == {"connector", "language_model", "lora"}
    assert torch.equal(logits(opened, tiny), logits(model, tiny))


@pytest.mark.parametrize("connector", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_every_connector_is_saved(tiny: Any, llm: Path, encoder: Path, tmp_path: Path, connector: str) -> None:
    model = Llava.from_parts(llm, encoder, connector)
    model.save_trained(tmp_path)
    assert torch.equal(logits(Llava.from_pretrained(tmp_path), tiny), logits(model.eval(), tiny))


def test_identity_connector_is_saved(tiny: Any, llm: Path, write_encoder: Callable[..., Path], tmp_path: Path) -> None:
    model = Llava.from_parts(llm, write_encoder(hidden_size=48), "identity")
    model.save_trained(tmp_path)
    assert torch.equal(logits(Llava.from_pretrained(tmp_path), tiny), logits(model.eval(), tiny))


def test_dtype_is_kept_and_can_be_chosen(llm: Path, encoder: Path, tmp_path: Path) -> None:
    Llava.from_parts(llm, encoder, dtype=torch.bfloat16).save_trained(tmp_path)
    for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = Llava.from_pretrained(tmp_path, dtype=asked)
        assert {p.dtype for p in model.language_model.parameters()} == {expected}
        assert {p.dtype for p in model.encoder.parameters()} == {expected}
        assert {p.dtype for p in model.connector.parameters()} == {torch.float32}


def test_world_is_written_down_by_its_name(
    tiny: Any, llm: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmfast.world.weights", {"llm": llm, "encoder": encoder}.__getitem__)
    model = Llava.from_parts("world", "world")
    model.save_trained(tmp_path)
    description = json.loads((tmp_path / "mmfast.json").read_text())
    assert (description["llm"], description["encoder"]) == ("world", "world")
    assert torch.equal(logits(Llava.from_pretrained(tmp_path), tiny), logits(model.eval(), tiny))


def test_moved_base_is_named_and_can_be_passed(tiny: Any, llm: Path, encoder: Path, tmp_path: Path) -> None:
    model = Llava.from_parts(llm, encoder)
    model.save_trained(tmp_path)
    description = json.loads((tmp_path / "mmfast.json").read_text())
    assert description["llm"] == str(llm.resolve())
    description["llm"] = "/nowhere/vicuna-7b"
    (tmp_path / "mmfast.json").write_text(json.dumps(description))
    with pytest.raises(FileNotFoundError, match=r"trained on the llm '/nowhere/vicuna-7b'.*llm=\.\.\."):
        Llava.from_pretrained(tmp_path)
    assert torch.equal(logits(Llava.from_pretrained(tmp_path, llm=llm), tiny), logits(model.eval(), tiny))


def test_projector_of_another_language_model_is_refused_before_it_is_opened(
    llm: Path, encoder: Path, write_encoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Llava.from_parts(llm, encoder).save_trained(tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((llm / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 4096}))
    with pytest.raises(ValueError, match=r"projector is for 48, your language model is 4096 \(7B\)"):
        Llava.from_pretrained(tmp_path / "run", llm=other)
    with pytest.raises(ValueError, match="projector reads features 32 wide, your encoder gives 64"):
        Llava.from_pretrained(tmp_path / "run", encoder=write_encoder(hidden_size=64))


def test_load_trained_state_says_7b_and_13b(tiny: Any) -> None:
    model = tiny.llava()
    with torch.device("meta"):
        large = torch.nn.Sequential(torch.nn.Linear(32, 5120), torch.nn.GELU(), torch.nn.Linear(5120, 5120))
        model.language_model.set_input_embeddings(torch.nn.Embedding(8, 4096))
    state = {f"connector.{name}": tensor for name, tensor in large.state_dict().items()}
    with pytest.raises(ValueError, match=r"this projector is for 5120 \(13B\), your language model is 4096 \(7B\)"):
        model.load_trained_state(state)


def test_load_trained_state_reports_everything_and_copies_nothing(tiny: Any) -> None:
    model = tiny.llava()
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["connector.2.bias"]
    state["connector.0.bias"] = torch.zeros(7)
    state["surplus"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit") as caught:
        model.load_trained_state(state)
    message = str(caught.value)
    assert "1 missing: connector.2.bias" in message
    assert "1 unexpected: surplus" in message
    assert "1 of another shape: connector.0.bias ([7] given, [48] in the model)" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trained_state().items())


def test_save_trained_refuses_lora_from_outside(tiny: Any, tmp_path: Path) -> None:
    from mmfast.adapt import add_lora

    model = tiny.llava()
    add_lora(model.language_model, ["q_proj"], rank=2, alpha=2)
    with pytest.raises(ValueError, match="LoRA was changed from outside"):
        model.save_trained(tmp_path)


def test_from_pretrained_refusals(tiny: Any, tmp_path: Path, llm: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no LLaVA model; a folder with mmfast\.json"):
        Llava.from_pretrained(llm)
    (tmp_path / "mmfast.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="has format 2; this release reads format 1"):
        Llava.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        Llava.from_parts(tmp_path / "nowhere", "world")


def test_get_system() -> None:
    assert get_system("llava") is Llava
    with pytest.raises(ValueError, match="the system is 'lava'; accepted are lavin, llama_adapter, llava"):
        get_system("lava")
