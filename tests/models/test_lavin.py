"""LaVIN: its invariants, and its modality token against one that stands in the sequence behind a mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimized_models import watch
from torch import Tensor, nn

from mmfast.models import Lavin, LavinConfig
from mmfast.nn import MixtureAdapter

IMAGES = (1, 0, 2)


def build(tiny: Any, trained: bool = True, family: str = "llama", **settings: Any) -> Lavin:
    """A random model with visual tokens of as many blocks as `tiny` images have patches."""
    config = LavinConfig(
        text_config=tiny.text_config(family),
        vision_config=tiny.vision_config(num_hidden_layers=4),
        image_token_id=tiny.image_token_id,
        **{"temperature": 0.5, "dropout": 0.0, **settings},
    )
    model = Lavin(config)
    if trained:
        return tiny.randomize(model)
    tiny.randomize(model.encoder)
    tiny.randomize(model.language_model)
    return model.eval()


def logits(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}, **kwargs).logits


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


class InSequence(nn.Module):
    """LaVIN as it is written: the modality token first in each sequence, routers that look at the first token."""

    def __init__(self, model: Lavin) -> None:
        super().__init__()
        self.model = model
        model.detach()
        for layer, adapter in zip(model.language_model.model.layers, model.adapters, strict=True):
            layer.input_layernorm.register_forward_hook(lambda _, __, x, adapter=adapter: adapter(x))
        for layer, adapter in zip(model.encoder.layers, model.vision_adapters, strict=True):
            layer.layer_norm1.register_forward_hook(lambda _, __, x, adapter=adapter: adapter(x, router_input=x))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        model = self.model
        embeds = model.embed(input_ids, pixel_values=pixel_values)
        modality = (input_ids == model.config.image_token_id).any(1).long()
        embeds = torch.cat([model.modality(modality)[:, None], embeds], 1)
        rows, length, _ = embeds.shape
        allowed = torch.ones(length, length).tril().bool().repeat(rows, 1, 1)
        allowed[:, 1:, 1:] &= attention_mask.bool()[:, None]
        allowed[:, 1:, 0] = False  # nobody may attend to it
        allowed |= torch.eye(length).bool()  # and padding has something to attend to
        mask = torch.zeros(allowed.shape, dtype=embeds.dtype).masked_fill(~allowed, float("-inf"))[:, None]
        return model.language_model(inputs_embeds=embeds, attention_mask=mask).logits[:, 1:]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_a_modality_token_in_the_sequence(tiny: Any, side: str, family: str) -> None:
    model = build(tiny, family=family).double()
    inputs = double(tiny.batch(side, IMAGES))
    expected = InSequence(copy.deepcopy(model))(*(inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, inputs)[real], expected[real], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_a_modality_token_in_the_sequence(tiny: Any, checkpointing: bool) -> None:
    model = build(tiny).double().train()
    model.set_stage(model.stages()["instruct"])
    inputs = double(tiny.batch("right", IMAGES))
    reference = InSequence(copy.deepcopy(model))
    output = reference(*(inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")))
    nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()).backward()
    if checkpointing:
        model.gradient_checkpointing_enable()
    shapes = watch(model.get_decoder().layers[-1].mlp.down_proj)
    # Two graphs at once: nothing of the second may get into the recomputation of the first.
    losses = [model(**batch).loss for batch in (inputs, double(tiny.batch("right", (0, 1), seed=1)))]
    losses[0].backward()
    # Only the two modality tokens, which have no label, go through the last MLP as sequences.
    assert {shape[:-1] for shape in shapes if len(shape) == 3} == {(2, 1)}
    assert any(len(shape) == 2 for shape in shapes)
    expected = {name: p.grad for name, p in reference.model.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_fresh_adapters_change_nothing(tiny: Any) -> None:
    model, inputs = build(tiny, trained=False), tiny.batch(images=IMAGES)
    adapted = logits(model, inputs)
    states = model.encoder.tower(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states
    model.detach()
    frozen = model.encoder.tower(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert all(map(torch.equal, states, frozen))
    assert torch.equal(logits(model, inputs), adapted)
    # Nor does the modality, as long as the experts are equal.
    model.attach()
    model.modality.weight.data.normal_()
    assert torch.equal(logits(model, inputs), adapted)


def test_detach_gives_the_models_back_and_attach_undoes_it(tiny: Any) -> None:
    model, inputs = build(tiny), tiny.batch(images=IMAGES)
    names = set(model.state_dict())
    before = logits(model, inputs)
    pixels, embeds = inputs["pixel_values"], model.embed(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    plain_llm, plain_tower = (type(m)(m.config).eval() for m in (model.language_model, model.encoder.tower))
    plain_llm.load_state_dict(model.language_model.state_dict())
    plain_tower.load_state_dict(model.encoder.tower.state_dict())
    with pytest.raises(RuntimeError, match="called without expert_weights"):
        model.language_model(inputs_embeds=embeds)
    model.detach()
    assert torch.equal(model.language_model(inputs_embeds=embeds).logits, plain_llm(inputs_embeds=embeds).logits)
    own, plain = (m(pixel_values=pixels).last_hidden_state for m in (model.encoder.tower, plain_tower))
    assert torch.equal(own, plain)
    assert not torch.equal(logits(model, inputs), before)
    model.attach()
    assert torch.equal(logits(model, inputs), before)
    assert set(model.state_dict()) == names


def test_experts_weights(tiny: Any) -> None:
    model = build(tiny)
    with torch.no_grad():
        weights = model.expert_weights()
    assert weights.shape == (2, 2, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2))
    assert not torch.equal(weights[:, 0], weights[:, 1])
    # Kept while nothing changes, and made anew when a frozen weight does.
    with torch.no_grad():
        assert model.expert_weights() is weights
        model.language_model.model.layers[0].mlp.up_proj.weight.mul_(2)
        assert not torch.equal(model.expert_weights()[1], weights[1])
    hot = build(tiny, temperature=1e6)
    torch.testing.assert_close(hot.expert_weights(), torch.full((2, 2, 2), 0.5), rtol=0, atol=1e-5)


def test_swapping_the_experts_changes_nothing(tiny: Any) -> None:
    model, inputs = build(tiny).double(), double(tiny.batch(images=IMAGES))
    before = logits(model, inputs)
    for adapter in (*model.adapters, *model.vision_adapters):
        for name in ("up_weight", "up_bias", "router_weight", "router_bias"):
            parameter = getattr(adapter, name)
            parameter.data = parameter.data.flip(0)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_equals_its_rows(tiny: Any, side: str) -> None:
    model, inputs = build(tiny), tiny.batch(side, IMAGES)
    together = logits(model, inputs)
    for i, row in enumerate(tiny.rows_of(inputs, IMAGES)):
        real = inputs["attention_mask"][i].bool()
        torch.testing.assert_close(together[i][real], logits(model, row)[0], rtol=1e-4, atol=1e-4)


def test_first_image_routes_the_batch_where_the_published_code_does(tiny: Any) -> None:
    model, own = build(tiny, vision_routing="first_image"), build(tiny)
    own.load_state_dict(model.state_dict())
    pixels = torch.randn(4, 3, 16, 16)
    tokens = own.features_per_medium
    with torch.no_grad():
        features = model.media_features(pixels).view(4, tokens, -1)
        alone = [model.media_features(pixels[i : i + 1]) for i in range(4)]
        assert torch.equal(alone[1], own.media_features(pixels[1:2]))
        # Without the first image, items move together with their features; another first image changes them all.
        moved = model.media_features(pixels[[0, 3, 1, 2]]).view(4, tokens, -1)
        replaced = model.media_features(pixels[[1, 1, 2, 3]]).view(4, tokens, -1)
        independent = own.media_features(pixels).view(4, tokens, -1)
    torch.testing.assert_close(moved, features[[0, 3, 1, 2]])
    torch.testing.assert_close(features[0], alone[0])
    for i in range(1, 4):
        assert (features[i] - alone[i]).abs().max() > 1e-3
        assert (features[i] - replaced[i]).abs().max() > 1e-3
        torch.testing.assert_close(independent[i], alone[i])


def test_class_tokens_come_from_the_blocks(tiny: Any) -> None:
    model = build(tiny, vision_blocks=[2, 4])
    pixels = torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []
    for block in (1, 3):
        model.encoder.layers[block].register_forward_hook(lambda _, __, output: seen.append(output[:, 0]))
    with torch.no_grad():
        features = model.media_features(pixels)
        first, second = model.connector[0], model.connector[2]
        expected = second(nn.functional.silu(first(torch.stack(seen, 1))))
    assert torch.equal(features, expected.flatten(0, 1))
    assert LavinConfig(vision_config={"num_hidden_layers": 24}).vision_blocks == [4, 8, 12, 16, 20, 24]
    # What lies above the last of them neither runs nor trains.
    assert len(build(tiny, vision_blocks=[1, 2]).vision_adapters) == 2


def test_first_gradients(tiny: Any) -> None:
    model = build(tiny, trained=False, dropout=0.1).train()
    model.set_stage(model.stages()["instruct"])
    model(**tiny.batch(images=IMAGES)).loss.backward()
    zero = ("down_weight", "down_bias", "router_weight", "router_bias", "modality.weight")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any() != name.endswith(zero), name
        else:
            assert parameter.grad is None, name


def test_text_alone_trains_too(tiny: Any) -> None:
    model = build(tiny).train()
    model.set_stage(model.stages()["instruct"])
    model(**tiny.batch(images=(0, 0))).loss.backward()
    assert not model.modality.weight.grad[1].any()
    assert model.modality.weight.grad[0].any()
    for part in ("vision_adapters", "connector"):
        assert not any(p.grad.any() for p in model.part_parameters(part).values())


def test_generation_routes_by_the_prompt(tiny: Any) -> None:
    model, inputs = build(tiny), tiny.batch("left", IMAGES)
    del inputs["labels"]
    answers = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=3)
    # Without a cache, all of the sequence again for each token.
    for step in range(5):
        assert torch.equal(logits(model, inputs)[:, -1].argmax(-1), answers[:, step])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answers[:, step : step + 1]], 1)
        inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    assert not model.language_model._forward_pre_hooks


def test_beams_keep_their_samples_experts(tiny: Any) -> None:
    model, inputs = build(tiny), tiny.batch("left", IMAGES)
    del inputs["labels"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "eos_token_id": None, "pad_token_id": 3}
    together = model.generate(**inputs, **options)
    for i, row in enumerate(tiny.rows_of({**inputs, "labels": inputs["input_ids"]}, IMAGES)):
        del row["labels"]
        assert torch.equal(model.generate(**row, **options)[0], together[i])


def test_folded_equals_unfolded(tiny: Any) -> None:
    model = build(tiny)
    for modality, images in (("image", (1, 2)), ("text", (0, 0))):
        inputs = tiny.batch(images=images)
        before = logits(model, inputs)
        drifts = model.fold(modality)
        assert len(drifts) == 6
        assert "language_model.model.layers.1.self_attn.v_proj" in drifts
        assert max(drift.relative for drift in drifts.values()) < 1e-6
        folded = logits(model, inputs)
        assert not torch.equal(folded, before)
        torch.testing.assert_close(folded, before, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=rf"folded for samples of the modality '{modality}', but rows \[1\]"):
            model(**tiny.batch(images=(1, 0) if modality == "image" else (0, 1)))
        with pytest.raises(RuntimeError, match="the model is folded"):
            model.trained_state()
        model.train().eval()
        assert torch.equal(logits(model, inputs), before)


def test_folding_refusals(tiny: Any) -> None:
    model = build(tiny)
    with pytest.raises(ValueError, match="modality is 'audio'; text and image are accepted"):
        model.fold("audio")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the model is training"):
        model.train().fold("text")
    model.eval().detach()
    with pytest.raises(RuntimeError, match="the model is detached"):
        model.fold("text")
    with pytest.raises(RuntimeError, match="the language model's adapters are off"):
        model.expert_weights()


def test_settings_out_of_range(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"vision_blocks is \[0, 4\]; whole numbers from 1 to 4"):
        build(tiny, vision_blocks=[0, 4])
    with pytest.raises(ValueError, match="vision_routing is 'cls'; 'token' and 'first_image' are accepted"):
        build(tiny, vision_routing="cls")
    model = build(tiny)
    with pytest.raises(ValueError, match="inputs_embeds are given without modality"):
        model(inputs_embeds=torch.zeros(1, 3, 48))
    assert model(inputs_embeds=torch.zeros(1, 3, 48), modality=torch.tensor([1])).logits.shape == (1, 3, 104)


def test_experts_of_mixed_dtypes(tiny: Any) -> None:
    """Adapters in float32 on models in bfloat16, as a run in bfloat16 has them."""
    model, inputs = build(tiny), tiny.batch(images=IMAGES)
    before = logits(model, inputs)
    model.encoder.bfloat16()
    model.language_model.bfloat16()
    after = logits(model, inputs)
    assert after.dtype == torch.bfloat16
    assert isinstance(model.adapters[0], MixtureAdapter)
    assert model.adapters[0].down_weight.dtype == torch.float32
    assert (after.float() - before).norm() / before.norm() < 0.05
