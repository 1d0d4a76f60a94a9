"""export writes folders that open elsewhere and compute the same, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

from mmfast.adapt import has_lora, lora_parameters
from mmfast.models import Llava, LoraSpec, llava_original, llava_transformers
from mmfast.models.convert import convert
from mmfast.models.export import export


def save_run(folder: Path, llm: Path, clip: Path, connector: str = "mlp2x_gelu") -> Llava:
    """A run of the LoRA stage with adapters of the size that training gives them."""
    model = Llava.from_parts(llm, clip, connector, template="short").eval()
    model.add_lora(LoraSpec(rank=4, alpha=8))
    for parameter in lora_parameters(model).values():
        parameter.data.normal_(0.0, 0.1)
    model.save_trained(folder / "model")
    return model


@pytest.fixture
def run(tmp_path: Path, tiny_llm: Path, tiny_clip: Path) -> Path:
    save_run(tmp_path / "run", tiny_llm, tiny_clip)
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def inputs(model: Llava) -> dict[str, torch.Tensor]:
    ids = [1, *[model.config.image_token_id] * 4, 40, 41, 42]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)}


@torch.no_grad()
def test_hf_opens_in_transformers_with_the_same_logits(run: Path, tmp_path: Path, capsys: Any) -> None:
    before = contents(run)
    drift = export(str(run), str(tmp_path / "out"))
    assert 0 <= drift < 1e-4
    assert f"{drift:.3g}" in capsys.readouterr().out
    assert contents(run) == before
    ours = Llava.from_pretrained(run)
    assert has_lora(ours)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert not any("lora" in name for name, _ in theirs.named_parameters())
    expected = ours(**inputs(ours)).logits
    got = theirs(**inputs(ours), attention_mask=torch.ones(1, 8)).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    reopened = Llava.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        reopened(**inputs(ours)).logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-4
    )


def test_a_wrong_merge_is_seen_in_the_drift(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmerged(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in module.state_dict().items() if "lora" not in name}

    monkeypatch.setattr(llava_transformers, "merged_state_dict", unmerged)
    monkeypatch.setattr(llava_original, "merged_state_dict", unmerged)
    assert export(str(run), str(tmp_path / "hf")) > 0.1
    assert export(str(run), str(tmp_path / "original"), to="original") > 0.1


@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu"])
def test_original_has_the_repositorys_layout(connector: str, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    model = save_run(tmp_path / "run", tiny_llm, tiny_clip, connector)
    out = tmp_path / "out"
    assert export(str(tmp_path / "run"), str(out), to="original") < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_projector_type"] == connector
    assert config["mm_vision_tower"] == str(tiny_clip)
    assert (config["mm_hidden_size"], config["hidden_size"], config["mm_vision_select_layer"]) == (24, 32, -2)
    assert (config["torch_dtype"], config["rope_theta"], config["rope_scaling"]) == ("float32", 10000.0, None)
    assert "<image>" not in AutoTokenizer.from_pretrained(tiny_llm).get_vocab()
    assert (out / "tokenizer.json").read_bytes() == (tiny_llm / "tokenizer.json").read_bytes()
    language_model, report = LlamaForCausalLM.from_pretrained(
        out, config=model.language_model.config, output_loading_info=True
    )
    projector = {f"model.mm_projector.{key}" for key in model.connector.state_dict()}
    assert set(report["unexpected_keys"]) == projector
    assert not report["missing_keys"]
    assert language_model.config.vocab_size == model.language_model.config.vocab_size
    assert set(torch.load(out / "mm_projector.bin", weights_only=True)) == projector
    convert(str(out), str(tmp_path / "back"), str(tiny_llm), str(tiny_clip))
    back = Llava.from_pretrained(tmp_path / "back").connector.state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.connector.state_dict().items())


def test_original_keeps_scaled_rope_and_tied_embeddings(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    llm = LlamaForCausalLM.from_pretrained(tiny_llm)
    llm.config.tie_word_embeddings = True
    llm.config.rope_parameters = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    llm = LlamaForCausalLM(llm.config)
    llm.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path / "llm")
    Llava.from_parts(tmp_path / "llm", tiny_clip).save_trained(tmp_path / "run")
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), to="original") < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5000.0
    assert (config["rope_scaling"]["type"], config["rope_scaling"]["factor"]) == ("linear", 2.0)
    assert config["tie_word_embeddings"] is True


def test_a_bfloat16_model_is_written_in_bfloat16(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    model = Llava.from_parts(tiny_llm, tiny_clip, dtype=torch.bfloat16)
    model.save_trained(tmp_path / "run")
    export(str(tmp_path / "run"), str(tmp_path / "out"), to="original")
    language_model = LlamaForCausalLM.from_pretrained(
        tmp_path / "out", config=model.language_model.config, dtype="auto"
    )
    assert torch.equal(language_model.lm_head.weight, model.language_model.lm_head.weight)
    assert language_model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("to", ["hf", "original"])
def test_a_folder_is_replaced_only_on_request(to: Any, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(str(run), str(out), to=to)
    (out / "old").write_text("old")
    before = contents(out)
    with pytest.raises(FileExistsError, match="not empty"):
        export(str(run), str(out), to=to)
    assert contents(out) == before
    export(str(run), str(out), to=to, overwrite=True)
    assert not (out / "old").exists()
    assert (out / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_what_is_exported_is_never_replaced(run: Path, tmp_path: Path, tiny_llm: Path) -> None:
    for target in (run, run.parent, tiny_llm, tiny_llm.parent):
        before = contents(target)
        with pytest.raises(FileExistsError, match="which is exported"):
            export(str(run), str(target), overwrite=True)
        assert contents(target) == before


def test_a_failed_export_leaves_nothing(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "linear", tiny_llm, tiny_clip, "linear")
    with pytest.raises(ValueError, match="only 'mlp2x_gelu'"):
        export(str(tmp_path / "linear"), str(tmp_path / "out"))
    model = save_run(tmp_path / "broken", tiny_llm, tiny_clip)
    model.connector[0].bias.data[0] = float("nan")
    model.save_trained(tmp_path / "broken" / "model")
    for to in ("hf", "original"):
        with pytest.raises(ValueError, match="not finite"):
            export(str(tmp_path / "broken"), str(tmp_path / "out"), to=to)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"linear", "broken"}


def test_wrong_arguments_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to is 'gguf'"):
        export(str(run), str(tmp_path / "out"), to="gguf")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nothing"):
        export(str(tmp_path / "nothing"), str(tmp_path / "out"))


def test_original_refuses_other_language_models(run: Path, tmp_path: Path) -> None:
    model = Llava.from_pretrained(run)
    model.language_model.config.model_type = "mistral"
    with pytest.raises(ValueError, match="'mistral'"):
        llava_original.write_original(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
