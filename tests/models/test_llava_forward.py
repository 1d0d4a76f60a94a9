"""LLaVA's forward, loss and generation: what stands for what, on either side of the padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optimized_models import watch
from torch.nn import functional as F
from transformers import GenerationConfig, TextStreamer

from mmfast.models import Llava, LoraSpec, Stage

IMAGES = (1, 2, 0)


def is_checkpointing(model: Llava) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.language_model.modules())


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_forward_does_not_see_the_padding(tiny: Any, family: str, padding_side: str) -> None:
    model = tiny.llava(family)
    inputs = tiny.batch(padding_side, IMAGES)
    with torch.no_grad():
        logits = model(**{**inputs, "labels": None}).logits
        for i, row in enumerate(tiny.rows_of(inputs, IMAGES)):
            alone = model(**{**row, "labels": None}).logits[0]
            assert relative_error(logits[i, inputs["attention_mask"][i].bool()], alone) < 1e-5


def test_forward_counts_positions_from_the_first_real_token(tiny: Any) -> None:
    # Rotary embeddings are relative, so logits alone would not show a wrong count; other families' would.
    model, seen = tiny.llava(), []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    inputs = tiny.batch("left", (1, 2))
    padding = (inputs["attention_mask"][0] == 0).sum().item()
    assert padding > 0
    model(**inputs)
    length = inputs["input_ids"].shape[1]
    assert seen[0].tolist() == [[0] * padding + list(range(length - padding)), list(range(length))]
    given = torch.arange(length)[None].expand(2, -1)
    model(**inputs, position_ids=given)
    assert seen[1] is given


def test_forward_under_autocast_trains_lora_and_connector(tiny: Any) -> None:
    model = tiny.llava().train()
    model.language_model.to(torch.bfloat16)
    stage = replace(model.stages()["instruct_lora"], lora=LoraSpec(rank=2, alpha=4))
    model.set_stage(stage)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tiny.batch()).loss
    loss.backward()
    for part in ("connector", "lora"):
        parameters = model.part_parameters(part)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        assert all(p.grad.isfinite().all() for p in parameters.values())


def test_forward_puts_features_in_batch_order(tiny: Any) -> None:
    model = tiny.llava()
    inputs = tiny.batch(images=(1, 2))
    embeds = model.embed(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    is_image = inputs["input_ids"] == tiny.image_token_id
    features = model.connector(model.encoder(inputs["pixel_values"]))
    assert torch.equal(embeds[is_image], features.flatten(0, 1))
    text = model.get_input_embeddings()(inputs["input_ids"][~is_image])
    assert torch.equal(embeds[~is_image], text)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [False, True])
def test_forward_loss_is_the_shifted_cross_entropy(tiny: Any, reduction: str, tied: bool) -> None:
    model = tiny.llava(tied=tied)
    inputs = tiny.batch()
    output = model(**inputs, loss_reduction=reduction, output_logits=True)
    logits, labels = output.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    assert relative_error(output.loss, expected) < 1e-5
    supervised = labels != -100
    assert output.supervised_tokens.item() == supervised.sum().item()
    assert output.correct_tokens.item() == (logits.argmax(-1) == labels)[supervised].sum().item()
    assert not output.correct_tokens.requires_grad
    assert model(**inputs).logits is None


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("adapted", [False, True])
def test_forward_computes_the_last_mlp_at_labels_alone(tiny: Any, adapted: bool, padding_side: str) -> None:
    model = tiny.llava().double().train()
    stage = Stage("both", "vicuna_v1", {"connector": 1e-3, "lora": 1e-4}, LoraSpec(rank=2, alpha=4, dropout=0.0))
    model.set_stage(stage if adapted else model.stages()["instruct"])
    inputs = tiny.batch(padding_side, IMAGES)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    last = model.get_decoder().layers[-1]
    shapes = watch(last.mlp.down_proj)
    gradients = []
    for output_logits in (True, False):
        model.zero_grad()
        output = model(**inputs, output_logits=output_logits)
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert shapes == [(*inputs["labels"].shape, 64), (output.supervised_tokens.item(), 64)]
    assert model.get_decoder().layers[-1] is last
    assert gradients[0].keys() == gradients[1].keys()
    assert all(relative_error(gradients[1][name], truth) < 1e-12 for name, truth in gradients[0].items() if truth.any())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_forward_without_images_is_the_language_model(tiny: Any, family: str) -> None:
    model = tiny.llava(family)
    model.set_stage(model.stages()["instruct"])
    inputs = tiny.batch(images=(0, 0))
    model.encoder.forward = None
    output = model(**inputs)
    expected = model.language_model(**inputs).loss
    assert relative_error(output.loss, expected) < 1e-6
    output.loss.backward()
    # Zero, not absent: a text batch must have a graph in the stage that trains the connector alone.
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


def test_forward_of_text_has_a_graph_when_only_the_connector_trains(tiny: Any) -> None:
    model = tiny.llava()
    model.set_stage(model.stages()["align"])
    model(**tiny.batch(images=(0,))).loss.backward()
    assert not any(p.grad.any() for p in model.connector.parameters())


def test_forward_takes_embeddings_in_place_of_ids(tiny: Any) -> None:
    model = tiny.llava()
    inputs = tiny.batch()
    embeds = model.embed(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    rest = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    assert torch.equal(model(inputs_embeds=embeds, **rest).loss, model(**inputs).loss)
    with pytest.raises(ValueError, match="input_ids is given, inputs_embeds given"):
        model(inputs_embeds=embeds, **inputs)
    with pytest.raises(ValueError, match="input_ids is missing, inputs_embeds missing"):
        model(**rest)


def test_forward_refuses_other_numbers_of_images(tiny: Any) -> None:
    model = tiny.llava()
    inputs = tiny.batch(images=(1, 2))
    with pytest.raises(ValueError, match=r"has 12 image tokens \(id 104\) but pixel_values gives 8 features;"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match=r"has 12 image tokens \(id 104\) but pixel_values gives 0 features;"):
        model(**{**inputs, "pixel_values": None})
    without = tiny.batch(images=(0,))
    with pytest.raises(ValueError, match=r"has 0 image tokens .* gives 12 features"):
        model(input_ids=without["input_ids"], pixel_values=inputs["pixel_values"])


def test_forward_refuses_a_cut_image(tiny: Any) -> None:
    model = tiny.llava()
    inputs = tiny.batch(images=(1, 1))
    ids = inputs["input_ids"].clone()
    first = (ids == tiny.image_token_id).nonzero()
    ids[0, first[0, 1]], ids[1, 0] = 5, tiny.image_token_id
    with pytest.raises(ValueError, match="row 0 of input_ids has 3 image tokens but an image has 4"):
        model(**{**inputs, "input_ids": ids})


def test_forward_with_a_frozen_bfloat16_base_trains_a_float32_connector(tiny: Any) -> None:
    model = tiny.llava()
    model.encoder.to(torch.bfloat16)
    model.language_model.to(torch.bfloat16)
    model.set_stage(model.stages()["align"])
    loss = model(**tiny.batch()).loss
    loss.backward()
    assert {p.grad.dtype for p in model.connector.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.connector.parameters())


def test_gradient_checkpointing_changes_no_gradient(tiny: Any) -> None:
    model = tiny.llava().train()
    model.set_stage(model.stages()["instruct"])
    inputs = tiny.batch()
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
            assert is_checkpointing(model)
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.gradient_checkpointing_disable()
    assert not is_checkpointing(model)


def test_gradient_checkpointing_reaches_lora_over_frozen_parts(tiny: Any) -> None:
    model = tiny.llava().train()
    model.set_stage(Stage("lora", "vicuna_v1", {"lora": 1e-4}, LoraSpec(rank=2, alpha=4)))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(**tiny.batch()).loss.backward()
    assert all(p.grad is not None for p in model.part_parameters("lora").values())
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.language_model.modules()]
    forms = {function.keywords["use_reentrant"] for function in functions if function is not None}
    assert forms == {False}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_generate_batch_is_each_alone(tiny: Any, family: str) -> None:
    model = tiny.llava(family)
    inputs = tiny.batch("left", IMAGES)
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    together = model.generate(**inputs, **options)
    assert together.shape == (3, 8)
    for i, row in enumerate(tiny.rows_of({**inputs, "labels": inputs["input_ids"]}, IMAGES)):
        del row["labels"]
        assert torch.equal(model.generate(**row, **options)[0], together[i])


def test_generate_is_the_argmax_of_forward(tiny: Any) -> None:
    model = tiny.llava()
    row = tiny.batch(images=(1,))
    new = model.generate(row["input_ids"], pixel_values=row["pixel_values"], max_new_tokens=4, eos_token_id=-1)
    ids = row["input_ids"]
    for step in range(4):
        logits = model(input_ids=ids, pixel_values=row["pixel_values"]).logits
        assert new[0, step] == logits[0, -1].argmax()
        ids = torch.cat([ids, new[:, step : step + 1]], dim=1)


def test_generate_streams(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.llava(), tiny.tokenizer()
    row = tiny.batch(images=(1,))
    new = model.generate(
        row["input_ids"],
        pixel_values=row["pixel_values"],
        streamer=TextStreamer(tokenizer),
        max_new_tokens=5,
        eos_token_id=-1,
    )
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(new[0]).rstrip("\n")


def test_generate_refuses_padding_on_the_right(tiny: Any) -> None:
    model = tiny.llava()
    inputs = tiny.batch("right", (1, 2))
    del inputs["labels"]
    with pytest.raises(ValueError, match=r"prompts of rows \[0\] end in padding"):
        model.generate(**inputs, max_new_tokens=1)


def test_model_refuses_a_language_model_whose_logits_are_not_linear(tiny: Any) -> None:
    model = tiny.llava()
    model.language_model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"it has \{'final_logit_softcapping': 30\.0\}"):
        Llava(model.config, model.encoder, model.connector, model.language_model)


def test_generate_stops_at_the_tokenizers_and_the_models_end(
    tiny: Any, llm: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Llava.from_parts(llm, encoder)
    model.language_model.generation_config.eos_token_id = [7, 9]
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(model.language_model, "generate", lambda **kwargs: seen.append(kwargs))
    ids = tiny.batch(images=(0,))["input_ids"]
    model.generate(ids)
    assert (seen[-1]["eos_token_id"], seen[-1]["pad_token_id"]) == ([2, 7, 9], 3)
    model.generate(ids, eos_token_id=11)
    assert (seen[-1]["eos_token_id"], seen[-1]["pad_token_id"]) == (11, 3)
    model.generate(ids, generation_config=GenerationConfig())
    assert not {"eos_token_id", "pad_token_id"} & seen[-1].keys()
    # Padding that the language model cannot look up would break the rows that have ended.
    model.processor.tokenizer.add_special_tokens({"pad_token": "<new>"})
    model.generate(ids)
    assert seen[-1]["pad_token_id"] == 2
