"""The original repository's projector becomes a model and comes back, bit for bit; everything else is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfast.models import Llava
from mmfast.models.convert import convert, to_original

KEYS = {
    "linear": ["bias", "weight"],
    "mlp2x_gelu": ["0.bias", "0.weight", "2.bias", "2.weight"],
    "mlp3x_gelu": ["0.bias", "0.weight", "2.bias", "2.weight", "4.bias", "4.weight"],
}
WEIGHT = "model.mm_projector.weight"
BIAS = "model.mm_projector.bias"


def projector(in_features: int = 24, out_features: int = 32) -> dict[str, Tensor]:
    return {WEIGHT: torch.randn(out_features, in_features), BIAS: torch.randn(out_features)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "mm_projector.bin"
    path.parent.mkdir()
    torch.save(projector(), path)
    return path


@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_round_trip_is_bit_exact(connector: str, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    model = Llava.from_parts(tiny_llm, tiny_clip, connector).eval()
    path = tmp_path / "there" / "mm_projector.bin"
    names = to_original(model, path)
    content = torch.load(path, weights_only=True)
    assert sorted(content) == [f"model.mm_projector.{key}" for key in KEYS[connector]]
    assert [file.name for file in path.parent.iterdir()] == ["mm_projector.bin"]
    assert convert(str(path), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip)) == names
    opened = Llava.from_pretrained(tmp_path / "out")
    assert opened.config.connector == connector
    assert opened.processor.template.name == "plain"
    state = opened.connector.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.connector.state_dict().items())
    inputs = {"input_ids": torch.tensor([[1, *[model.config.image_token_id] * 4, 9, 8]])}
    inputs["pixel_values"] = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    to_original(opened, tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert all(torch.equal(tensor, back[name]) for name, tensor in content.items())


def test_the_models_weights_are_not_read(file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    bare = {}
    for name, folder in {"llm": tiny_llm, "clip": tiny_clip}.items():
        bare[name] = tmp_path / name
        shutil.copytree(folder, bare[name], ignore=shutil.ignore_patterns("*.safetensors"))
    convert(str(file), str(tmp_path / "out"), str(bare["llm"]), str(bare["clip"]))
    opened = Llava.from_pretrained(tmp_path / "out", llm=tiny_llm, encoder=tiny_clip)
    assert torch.equal(opened.connector.weight, torch.load(file, weights_only=True)[WEIGHT])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_exactly(
    dtype: torch.dtype, file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    content = {name: tensor.to(dtype) for name, tensor in projector().items()}
    torch.save(content, file)
    convert(str(file), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))
    connector = Llava.from_pretrained(tmp_path / "out").connector
    assert connector.weight.dtype == torch.float32
    assert torch.equal(connector.weight.to(dtype), content[WEIGHT])


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_any_prefix_is_stripped(prefix: str, file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    torch.save({f"{prefix}mm_projector.{n.rpartition('.')[2]}": t for n, t in projector().items()}, file)
    names = convert(str(file.parent), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))
    assert names == {
        "connector.weight": f"{prefix}mm_projector.weight",
        "connector.bias": f"{prefix}mm_projector.bias",
    }


def test_safetensors_are_read(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    save_file(projector(), tmp_path / "p.safetensors")
    assert len(convert(str(tmp_path / "p.safetensors"), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))) == 2


def test_options_reach_the_model(file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    convert(
        str(file),
        str(tmp_path / "out"),
        str(tiny_llm),
        str(tiny_clip),
        template="vicuna_v1",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        dtype="bfloat16",
    )
    model = Llava.from_pretrained(tmp_path / "out")
    assert (model.encoder.layer, model.encoder.num_patches) == (-1, 5)
    assert model.processor.template.name == "vicuna_v1"
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_report_names_every_tensor(
    file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path, capsys: Any
) -> None:
    convert(str(file), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "linear: 2 tensors"
    assert [line.split() for line in lines[1:3]] == [
        [WEIGHT, "->", "connector.weight", "[32,", "24]"],
        [BIAS, "->", "connector.bias", "[32]"],
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((24, 40), "this projector is for 40, your language model is 32"), ((20, 32), "20 wide, your encoder gives 24")],
)
def test_other_sizes_are_refused_with_both_numbers(
    sizes: tuple[int, int], message: str, file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    torch.save(projector(*sizes), file)
    with pytest.raises(ValueError, match=message):
        convert(str(file), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))
    assert not (tmp_path / "out").exists()


def test_7b_and_13b_are_called_so(file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llm, tmp_path / "7b", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tmp_path / "7b" / "config.json").read_text())
    (tmp_path / "7b" / "config.json").write_text(json.dumps({**config, "hidden_size": 4096}))
    torch.save(projector(24, 5120), file)
    with pytest.raises(ValueError, match=r"5120 \(13B\), your language model is 4096 \(7B\)"):
        convert(str(file), str(tmp_path / "out"), str(tmp_path / "7b"), str(tiny_clip))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**projector(), "model.embed_tokens.weight": torch.zeros(2, 32)}, "mm_use_im_start_end"),
        ({**projector(), "model.image_newline": torch.zeros(32)}, r"'model\.image_newline'"),
        ({**projector(), "mm_projector.weight": torch.zeros(32, 24)}, r"'mm_projector\.weight'"),
        ({WEIGHT: torch.zeros(32, 24)}, r"the keys \['weight'\]"),
        ({}, r"the keys \[\]"),
        ({"model.mm_projector.0.weight": torch.zeros(32, 24), BIAS: torch.zeros(32)}, "was the file cut"),
        ({WEIGHT: torch.zeros(32, 24), BIAS: torch.zeros(31)}, r"\[31\]"),
        (
            {
                "model.mm_projector.0.weight": torch.zeros(32, 24),
                "model.mm_projector.0.bias": torch.zeros(32),
                "model.mm_projector.2.weight": torch.zeros(32, 30),
                "model.mm_projector.2.bias": torch.zeros(32),
            },
            r"\[32, 30\]",
        ),
        ({WEIGHT: 3}, "tensors by name"),
        ([torch.zeros(1)], "tensors by name"),
    ],
)
def test_other_content_is_refused(
    content: Any, message: str, file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        convert(str(file), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))
    assert not (tmp_path / "out").exists()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["torch", "pickle", "text", "empty"])
def test_code_in_a_file_never_runs(how: str, file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    bomb = {WEIGHT: Bomb(tmp_path / "exploded")}
    if how == "torch":
        torch.save(bomb, file)
    else:
        file.write_bytes({"pickle": pickle.dumps(bomb, protocol=2), "text": b"hello", "empty": b""}[how])
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        convert(str(file), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))
    assert not (tmp_path / "exploded").exists()


def test_missing_files_are_named(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        convert(str(tmp_path / "none.bin"), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))


def test_a_model_is_replaced_only_on_request(file: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    arguments = (str(file), str(tmp_path / "out"), str(tiny_llm), str(tiny_clip))
    convert(*arguments)
    torch.save(projector(), file)
    with pytest.raises(FileExistsError, match="holds a model already"):
        convert(*arguments)
    convert(*arguments, overwrite=True)
    opened = Llava.from_pretrained(tmp_path / "out")
    assert torch.equal(opened.connector.weight, torch.load(file, weights_only=True)[WEIGHT])


def test_a_connector_without_weights_is_refused(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    model = Llava.from_parts(tiny_llm, tiny_clip)
    model.connector = torch.nn.Identity()
    with pytest.raises(ValueError, match="has no weights"):
        to_original(model, tmp_path / "p.bin")


def test_options_of_another_system_are_refused(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    file, out, bases = str(tmp_path / "p.bin"), str(tmp_path / "out"), (str(tiny_llm), str(tiny_clip))
    with pytest.raises(ValueError, match="q_former is set, but the system llava has vision_feature_layer and"):
        convert(file, out, *bases, q_former="blip2.pth")
    with pytest.raises(ValueError, match="vision_feature_layer is set, but the system lavin has no such option"):
        convert(file, out, *bases, system="lavin", vision_feature_layer=-1)
    assert not (tmp_path / "out").exists()
