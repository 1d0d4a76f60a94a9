"""Packed rows, and padded ones without a mask: a sample gives what it gives alone, and none sees another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmfast.adapt import optimize, recompute
from mmfast.adapt.packing import IMPLEMENTATION, attend_by_samples, sample_rows
from mmfast.data import Processor, get_template
from mmfast.models import Lavin, LavinConfig, LlamaAdapter, LlamaAdapterConfig, LoraSpec, VideoChatGpt
from mmfast.models.video_chatgpt import VideoChatGptConfig

IMAGES = (1, 0, 3, 1)


def packed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row of what is real in a batch that is padded on the right."""
    real = inputs["attention_mask"].bool()
    labels = inputs["labels"].clone()
    labels[:, 0] = -100
    media = {name: value for name, value in inputs.items() if name not in ("attention_mask", "labels", "input_ids")}
    rows = {"input_ids": inputs["input_ids"][real][None], "labels": labels[real][None]}
    return {**media, **rows, "sample_lengths": real.sum(1)}


def by_lengths(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The padded batch without a mask."""
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    return {**rest, "sample_lengths": inputs["attention_mask"].sum(1)}


def video(tiny: Any) -> tuple[VideoChatGpt, dict[str, Tensor]]:
    """Video-ChatGPT and four samples with 1, 0, 1 and 1 videos of different lengths."""
    config = VideoChatGptConfig(
        text_config=tiny.text_config(),
        vision_config=tiny.vision_config(),
        num_frames=2,
        image_token_id=tiny.image_token_id,
    )
    model = tiny.randomize(VideoChatGpt(config))
    rows = []
    for count, words in ((1, 5), (0, 9), (1, 2), (1, 7)):
        rows.append([tiny.image_token_id] * (count * model.features_per_medium) + list(range(4, 4 + words)))
    length = max(map(len, rows))
    ids = torch.tensor([row + [3] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill((mask == 0) | (ids == tiny.image_token_id), -100)
    media = {"pixel_values": torch.randn(4, 3, 16, 16), "frame_counts": torch.tensor([1, 2, 1])}
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels, **media}


def lavin(tiny: Any) -> tuple[Lavin, dict[str, Tensor]]:
    parts = {"text_config": tiny.text_config(), "vision_config": tiny.vision_config(num_hidden_layers=4)}
    config = LavinConfig(**parts, image_token_id=tiny.image_token_id, temperature=0.5, dropout=0.0)
    return tiny.randomize(Lavin(config)), tiny.batch(images=IMAGES)


def llava(tiny: Any, family: str = "llama", **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    model = tiny.llava(family)
    for name, value in changes.items():
        setattr(model.language_model.config, name, value)
    model.add_lora(LoraSpec(rank=4, alpha=8.0))
    return tiny.randomize(model), tiny.batch(images=IMAGES)


def results(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(**inputs, loss_reduction="sum")
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: Any, expected: Any) -> None:
    (output, gradients), (padded, padded_gradients) = found, expected
    assert int(output.supervised_tokens) == int(padded.supervised_tokens) > 0
    assert int(output.correct_tokens) == int(padded.correct_tokens)
    torch.testing.assert_close(output.loss, padded.loss, rtol=1e-6, atol=0)
    assert gradients.keys() == padded_gradients.keys()
    for name, gradient in padded_gradients.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm(), name


@pytest.mark.parametrize("split", [False, True], ids=["block_mask", "split"])
@pytest.mark.parametrize("build", [llava, video, lavin])
def test_loss_and_gradients_are_those_of_the_padded_batch(build: Any, split: bool, tiny: Any) -> None:
    torch.manual_seed(0)
    model, inputs = build(tiny)
    model.train().requires_grad_(True)
    model.encoder.requires_grad_(False)
    expected = results(model, inputs)
    if split:
        attend_by_samples(model.language_model)
        assert model.get_decoder().config._attn_implementation == IMPLEMENTATION
        # Batches with a mask, as of an evaluation, are computed as before.
        assert torch.equal(results(model, inputs)[0].loss, expected[0].loss)
    assert_equal(results(model, packed(inputs)), expected)
    assert_equal(results(model, by_lengths(inputs)), expected)


@pytest.mark.parametrize("policy", ["none", "mlp", "full"])
def test_it_holds_for_optimised_models_under_every_policy(policy: str, tiny: Any) -> None:
    model, inputs = llava(tiny)
    model.train().requires_grad_(True)
    expected = results(model, inputs)
    optimize(model.language_model)
    attend_by_samples(model.language_model)
    recompute(model.language_model, policy)
    assert_equal(results(model, packed(inputs)), expected)


@pytest.mark.parametrize("split", [False, True], ids=["block_mask", "split"])
def test_a_sliding_window_slides_within_the_samples(split: bool, tiny: Any) -> None:
    model, inputs = llava(tiny, "mistral", sliding_window=4)
    model.train().requires_grad_(True)
    windows = results(model, inputs)
    model.language_model.config.sliding_window = None
    assert not torch.equal(results(model, inputs)[0].loss, windows[0].loss), "the window must be short enough to matter"
    model.language_model.config.sliding_window = 4
    if split:
        attend_by_samples(model.language_model)
    for batch in (packed(inputs), by_lengths(inputs)):
        assert_equal(results(model, batch), windows)


@pytest.mark.parametrize("split", [False, True], ids=["block_mask", "split"])
@pytest.mark.parametrize("build", [llava, video, lavin])
def test_no_sample_sees_another(build: Any, split: bool, tiny: Any) -> None:
    model, inputs = build(tiny)
    if split:
        attend_by_samples(model.language_model)
    row = packed(inputs)
    lengths = row["sample_lengths"].tolist()
    states: list[Tensor] = []
    model.get_decoder().layers[-1].register_forward_hook(lambda _, __, out: states.append(out.detach()))

    def hidden() -> tuple[Tensor, ...]:
        with torch.no_grad():
            model(**{name: value for name, value in row.items() if name != "labels"})
        return states[-1][0].split(lengths)

    before = hidden()
    for sample in (0, 2):
        changed = {name: value.clone() for name, value in row.items()}
        first = sum(lengths[:sample])
        ids = row["input_ids"][0, first : first + lengths[sample]]
        text = ids != tiny.image_token_id
        ids[text] = (ids[text] - 4 + 7) % (tiny.vocabulary - 4) + 4
        media = 0 if sample == 0 else 1  # the first of the sample's pictures, or frames
        row["pixel_values"][media] *= -2
        for index, (after, was) in enumerate(zip(hidden(), before, strict=True)):
            assert torch.equal(after, was) == (index != sample), (sample, index)
        row = changed


def test_bfloat16_and_dropout(tiny: Any) -> None:
    """Dropout falls elsewhere in a row than in a batch, so the loss is compared without it."""
    model, inputs = llava(tiny)
    model.merge_lora()
    model.add_lora(LoraSpec(rank=4, alpha=8.0, dropout=0.5))
    tiny.randomize(model)
    attend_by_samples(model.language_model)
    row = packed(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        losses = [model(**batch).loss for batch in (row, inputs)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)
        dropped = [model.train()(**row).loss for _ in range(2)]
    assert dropped[0] != dropped[1] and all(loss.isfinite() for loss in dropped)


def test_flash_attention_is_told_where_samples_begin() -> None:
    """Its own kernel then takes the row; without, it would look for restarting positions in every layer."""
    decoder = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    row = sample_rows(decoder, [3, 1, 4], torch.zeros(1, 8, 2))
    assert row["attention_mask"] is None and row["max_length_q"] == row["max_length_k"] == 4
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    for starts in (row["cu_seq_lens_q"], row["cu_seq_lens_k"]):
        assert starts.dtype == torch.int32 and starts.tolist() == [0, 3, 4, 8]


def test_processor_packs(tiny: Any) -> None:
    class Pixels:
        def __call__(self, images: Any, return_tensors: str) -> dict[str, Tensor]:
            return {"pixel_values": torch.zeros(len(images), 3, 16, 16)}

    processor = Processor(tiny.tokenizer(), Pixels(), get_template("plain"), tokens_per_image=2)
    image = {"type": "image", "image": Image.new("RGB", (4, 4))}
    samples = []
    for index, answer in enumerate(("ab", "c")):
        turns = [{"role": "user", "content": [image]}, {"role": "assistant", "content": answer}]
        samples.append(processor.encode({"id": str(index), "messages": turns}))  # type: ignore[arg-type, typeddict-item]
    row, alone = processor.pack(samples), [processor.collate([sample]) for sample in samples]
    assert row["sample_lengths"].tolist() == [batch["input_ids"].shape[1] for batch in alone]
    assert "attention_mask" not in row and row["pixel_values"].shape == (2, 3, 16, 16)
    for name in ("input_ids", "labels"):
        assert torch.equal(row[name], torch.cat([batch[name] for batch in alone], 1))


def test_lengths_that_are_wrong_are_refused(tiny: Any) -> None:
    model, inputs = llava(tiny)
    row = packed(inputs)
    for lengths in ([int(row["sample_lengths"].sum()) + 1], [], [0, int(row["sample_lengths"].sum())]):
        with pytest.raises(ValueError, match=r"sample_rows: sample_lengths is .* one for each row"):
            model(**{**row, "sample_lengths": torch.tensor(lengths, dtype=torch.int64)})
    with pytest.raises(ValueError, match="sample_rows: sample_lengths and attention_mask are given"):
        model(**row, attention_mask=torch.ones_like(row["input_ids"]))
    config = LlamaAdapterConfig(tiny.text_config(), tiny.vision_config(), prompt_layers=1)
    with pytest.raises(ValueError, match="LlamaAdapter: 4 samples are in 1 rows, but an image's prompts belong to"):
        LlamaAdapter(config)(row["input_ids"].clamp_max(9), sample_lengths=row["sample_lengths"])
