"""transformers' LLaVA layout, both ways: the same logits, the same words, and no silent misfit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmfast.models import Llava, LoraSpec

FAMILIES = ("llama", "mistral", "qwen2")
IMAGES = (2, 1, 0)


@pytest.fixture(scope="session")
def write_llava(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random LLaVA as transformers does, with the image token inside the vocabulary."""

    def write(family: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path_factory.mktemp(f"llava-{family}")
        config = LlavaConfig(
            text_config=tiny.text_config(family, tied, vocab_size=tiny.vocabulary + 8),
            vision_config=tiny.vision_config(),
            image_token_index=tiny.image_token_id,
            image_seq_length=tiny.num_patches,
        )
        model = tiny.randomize(LlavaForConditionalGeneration(config)).to(dtype)
        model.generation_config.eos_token_id = [2, 7]
        model.save_pretrained(folder)
        tokenizer = tiny.tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        size = {"height": 16, "width": 16}
        image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
        LlavaProcessor(image_processor, tokenizer, 8, "default", num_additional_image_tokens=1).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def llava_folder(write_llava: Callable[..., Path]) -> Path:
    return write_llava()


def assert_same_model(tiny: Any, ours: Llava, theirs: LlavaForConditionalGeneration) -> None:
    """Logits and greedy tokens of a left-padded batch, and of each of its rows alone."""
    batch = tiny.batch("left", IMAGES)
    rows = ours.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        for inputs in (batch, *tiny.rows_of(batch, IMAGES)):
            inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
            real = inputs["attention_mask"].bool()
            expected = theirs(**inputs).logits[real][:, :rows]
            logits = ours(**inputs).logits[real]
            assert ((logits - expected).norm() / expected.norm()).item() < 1e-5
            options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
            prompt = inputs["input_ids"].shape[1]
            words = theirs.generate(**inputs, **options)[:, prompt:]
            assert torch.equal(ours.generate(**inputs, **options), words)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_opens_what_transformers_wrote(tiny: Any, write_llava: Callable[..., Path], family: str, tied: bool) -> None:
    folder = write_llava(family, tied)
    ours = Llava.from_pretrained(folder)
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) == tied
    assert ours.language_model.config.tie_word_embeddings == tied
    assert ours.processor.image_token_id == ours.config.image_token_id == tiny.image_token_id
    assert ours.processor.tokens_per_image == tiny.num_patches
    assert_same_model(tiny, ours, LlavaForConditionalGeneration.from_pretrained(folder).eval())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_writes_what_transformers_opens(
    tiny: Any, write_llm: Callable[..., Path], encoder: Path, tmp_path: Path, family: str, tied: bool
) -> None:
    ours = Llava.from_parts(write_llm(family, tied), encoder)
    ours.add_lora(LoraSpec(rank=2, alpha=4))
    with torch.no_grad():
        for parameter in ours.part_parameters("lora").values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.save_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert ours.language_model.config.vocab_size == tiny.vocabulary
    theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(tiny, ours, theirs.eval())
    embedding = theirs.get_input_embeddings().weight
    assert embedding.shape[0] == tiny.image_token_id + 1
    torch.testing.assert_close(embedding[-1], embedding[:-1].mean(0))
    assert (theirs.lm_head.weight is embedding) == tied
    assert_same_model(tiny, Llava.from_pretrained(tmp_path), theirs.eval())


def test_round_trip_changes_no_weight(llava_folder: Path, tmp_path: Path) -> None:
    Llava.from_pretrained(llava_folder).save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (llava_folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for folder in (llava_folder, tmp_path):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    configs = [LlavaConfig.from_pretrained(folder).to_dict() for folder in (llava_folder, tmp_path)]
    for config in configs:
        # An opened part knows its dtype and says so; the whole model's dtype is what counts.
        config["text_config"].pop("dtype")
        config["vision_config"].pop("dtype")
    assert configs[0] == configs[1]


def test_round_trip_in_bfloat16(write_llava: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_llava(dtype=torch.bfloat16)
    ours = Llava.from_pretrained(folder)
    assert {p.dtype for p in ours.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ours.connector.parameters()} == {torch.float32}
    ours.save_pretrained(tmp_path)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {p.dtype for p in Llava.from_pretrained(folder, dtype=torch.float32).parameters()} == {torch.float32}


def test_written_processor_is_transformers(tiny: Any, llm: Path, encoder: Path, tmp_path: Path) -> None:
    ours = Llava.from_parts(llm, encoder)
    ours.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(theirs, LlavaProcessor)
    image = Image.effect_noise((20, 16), 64).convert("RGB")
    inputs = theirs(images=image, text="USER: <image>\nWhat?", return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "\nWhat?"}]
    sample = {"id": "0", "messages": [{"role": "user", "content": content}]}
    encoded = ours.processor.encode(sample, add_generation_prompt=True)
    assert torch.equal(inputs["pixel_values"][0], encoded.media[0])
    assert inputs["input_ids"][0].tolist().count(tiny.image_token_id) == tiny.num_patches
    again = Llava.from_pretrained(tmp_path)
    assert again.processor.encode(sample, add_generation_prompt=True).input_ids == encoded.input_ids


def test_trains_on_top_of_a_transformers_folder(tiny: Any, llava_folder: Path, tmp_path: Path) -> None:
    model = Llava.from_pretrained(llava_folder)
    stage = model.stages()["instruct_lora"]
    model.set_stage(replace(stage, lora=LoraSpec(rank=2, alpha=4)))
    with torch.no_grad():
        for name in ("connector", "lora"):
            for parameter in model.part_parameters(name).values():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_trained(tmp_path)
    inputs = {**tiny.batch(), "labels": None}
    with torch.no_grad():
        assert torch.equal(Llava.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


def copy_with(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model's folder with another config.json."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"hidden_size": 4096}, r"is \[112, 48\] but config.json makes it \[112, 4096\] \(7B\)"),
        ("text_config", {"vocab_size": 32000}, r"embed_tokens.weight is \[112, 48\] .* \[32000, 48\]"),
        ("text_config", {"head_dim": 24}, r"q_proj.weight is \[48, 48\] .* \[96, 48\]"),
        ("vision_config", {"hidden_size": 64}, r"is \[(48|32), .*\] but config.json makes it \[(48, 64|64, 3, 8, 8)\]"),
        ("vision_config", {"patch_size": 4}, r"patch_embedding.weight is \[32, 3, 8, 8\] .* \[32, 3, 4, 4\]"),
    ],
)
def test_refuses_another_size_before_loading(
    llava_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    changes: dict[str, int],
    message: str,
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were opened")

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", never)
    folder = copy_with(llava_folder, tmp_path, lambda config: config[part].update(changes))
    with pytest.raises(ValueError, match=message):
        Llava.from_pretrained(folder)


def test_refuses_missing_weights(llava_folder: Path, tmp_path: Path) -> None:
    folder = copy_with(llava_folder, tmp_path, lambda config: None)
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("linear_2.weight"))
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['.*linear_2\.weight'\]"):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize(("name", "value"), [("projector_hidden_act", "relu"), ("multimodal_projector_bias", False)])
def test_refuses_another_projector(llava_folder: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = copy_with(llava_folder, tmp_path, lambda config: config.update({name: value}))
    with pytest.raises(ValueError, match=f"has {name} {value!r}; .* is accepted"):
        Llava.from_pretrained(folder)


def test_refuses_other_parts_for_a_transformers_folder(llava_folder: Path, llm: Path) -> None:
    with pytest.raises(ValueError, match="has its own language model"):
        Llava.from_pretrained(llava_folder, llm=llm)


def test_save_pretrained_refuses_other_connectors(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the connector is 'linear', but transformers' LLaVA has only 'mlp2x_gelu'"):
        tiny.llava(connector="linear").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
