"""answer_batch equals one sample at a time, in the samples' order, under each stop rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmfast.generate import answer_batch
from mmfast.models import Llava


def question(name: str, text: str, *images: Any, answer: str | None = None) -> Any:
    parts = [{"type": "image", "image": image} for image in images]
    messages: list[Any] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"id": name, "messages": messages}


def plain_image(red: int) -> Image.Image:
    return Image.new("RGB", (28, 28), (red, 40, 200))


@pytest.fixture
def samples() -> list[Any]:
    """Different lengths, with no, one and two images, some with an answer."""
    return [
        question("a", "what is in the image?", plain_image(255)),
        question("b", "hello"),
        question("c", "a cat or a dog? " * 5, plain_image(0), plain_image(255), answer="a cat"),
        question("d", "what is in the image?", plain_image(0), answer="a dog"),
        question("e", "and the dog? " * 9),
    ]


def test_answers_equal_those_of_one_at_a_time(model: Llava, samples: list[Any]) -> None:
    alone = [answer_batch(model, [sample], 1, 12)[0] for sample in samples]
    assert len(set(alone)) == len(samples)
    for batch_size in (2, 3, 8):
        assert answer_batch(model, samples, batch_size, 12) == alone


def test_answers_equal_those_of_one_at_a_time_when_the_model_is_run_alone(model: Llava, samples: list[Any]) -> None:
    """Against the model's own greedy loop without a cache or padding."""
    sample = samples[0]
    ids = torch.tensor([model.processor.encode(sample, add_generation_prompt=True).input_ids])
    pixels = torch.stack(model.processor.encode(sample, add_generation_prompt=True).media)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            token = model(input_ids=ids, pixel_values=pixels).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
    expected = model.processor.tokenizer.decode(ids[0, start:].tolist()).strip()
    assert answer_batch(model, samples, 3, 6)[0] == expected


def test_the_answer_in_a_sample_is_not_seen(model: Llava) -> None:
    with_answer = question("a", "what is it?", plain_image(9), answer="a very long answer")
    without = question("a", "what is it?", plain_image(9))
    assert answer_batch(model, [with_answer], 1, 8) == answer_batch(model, [without], 1, 8)


def test_each_row_ends_at_its_own_end_token(model: Llava, samples: list[Any]) -> None:
    free = answer_batch(model, samples, 2, 12)
    row = model.generate(
        torch.tensor([model.processor.encode(samples[1], add_generation_prompt=True).input_ids]),
        do_sample=False,
        max_new_tokens=12,
    )[0].tolist()
    model.language_model.generation_config.eos_token_id = [2, row[4]]
    first = row.index(row[4])
    cut = answer_batch(model, samples, 5, 12)
    assert cut[1] == model.processor.tokenizer.decode(row[:first]).strip()
    assert cut[1] != free[1]
    assert cut == [answer_batch(model, [sample], 1, 12)[0] for sample in samples]


def test_a_caption_ends_at_the_newline(captioner: Llava) -> None:
    samples = [question(str(red), "ignored", plain_image(red)) for red in (0, 120, 255)]
    tokenizer = captioner.processor.tokenizer
    encoded = captioner.processor.encode(samples[0], add_generation_prompt=True)
    row = captioner.generate(
        torch.tensor([encoded.input_ids]),
        pixel_values=torch.stack(encoded.media),
        do_sample=False,
        max_new_tokens=12,
    )[0].tolist()
    assert len(row) == 12
    # The token at place 4 now says newline, and the newline says what that token said.
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    head = captioner.language_model.lm_head.weight.data
    head[[newline, row[4]]] = head[[row[4], newline]]
    cut = answer_batch(captioner, samples, 3, 12)
    assert cut[0] == tokenizer.decode(row[: row.index(row[4])]).strip()
    assert not any("\n" in text for text in cut)
    assert cut == [answer_batch(captioner, [sample], 1, 12)[0] for sample in samples]


def test_image_paths_start_at_the_media_folder(model: Llava, tmp_path: Path) -> None:
    plain_image(77).save(tmp_path / "it.png")
    by_path = answer_batch(model, [question("a", "it?", "it.png")], 1, 6, media_folder=tmp_path)
    assert by_path == answer_batch(model, [question("a", "it?", plain_image(77))], 1, 6)


def test_training_mode_comes_back(model: Llava, samples: list[Any]) -> None:
    model.train()
    answer_batch(model, samples[:1], 1, 2)
    assert model.training
    model.eval()
    answer_batch(model, samples[:1], 1, 2)
    assert not model.training


def test_no_samples_give_no_answers(model: Llava) -> None:
    assert answer_batch(model, [], 4, 4) == []


def test_a_progress_bar_is_shown_on_request(model: Llava, samples: list[Any], capfd: Any) -> None:
    answer_batch(model, samples, 2, 1)
    assert capfd.readouterr().err == ""
    answer_batch(model, samples, 2, 1, progress=True)
    assert "5/5" in capfd.readouterr().err


def test_wrong_numbers_and_long_prompts_are_refused(model: Llava, samples: list[Any]) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer_batch(model, samples, 0, 4)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        answer_batch(model, samples, 1, 0)
    with pytest.raises(ValueError, match=r"sample 'long': the prompt has \d+ tokens.*context of 512"):
        answer_batch(model, [*samples, question("long", "dog " * 600)], 1, 4)
    with pytest.raises(ValueError, match=r"sample 'a': the prompt.*answer of 510"):
        answer_batch(model, samples[:1], 1, 510)
    model.processor = None
    with pytest.raises(ValueError, match="the model has no processor"):
        answer_batch(model, samples, 1, 4)
