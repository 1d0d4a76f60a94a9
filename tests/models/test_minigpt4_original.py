"""The original repository's checkpoint_<epoch>.pth: exactly its names and shapes, both ways, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import EVA_WIDTH, Q_FORMER, minigpt4_shapes, write_blip2, write_eva, write_minigpt4
from torch import Tensor

from mmfast.adapt import lora_parameters
from mmfast.cli import main
from mmfast.models import MiniGPT4, open_model
from mmfast.models.minigpt4_original import read_original

WIDTH = 48  # of the language model
LORA = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
BUFFERS = {
    "Qformer.bert.embeddings.position_ids": (1, 512),
    "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": (6,),
}


@pytest.fixture(scope="module")
def eva(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eva")
    write_eva(folder)
    return folder


@pytest.fixture(scope="module")
def q_former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q_former") / "blip2.pth"
    write_blip2(path)
    return path


def minigpt_v2_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"llama_proj.weight": (WIDTH, 4 * EVA_WIDTH), "llama_proj.bias": (WIDTH,)}
    for layer in range(2):
        for projection, rows in (("q", 48), ("v", 24)):  # two heads of values for four of queries
            shapes[LORA.format(layer, projection, "A")] = (8, 48)
            shapes[LORA.format(layer, projection, "B")] = (rows, 8)
    return shapes


def reopen(model: MiniGPT4, folder: Path) -> MiniGPT4:
    """The model with its pretrained parts, which a converted one does not hold."""
    model.save_trained(folder)
    return MiniGPT4.from_pretrained(folder)


def written(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"model"}
    return dict(content["model"])


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_minigpt4_there_and_back(llm: Path, eva: Path, q_former: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_4.pth"
    state = write_minigpt4(path, minigpt4_shapes(WIDTH) | BUFFERS)
    model, names = MiniGPT4.from_original(tmp_path, llm, eva, q_former=q_former)
    assert names == {"connector.weight": "llama_proj.weight", "connector.bias": "llama_proj.bias"}
    assert torch.equal(model.connector.weight, state["llama_proj.weight"])
    assert not model.training
    assert (model.config.template, model.config.num_queries, model.features_per_medium) == ("minigpt4_chat", 3, 3)
    assert model.to_original(tmp_path / "out") == names
    assert_same(written(tmp_path / "out" / "checkpoint_0.pth"), {name: state[name] for name in minigpt4_shapes(WIDTH)})


def test_minigpt_v2_there_and_back(llm: Path, eva: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_49.pth"
    state = write_minigpt4(path, minigpt_v2_shapes())
    model, names = MiniGPT4.from_original(path, llm, eva, image_size=32)
    assert set(names.values()) == set(minigpt_v2_shapes())
    spec = model.lora_spec
    assert spec is not None and (spec.rank, spec.alpha, spec.targets) == (8, 16, ("q_proj", "v_proj"))
    assert model.config.template == "minigpt_v2"
    # Against LoRA's own equation: W + (alpha / rank) B A in place of W.
    attention = reopen(model, tmp_path / "run").language_model.model.layers[1].self_attn
    x = torch.randn(2, 3, WIDTH)
    update = state[LORA.format(1, "v", "B")] @ state[LORA.format(1, "v", "A")] * (16 / 8)
    torch.testing.assert_close(attention.v_proj(x), x @ (attention.v_proj.weight + update).T, rtol=1e-4, atol=1e-3)
    model.to_original(tmp_path / "out")
    assert_same(written(tmp_path / "out" / "checkpoint_0.pth"), state)


def test_minigpt_v2_of_a_newer_peft(llm: Path, eva: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_0.pth"
    shapes = {
        name.replace(".weight", ".default.weight") if "lora" in name else name: shape
        for name, shape in minigpt_v2_shapes().items()
    }
    state = write_minigpt4(path, shapes)
    model, names = MiniGPT4.from_original(path, llm, eva, image_size=16)
    name = "language_model.model.layers.0.self_attn.q_proj.lora_a"
    assert torch.equal(lora_parameters(model)[name], state[names[name]])


def test_images_of_minigpt_v2_have_448_pixels(llm: Path, eva: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_0.pth"
    write_minigpt4(path, minigpt_v2_shapes())
    model, _ = MiniGPT4.from_original(path, llm, eva)
    opened = reopen(model, tmp_path / "run")
    assert opened.encoder.image_size == opened.config.image_size == 448
    assert opened.encoder.tower.embeddings.position_embedding.shape == (1, 112**2 + 1, 24)


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_q_former_that_trained_is_in_the_file(
    llm: Path, eva: Path, q_former: Path, tmp_path: Path, pretrained: bool
) -> None:
    settings: dict[str, Any] = {"num_queries": 3, "q_former_sizes": Q_FORMER, "template": "minigpt4"}
    name = str(q_former) if pretrained else ""
    model = MiniGPT4.from_parts(llm, eva, q_former=name, **settings)
    model.set_stage(model.stages()["q_former"])
    torch.nn.init.normal_(model.eval().q_former.query_tokens)
    names = model.to_original(tmp_path)
    assert names["q_former.q_former.encoder.layer.0.crossattention.attention.value.bias"] == (
        "Qformer.bert.encoder.layer.0.crossattention.self.value.bias"
    )
    assert {"query_tokens", "ln_vision.weight", "llama_proj.bias"} < set(names.values())
    again, _ = MiniGPT4.from_original(tmp_path, llm, eva, q_former=name)
    sizes = again.config.q_former_sizes
    assert {name: sizes[name] for name in Q_FORMER} == Q_FORMER
    pixels = torch.randn(2, 3, 16, 16)
    again = reopen(again, tmp_path / "run")
    torch.testing.assert_close(again.media_features(pixels), model.media_features(pixels))


def test_convert_and_export_from_the_command_line(
    llm: Path, eva: Path, q_former: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, out = tmp_path / "checkpoint_4.pth", tmp_path / "run", tmp_path / "out"
    state = write_minigpt4(source, minigpt4_shapes(WIDTH) | BUFFERS)
    arguments = ["--llm", str(llm), "--encoder", str(eva), "--q_former", str(q_former)]
    assert main(["convert", str(source), str(run), "--system", "minigpt4", *arguments]) == 0
    assert "llama_proj.weight -> connector.weight [48, 16]" in capsys.readouterr().out
    assert torch.equal(open_model(run).connector.weight, state["llama_proj.weight"])  # type: ignore[arg-type]
    assert main(["export", str(run), str(out), "--to", "original"]) == 0
    assert "exported against trained: 0\n" in capsys.readouterr().out
    assert_same(written(out / "checkpoint_0.pth"), {name: state[name] for name in minigpt4_shapes(WIDTH)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.mm_projector.weight": (WIDTH, 16)}, r"holds 'model\.mm_projector\.weight', so it is no checkpoint"),
        ({**minigpt4_shapes(WIDTH), "llama_adapter.weight": (2,)}, r"holds 'llama_adapter\.weight'"),
        ({"llama_proj.weight": (WIDTH, 16)}, "lacks llama_proj.weight or llama_proj.bias"),
        ({}, "lacks llama_proj.weight or llama_proj.bias"),
        ({"llama_proj.weight": (64, 16), "llama_proj.bias": (64,)}, "for the language model of width 64, yours has 48"),
        ({"llama_proj.weight": (WIDTH, 20), "llama_proj.bias": (WIDTH,)}, r"connector\.weight \(\[48, 20\] given"),
        ({"llama_proj.weight": (WIDTH, 16), "llama_proj.bias": (WIDTH, 1)}, r"connector\.bias \(\[48, 1\] given"),
    ],
)
def test_refuses_what_does_not_fit(
    llm: Path, eva: Path, q_former: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    path = tmp_path / "checkpoint_0.pth"
    write_minigpt4(path, shapes)
    with pytest.raises(ValueError, match=message):
        MiniGPT4.from_original(path, llm, eva, q_former=q_former)


def test_refuses_what_lacks_its_q_former_or_lora(llm: Path, eva: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_0.pth"
    write_minigpt4(path, minigpt4_shapes(WIDTH))
    with pytest.raises(ValueError, match=r"tokens 16 wide; 96, of four patches .* pass that as q_former"):
        MiniGPT4.from_original(path, llm, eva)
    write_minigpt4(path, {**minigpt4_shapes(WIDTH), "query_tokens": (1, 3, 16)})
    with pytest.raises(ValueError, match=r"the Q-Former lacks q_former\.encoder\.layer\.0\.intermediate_query"):
        MiniGPT4.from_original(path, llm, eva)
    shapes = minigpt_v2_shapes()
    del shapes[LORA.format(1, "q", "B")]
    write_minigpt4(path, shapes)
    with pytest.raises(ValueError, match=r"1 missing: language_model\.model\.layers\.1\.self_attn\.q_proj\.lora_b"):
        MiniGPT4.from_original(path, llm, eva, image_size=16)


def test_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_original(tmp_path / "checkpoint_0.pth")
    with pytest.raises(ValueError, match=r"holds 0 files checkpoint_<epoch>\.pth; one is accepted"):
        read_original(tmp_path)
    (tmp_path / "checkpoint_0.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a file of tensors alone"):
        read_original(tmp_path)
    torch.save(minigpt4_shapes(WIDTH), tmp_path / "checkpoint_0.pth")
    with pytest.raises(ValueError, match="does not hold tensors by name under 'model'"):
        read_original(tmp_path)
