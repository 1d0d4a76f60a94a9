"""Video-ChatGPT's published layout, in its names and shapes, and back; everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.cli import main
from mmfast.models import VideoChatGpt, open_model
from mmfast.models.convert import convert
from mmfast.models.export import export

WEIGHT, BIAS, WORDS = "model.mm_projector.weight", "model.mm_projector.bias", "model.embed_tokens.weight"
# As published: LLaVA-Lightning's 32,000 words and three of LLaVA's, then <vid_patch>, <vid_start>, <vid_end>.
VOCABULARY = 32003


@pytest.fixture
def published_llm(write_llm: Callable[..., Path]) -> Path:
    return write_llm(vocab_size=VOCABULARY)


def checkpoint(rows: int = VOCABULARY + 3, width: int = 48, features: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {WEIGHT: (width, features), BIAS: (width,), WORDS: (rows, width)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, content: Any, name: str = "video_chatgpt-7B.bin") -> Path:
    torch.save(content, folder / name)
    return folder / name


def test_round_trip(published_llm: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = checkpoint()
    source = write(tmp_path, content)
    arguments = ["convert", str(source), str(tmp_path / "run"), "--system", "video_chatgpt"]
    assert main([*arguments, "--llm", str(published_llm), "--encoder", str(encoder)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in content)
    model = open_model(tmp_path / "run")
    assert isinstance(model, VideoChatGpt)
    assert torch.equal(model.connector.weight, content[WEIGHT])
    assert torch.equal(model.connector.bias, content[BIAS])
    assert torch.equal(model.markers.weight, content[WORDS][[32004, 32005]])
    assert model.processor.chat_template == "video-chatgpt_v1"
    assert export(str(tmp_path / "run"), str(tmp_path / "back"), "original") == 0
    back = torch.load(tmp_path / "back" / "mm_projector.bin", weights_only=True)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in back.items()} == {
        name: (tensor.shape, torch.float32) for name, tensor in content.items()
    }
    assert torch.equal(back[WEIGHT], content[WEIGHT])
    assert torch.equal(back[BIAS], content[BIAS])
    assert torch.equal(back[WORDS][-2:], content[WORDS][-2:])
    assert torch.equal(back[WORDS][:VOCABULARY], model.get_input_embeddings().weight)


def test_half_precision_is_kept_exactly(llm: Path, encoder: Path, tiny: Any, tmp_path: Path) -> None:
    content = {name: tensor.half() for name, tensor in checkpoint(tiny.vocabulary + 3).items()}
    names = convert(str(write(tmp_path, content)), str(tmp_path / "run"), str(llm), str(encoder), "video_chatgpt")
    state = open_model(tmp_path / "run").trained_state()
    assert names == {"connector.weight": WEIGHT, "connector.bias": BIAS, "markers.weight": WORDS}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["connector.weight"], content[WEIGHT].float())


def test_refuses_other_checkpoints(llm: Path, encoder: Path, tiny: Any, tmp_path: Path) -> None:
    rows = tiny.vocabulary + 3
    good = checkpoint(rows)
    for content, message in [
        ({WEIGHT: good[WEIGHT], BIAS: good[BIAS]}, r"no checkpoint of Video-ChatGPT: missing \['model.embed_tokens"),
        ({**good, "lm_head.weight": good[WORDS]}, r"unexpected \['lm_head.weight'\]"),
        ({"llama_proj.weight": good[WEIGHT]}, "is no checkpoint of Video-ChatGPT"),
        (checkpoint(rows, features=64), "reads features 64 wide, your encoder gives 32"),
        (checkpoint(rows, width=40), "is for 40, your language model is 48"),
        (checkpoint(rows - 3), rf"model.embed_tokens.weight \({rows - 3}, 48\) instead of \({rows}, 48\)"),
        ({**good, BIAS: good[BIAS][:-1]}, r"mm_projector.bias \(47,\) instead of \(48,\)"),
        ([good], "does not hold tensors by name"),
    ]:
        source = write(tmp_path, content)
        with pytest.raises(ValueError, match=message):
            convert(str(source), str(tmp_path / "run"), str(llm), str(encoder), "video_chatgpt")
    with pytest.raises(FileNotFoundError, match=r"mm_projector\.bin does not exist"):
        convert(str(tmp_path), str(tmp_path / "run"), str(llm), str(encoder), "video_chatgpt")
    assert not (tmp_path / "run").exists()
