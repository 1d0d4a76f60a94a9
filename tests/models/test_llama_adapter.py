"""LLaMA-Adapter in its forms: what it computes, what a step trains, what a saved model keeps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmfast.adapt import merged_state_dict
from mmfast.data import get_template
from mmfast.generate import ChatSession, answer_batch
from mmfast.models import LlamaAdapter, LlamaAdapterConfig, LoraSpec, Stage, open_model

LORA = "v2_multimodal_7b with LoRA"
VERSIONS = ("v1", "v2", "v2_multimodal_7b", LORA)
LAYERS = 3
SIZES = {"prompt_length": 5, "visual_depth": 2, "visual_heads": 4, "visual_width": 24}


def settings(version: str) -> dict[str, Any]:
    visual = {"visual_length": 3} if version == "v2" else {"scales": [1, 3]} if version == "v1" else {}
    return {"version": version.removesuffix(" with LoRA"), **SIZES, **visual}


def build(tiny: Any, version: str, **changes: Any) -> LlamaAdapter:
    """Small, with the gates closed."""
    torch.manual_seed(0)
    text, vision = tiny.text_config(num_hidden_layers=LAYERS), tiny.vision_config(projection_dim=20)
    language_model = tiny.randomize(AutoModelForCausalLM.from_config(text))
    config = LlamaAdapterConfig(text, vision, **{**settings(version), **changes})
    return with_lora(LlamaAdapter(config, language_model=language_model).eval(), version)


def from_parts(llm: Path, encoder: Path, version: str, dtype: torch.dtype = torch.float32) -> LlamaAdapter:
    torch.manual_seed(0)
    return with_lora(LlamaAdapter.from_parts(llm, encoder, dtype, **settings(version)).eval(), version)


def with_lora(model: LlamaAdapter, version: str) -> LlamaAdapter:
    if version == LORA:
        model.add_lora(LoraSpec(4, 4))
    return model


def parts_of(model: LlamaAdapter) -> list[str]:
    parts = dict.fromkeys(part for stage in model.stages().values() for part in stage.train)
    return [part for part in parts if model.part_parameters(part)]


def open_up(model: LlamaAdapter, alpha: float = 0.3) -> LlamaAdapter:
    """As if trained: nothing that could train is where it started."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in parts_of(model):
            for parameter in model.part_parameters(part).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=alpha)
    return model


def batch(tiny: Any, rows: tuple[int, ...] = (0, 2)) -> dict[str, Tensor]:
    """Three rows of unequal length; those in `rows` have an image."""
    inputs = tiny.batch(images=(0, 0, 0))
    inputs["attention_mask"][1, -2:] = 0
    inputs["labels"][1, -2:] = -100
    if rows:
        generator = torch.Generator().manual_seed(2)
        inputs["pixel_values"] = torch.randn(len(rows), 3, 16, 16, generator=generator)
        inputs["media_rows"] = torch.tensor(rows)
    return inputs


@torch.no_grad()
def logits(model: LlamaAdapter, inputs: dict[str, Tensor]) -> Tensor:
    return model(**{**inputs, "labels": None}).logits


@pytest.mark.parametrize("version", VERSIONS)
def test_at_the_start_logits_are_those_of_the_language_model_whatever_is_shown(tiny: Any, version: str) -> None:
    model = build(tiny, version)
    torch.manual_seed(0)
    text = tiny.text_config(num_hidden_layers=LAYERS)
    frozen = tiny.randomize(AutoModelForCausalLM.from_config(text)).requires_grad_(False)
    model.requires_grad_(False)
    inputs = batch(tiny)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    expected = frozen(inputs["input_ids"], attention_mask=inputs["attention_mask"], position_ids=positions).logits
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, batch(tiny, ())), expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_image_changes_its_own_row_alone(tiny: Any, version: str) -> None:
    model, inputs = open_up(build(tiny, version)), batch(tiny)
    found, without = logits(model, inputs), logits(model, batch(tiny, ()))
    assert torch.equal(found[1], without[1])
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1.0}
    for row in (0, 2):
        assert (found[row] - without[row]).norm() > 1e-2 * without[row].norm()
        assert (found[row] - logits(model, other)[row]).norm() > 1e-3 * found[row].norm()
    # With the gates that images pass through closed again, nothing of an image is left.
    with torch.no_grad():
        for gate in (model.part_parameters("visual_gates") or model.part_parameters("gates")).values():
            gate.zero_()
    assert torch.equal(logits(model, inputs), logits(model, batch(tiny, ())))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_batch_gives_what_each_row_gives_alone(tiny: Any, version: str) -> None:
    model, inputs = open_up(build(tiny, version)), batch(tiny)
    together = logits(model, inputs)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        if row != 1:
            alone |= {"pixel_values": inputs["pixel_values"][row // 2][None], "media_rows": torch.tensor([0])}
        torch.testing.assert_close(together[row][real], logits(model, alone)[0], rtol=1e-4, atol=1e-4)


def test_version_1_adds_one_vector_to_every_prompt_of_every_layer(tiny: Any) -> None:
    model, inputs = open_up(build(tiny, "v1")), batch(tiny, (0,))
    with torch.no_grad():
        states = model.encoder.tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        one = model.connector(torch.cat([states[1][:, 0], states[3][:, 0]], -1))
        found = logits(model, inputs)[0]
        for prompt in model.part_parameters("prompts").values():
            prompt.add_(one[0])
    torch.testing.assert_close(found, logits(model, batch(tiny, ()))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_where_prompts_are(tiny: Any, version: str) -> None:
    model = build(tiny, version)
    layers = [layer.self_attn._modules.get("prompts") for layer in model.get_decoder().layers]
    found = [None if x is None else "image" if x.prompt is None else "learned" for x in layers]
    assert (
        found
        == {
            "v1": [None, None, "learned"],
            "v2": ["image", "learned", "learned"],
            "v2_multimodal_7b": [None, "learned", "learned"],
            LORA: [None, "learned", "learned"],
        }[version]
    )
    norm = model.visual_prompts(2, torch.randn(1, 3, 16, 16), torch.tensor([1]))
    if version != "v1":
        rows = norm["sample_prompts" if version == "v2" else "prompt_bias"][1]
        torch.testing.assert_close(rows.mean(-1), torch.zeros(len(rows)), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows.var(-1, correction=0), torch.ones(len(rows)), rtol=0, atol=1e-2)


@pytest.mark.parametrize("version", ["v2", LORA])
def test_parts_are_disjoint_and_whole(tiny: Any, version: str) -> None:
    model = build(tiny, version)
    named = [name for part in model.parts for name in model.part_parameters(part)]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("version", VERSIONS)
def test_stages_train_what_they_say(tiny: Any, version: str) -> None:
    model = build(tiny, version)
    for stage in model.stages().values():
        if version == LORA and stage.lora is not None:
            with pytest.raises(ValueError, match=r"needs LoraSpec\(rank=16, alpha=16"):
                model.set_stage(stage)
            stage = replace(stage, lora=model.lora_spec)
        model.set_stage(stage)
        named = {name for part in stage.train for name in model.part_parameters(part)}
        assert named == {name for name, p in model.named_parameters() if p.requires_grad}
    if version == "v2_multimodal_7b":
        pretrain, finetune, finetune_lora = (set(stage.train) for stage in model.stages().values())
        assert not pretrain & finetune_lora and finetune_lora == finetune | {"lora"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_of_the_first_steps(tiny: Any, version: str, checkpointing: bool) -> None:
    model = build(tiny, version).train()
    parts = parts_of(model)
    model.set_stage(Stage("all", "alpaca", dict.fromkeys(parts, 1.0)))
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):  # gates open, then the projection's last layer leaves zero, then its first layer moves
        optimizer.zero_grad()
        model(**batch(tiny)).loss.backward()
        for part in parts:
            late = ("lora_a", "gate_scale") if step == 0 else ()  # what they are multiplied with is zero
            some = [bool(p.grad.any()) for n, p in model.part_parameters(part).items() if not n.endswith(late)]
            behind_gates = part in ("prompts", "connector")
            assert all(some) if not behind_gates or step == 2 else step > 0 or not any(some), (part, step)
        optimizer.step()


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpointing_changes_no_gradient(tiny: Any, version: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = open_up(build(tiny, version)).train()
        model.set_stage(Stage("all", "alpaca", {"connector": 1.0, "prompts": 1.0, "gates": 1.0}))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch(tiny)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("version", VERSIONS)
def test_generate_is_the_full_forward(tiny: Any, version: str, beams: int) -> None:
    model, inputs = open_up(build(tiny, version)), batch(tiny)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=beams, eos_token_id=None)
    if beams == 1:
        for row in range(3):
            ids = inputs["input_ids"][row : row + 1]
            media = {}
            if row != 1:
                media = {"pixel_values": inputs["pixel_values"][row // 2][None], "media_rows": torch.tensor([0])}
            for token in out[row].tolist():
                assert logits(model, {"input_ids": ids, **media})[0, -1].argmax() == token
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        return
    # Each row's beams belong to its image: alone it finds the same ones.
    alone = {name: inputs[name][2:] for name in ("input_ids", "attention_mask")}
    alone |= {"pixel_values": inputs["pixel_values"][1:], "media_rows": torch.tensor([0])}
    found = model.generate(**alone, max_new_tokens=4, do_sample=False, num_beams=beams, eos_token_id=None)
    assert torch.equal(out[2:], found)
    assert not model.get_decoder()._forward_pre_hooks_with_kwargs


@pytest.fixture
def encoder(write_projected_encoder: Callable[[int], Path]) -> Path:
    torch.manual_seed(3)
    return write_projected_encoder(20)


@pytest.fixture
def llm(write_llm: Callable[..., Path]) -> Path:
    torch.manual_seed(4)
    return write_llm(num_hidden_layers=LAYERS)


@pytest.mark.parametrize("version", VERSIONS)
def test_save_and_open(tiny: Any, llm: Path, encoder: Path, tmp_path: Path, version: str) -> None:
    model = open_up(from_parts(llm, encoder, version))
    model.trained_parts = set(parts_of(model))
    model.save_trained(tmp_path)
    opened = open_model(tmp_path)
    assert isinstance(opened, LlamaAdapter)
    assert opened.describe() == model.describe()
    assert torch.equal(logits(opened, batch(tiny)), logits(model, batch(tiny)))


def test_a_model_trained_on_text_is_not_disturbed_by_an_image(
    tiny: Any, llm: Path, encoder: Path, tmp_path: Path
) -> None:
    model = LlamaAdapter.from_parts(llm, encoder, **settings("v1")).eval()
    with torch.no_grad():
        for part in ("prompts", "gates"):
            for parameter in model.part_parameters(part).values():
                parameter.normal_()
    model.trained_parts = {"prompts", "gates"}
    model.save_trained(tmp_path)
    opened = LlamaAdapter.from_pretrained(tmp_path)
    assert torch.equal(logits(opened, batch(tiny)), logits(model, batch(tiny, ())))


def sample(text: str, image: int | None = None, answer: str | None = None) -> Any:
    content: list[Any] = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image", "image": Image.new("RGB", (16, 16), (image, 0, 255 - image))})
    messages = [{"role": "user", "content": content}]
    return {"id": text, "messages": [*messages, *([{"role": "assistant", "content": answer}] if answer else [])]}


@pytest.mark.parametrize("version", ["v1", "v2", LORA])
def test_answers_do_not_depend_on_the_batch(llm: Path, encoder: Path, version: str) -> None:
    model = open_up(from_parts(llm, encoder, version), alpha=0.3 if version == LORA else 1.0)
    samples = [sample("a", 10), sample("a"), sample("a", 250), sample("and that, if you please", 90)]
    together = answer_batch(model, samples, 4, 6)
    assert together == [answer for one in samples for answer in answer_batch(model, [one], 1, 6)]
    assert together[0] != together[1]


@pytest.mark.parametrize("version", ["v2", LORA])
def test_chat(llm: Path, encoder: Path, version: str) -> None:
    model = open_up(from_parts(llm, encoder, version))
    image = Image.new("RGB", (16, 16), (10, 0, 245))
    session = ChatSession(model, max_new_tokens=6)
    assert session.send("a", [image]) == answer_batch(model, [sample("a", 10)], 1, 6)[0]
    if session.messages:
        with pytest.raises(ValueError, match="it has 2 images; this model takes one in a conversation"):
            session.send("and this", [image])


def test_an_image_takes_no_place_in_the_text(llm: Path, encoder: Path) -> None:
    model = LlamaAdapter.from_parts(llm, encoder, **settings("v1"))
    processor: Any = model.processor
    for name in ("alpaca", "vicuna_v1"):
        processor.template = get_template(name)
        shown, blind = processor.encode(sample("what?", 10, "x")), processor.encode(sample("what?", None, "x"))
        assert (shown.input_ids, shown.labels) == (blind.input_ids, blind.labels)
    assert processor.template.name == "vicuna_v1"
    encoded = [processor.encode(x) for x in (sample("a", None, "x"), sample("bc", 1, "x"), sample("d", 2, "x"))]
    collated = processor.collate(encoded)
    assert collated["media_rows"].tolist() == [1, 2] and collated["pixel_values"].shape == (2, 3, 16, 16)
    assert collated.keys() - processor.collate(encoded[:1]).keys() == {"pixel_values", "media_rows"}


def test_channels_of_an_image_are_swapped_before_they_are_normalised(llm: Path, encoder: Path) -> None:
    found = {
        order: LlamaAdapter.from_parts(llm, encoder, **settings("v1"), channel_order=order).processor
        for order in ("rgb", "bgr")
    }
    rgb, bgr = (
        {"type": "image", "image": Image.new("RGB", (16, 16), color)} for color in ((10, 60, 200), (200, 60, 10))
    )
    assert torch.equal(found["bgr"].read_media(rgb, None, "a"), found["rgb"].read_media(bgr, None, "a"))
    assert found["bgr"].settings() == {**found["rgb"].settings(), "channel_order": "bgr"}
    with pytest.raises(ValueError, match="channel_order is 'rbg'; 'rgb' and 'bgr' are accepted"):
        LlamaAdapter.from_parts(llm, encoder, **settings("v1"), channel_order="rbg")


def test_text_alone_goes_with_a_blank_image(tiny: Any) -> None:
    """LLaMA-Adapter V2's 7B: as if each row without an image had one of zeros."""
    model, inputs = open_up(build(tiny, "v2_multimodal_7b", blank_image=True)), batch(tiny)
    whole = torch.stack([inputs["pixel_values"][0], torch.zeros(3, 16, 16), inputs["pixel_values"][1]])
    expected = logits(model, {**inputs, "pixel_values": whole, "media_rows": torch.arange(3)})
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    blank = {**inputs, "pixel_values": torch.zeros(3, 3, 16, 16), "media_rows": torch.arange(3)}
    torch.testing.assert_close(logits(model, batch(tiny, ())), logits(model, blank), rtol=1e-5, atol=1e-5)
    other = build(tiny, "v2_multimodal_7b")
    other.load_state_dict(model.state_dict())
    assert (logits(other, batch(tiny, ())) - logits(model, blank)).norm() > 1e-3 * expected.norm()
    prompt = {name: value for name, value in batch(tiny, ()).items() if name == "input_ids"}
    shown = {"pixel_values": torch.zeros(3, 3, 16, 16), "media_rows": torch.arange(3)}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**prompt, **options), model.generate(**prompt, **shown, **options))


def test_wrong_rows_are_refused(tiny: Any) -> None:
    model, inputs = build(tiny, "v1"), batch(tiny)
    for rows in ([0], [0, 0], [0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=rf"pixel_values has 2 images and media_rows is \[{rows[0]}"):
            model(**{**inputs, "media_rows": torch.tensor(rows)})
    with pytest.raises(ValueError, match=r"pixel_values has 2 images and media_rows is \[\]"):
        model(**{**inputs, "media_rows": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "v3"}, "version is 'v3'; accepted are v1, v2, v2_multimodal_7b"),
        ({"version": "v2", "visual_layers": 2}, "first 2 layers are to attend to images and the last 2"),
        ({"version": "v2_multimodal_7b", "visual_length": 3}, "visual_length is 3, prompt_length 5"),
        ({"version": "v1", "scales": [9]}, r"layers is \[9\]; a tower of 3 layers"),
        ({"version": "v2", "visual_heads": 5}, "width is 24 and num_heads 5"),
        ({"version": "v2", "blank_image": True}, "blank_image is set; in the version v2 False is accepted"),
        ({"version": "v1", "prompt_layers": 4}, "learned prompts, but the language model has 3"),
    ],
)
def test_wrong_settings_are_refused(tiny: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny, **{"version": "v1", **changes})


def test_from_parts_refuses(llm: Path, write_encoder: Callable[..., Path]) -> None:
    with pytest.raises(TypeError, match="there is no setting heads; accepted are version"):
        LlamaAdapter.from_parts(llm, write_encoder(), heads=3)
    with pytest.raises(ValueError, match=r"ProjectedClipTokens: .* lacks the weights"):
        LlamaAdapter.from_parts(llm, write_encoder(), **settings("v2_multimodal_7b"))


def test_another_language_model_is_refused(
    llm: Path, encoder: Path, write_llm: Callable[..., Path], tmp_path: Path
) -> None:
    model = LlamaAdapter.from_parts(llm, encoder, **settings("v1"))
    model.set_stage(model.stages()["instruct"])
    model.save_trained(tmp_path)
    with pytest.raises(ValueError, match="these prompts are 48 wide, your language model is 32"):
        LlamaAdapter.from_pretrained(tmp_path, llm=write_llm(num_hidden_layers=LAYERS, hidden_size=32))


def test_lora_beside_bias_and_scale_is_refused(tiny: Any) -> None:
    for version, changes in (("v2", {}), ("v2_multimodal_7b", {"scale_on": "output"})):
        model = build(tiny, version, **changes)
        with pytest.raises(ValueError, match="has an adapter already, a BiasScaleLinear"):
            model.add_lora(LoraSpec(2, 4))
        assert model.lora_spec is None and not model.part_parameters("lora")


def test_lora_that_prompts_pass_by_is_not_merged(tiny: Any) -> None:
    model = open_up(build(tiny, LORA))
    before = logits(model, batch(tiny))
    for fold in (model.merge_lora, lambda: merged_state_dict(model.language_model)):
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn pass by the adapters of its key and value"):
            fold()
    assert model.lora_spec == LoraSpec(4, 4)
    assert torch.equal(logits(model, batch(tiny)), before)


def test_routes_name_each_part_once(tiny: Any) -> None:
    model = build(tiny, "v2")
    stage = model.stages()["joint"]
    model.set_stage(stage)
    for routes in ({"media": ("connector",)}, {**stage.routes, "media": ("connector", "gates")}):
        with pytest.raises(ValueError, match='each part in one of "media" and "text" is accepted'):
            model.set_stage(replace(stage, routes=routes))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_trains_is_float32_and_the_rest_computes_in_its_dtype(
    tiny: Any, llm: Path, encoder: Path, tmp_path: Path, version: str
) -> None:
    model = from_parts(llm, encoder, version, torch.bfloat16)
    frozen = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).requires_grad_(False).eval()
    inputs = batch(tiny)
    model.requires_grad_(False)
    alone = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    assert torch.equal(logits(model, alone), frozen(**alone).logits)
    open_up(model)
    for part in parts_of(model):
        assert {p.dtype for p in model.part_parameters(part).values()} <= {torch.float32}, part
    model.trained_parts = set(parts_of(model))
    model.save_trained(tmp_path)
    found = logits(open_model(tmp_path), inputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, logits(model, inputs))
