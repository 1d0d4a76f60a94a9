"""The shipped backbones: what they can do on their own, how big they are, and that the script can make them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from mmfast import world
from mmfast.encoders import ClipEncoder
from mmfast.ops import spatio_temporal_pool
from mmfast.world import __main__ as script
from mmfast.world import samples, weights
from mmfast.world.checks import answer_texts, clip_features, clip_probe_accuracy, probe_accuracy, text_accuracy
from mmfast.world.train_encoder import assemble, cell_of_patch, distort, normalize


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # The models are small: more threads would mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llm() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(weights("llm"))


@pytest.fixture(scope="module")
def encoder() -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(weights("encoder"))


def test_weights_are_small() -> None:
    folder = Path(world.__file__).parent / "weights"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size <= 8e6
    for name in ("encoder", "llm"):
        with safe_open(weights(name) / "model.safetensors", "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                assert tensors.get_tensor(key).isfinite().all()


def test_weights_refuses_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no weights 'vae'; accepted are encoder, llm"):
        weights("vae")
    monkeypatch.setattr(world, "__file__", "/nowhere/__init__.py")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors; .*python -m mmfast.world"):
        weights("llm")


def test_llm_answers_held_out_text(llm: LlamaForCausalLM) -> None:
    accuracy = text_accuracy(llm, AutoTokenizer.from_pretrained(weights("llm")), samples("text-test"))
    assert accuracy["all"] >= 0.99, accuracy
    assert set(accuracy) == {"all", "position", "parity", "presence", "comparison"}


def test_llm_answers_held_out_text_on_clips(llm: LlamaForCausalLM) -> None:
    accuracy = text_accuracy(llm, AutoTokenizer.from_pretrained(weights("llm")), samples("cliptext-test"))
    assert min(accuracy.values()) >= 0.9, accuracy
    assert set(accuracy) == {"all", "space", "time", "order"}


def test_llm_reads_patch_grids_and_captions_them(llm: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(weights("llm"))
    texts = [
        " 3 3 7 7 3 3 7 7 1 1 4 4 1 1 4 4\nWhat digit is top right?",
        "is 4 even or odd?",
        "which is larger, 3 or 8?",
    ]
    assert answer_texts(llm, tokenizer, texts) == ["7", "even", "8"]
    prompt = tokenizer(" 3 3 7 7 3 3 7 7 1 1 4 4 1 1 4 4", return_tensors="pt")
    written = llm.generate(**prompt, max_new_tokens=32, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer)
    said = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])
    assert said.endswith("\n")
    assert [sign for sign in said if sign.isdigit()] == ["3", "7", "1", "4"]


def test_llm_does_not_know_the_digits_without_a_description(llm: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(weights("llm"))
    asked = samples("questions-test")[:300]
    said = answer_texts(llm, tokenizer, [sample["messages"][0]["content"][-1]["text"] for sample in asked])
    accuracy = np.mean([answer == sample["answer"] for answer, sample in zip(said, asked, strict=True)])
    assert accuracy < 0.45


def test_encoder_shows_held_out_digits_to_a_linear_reader(encoder: CLIPVisionModel) -> None:
    accuracy = probe_accuracy(encoder, repeats=2)
    assert accuracy["digit"] >= 0.97, accuracy
    assert accuracy["patch"] >= 0.9, accuracy


def test_encoder_shows_held_out_digits_of_clips_after_pooling(encoder: CLIPVisionModel) -> None:
    accuracy = clip_probe_accuracy(encoder, clips=200)
    assert accuracy["time"] >= 0.95, accuracy
    assert accuracy["space"] >= 0.95, accuracy


def test_clip_features_are_those_that_video_chatgpt_pools(encoder: CLIPVisionModel) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 32, 32), dtype=np.uint8)
    pixels = normalize(torch.from_numpy(frames).flatten(0, 1) / 255)
    with torch.no_grad():
        patches = ClipEncoder.from_pretrained("world")(pixels).view(2, 8, 16, 128)
        expected = spatio_temporal_pool(patches, 8)
    assert torch.allclose(clip_features(encoder, list(frames)), expected, atol=1e-5)


def test_encoder_has_the_layout_llava_reads(encoder: CLIPVisionModel) -> None:
    processor = AutoImageProcessor.from_pretrained(weights("encoder"))
    image = samples("questions-test")[0]["messages"][0]["content"][0]["image"]
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    canvas = torch.from_numpy(np.array(image.convert("L"))).float() / 255
    assert torch.allclose(pixels, normalize(canvas[None]), atol=1e-6)
    states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert states[-2].shape == (1, 17, 128)
    larger = processor(images=Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
    assert larger.shape == (1, 3, 32, 32)


def test_assemble_puts_cells_where_their_patches_are() -> None:
    cells = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 16, 16)
    canvas = assemble(cells)
    patches = canvas.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten()
    assert torch.equal(patches.long(), cell_of_patch())


def test_distort_keeps_shape_and_range() -> None:
    cells = torch.rand(6, 16, 16)
    changed = distort(cells)
    assert changed.shape == cells.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert not torch.equal(changed, cells)


def test_main_makes_all_parts_and_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        script, "text_accuracy", lambda model, tokenizer, asked: text_accuracy(model, tokenizer, asked[:4])
    )
    monkeypatch.setattr(script, "probe_accuracy", lambda model: probe_accuracy(model, repeats=1))
    monkeypatch.setattr(script, "clip_probe_accuracy", lambda model: clip_probe_accuracy(model, clips=4))
    for folder in ("a", "b"):
        script.main(["--out", str(tmp_path / folder), "--max-steps", "1"])
    printed = capsys.readouterr().out
    assert "linear probe on test digits: digit" in printed
    assert "exact answers to text-test: all" in printed
    assert "exact answers to cliptext-test: all" in printed
    made = {file.relative_to(tmp_path / "a"): file for file in (tmp_path / "a").rglob("*") if file.is_file()}
    shipped = {
        file.relative_to(weights(name).parent) for name in ("encoder", "llm") for file in weights(name).iterdir()
    }
    assert set(made) == shipped
    assert sorted(path.name for path in tmp_path.joinpath("a").iterdir()) == ["encoder", "llm"]
    for path, file in made.items():
        assert file.read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    before = made[Path("llm/model.safetensors")].stat().st_mtime_ns
    script.main(["--out", str(tmp_path / "a"), "--only", "tokenizer"])
    assert made[Path("llm/model.safetensors")].stat().st_mtime_ns == before
    assert (
        json.loads(made[Path("llm/tokenizer_config.json")].read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    )
