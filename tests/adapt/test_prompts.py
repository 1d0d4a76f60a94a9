"""add_prompts on tiny language models of transformers: what they compute, how they train, generate and come back."""

from __future__ import annotations

import copy
import importlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from optimized_models import labelled, make, step, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlavaConfig, LlavaForConditionalGeneration, Phi3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

import mmfast
from mmfast.adapt import (
    add_bias_scale,
    add_lora,
    add_prompts,
    dequantize,
    given_prompts,
    has_adapters,
    load_adapter,
    quantize,
    remove,
    save_adapter,
)
from mmfast.adapt import prompts as adapt_prompts
from mmfast.adapt.prompts import IMPLEMENTATION
from mmfast.nn import ZeroInitAttention
from mmfast.ops.backends import machine

# Mistral with a window shorter than the batch.
OPTIONS: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": 4}, "qwen2": {}}
FAMILIES = list(OPTIONS)
KEEP = {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return make(name, dtype, attn_implementation="sdpa", **OPTIONS[name], **options).eval()


def zero_init(model: nn.Module) -> list[ZeroInitAttention]:
    return [module for module in model.modules() if isinstance(module, ZeroInitAttention)]


def open_gates(model: nn.Module) -> None:
    """Gates of the size that training gives them, or larger."""
    generator = torch.Generator().manual_seed(1)
    for module in zero_init(model):
        module.gate.data.normal_(generator=generator)


def prompted(name: str = "llama", layers: Any = 2, model: Any = None, **options: Any) -> Any:
    model = model or tiny(name)
    add_prompts(model, 5, layers, **options)
    open_gates(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    batch = batch or {"input_ids": tokens()}
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def padded(side: str = "left") -> dict[str, Tensor]:
    """Three samples, two of them padded."""
    ids, mask = tokens(), torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[2, :1] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    """As `generate` counts them: the prompts' part depends on where a word is, since prompts are not rotated."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def test_names_and_what_trains() -> None:
    model = tiny()
    assert add_prompts(model, 5, [1]) == ["model.layers.1.self_attn"]
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    prefix = "model.layers.1.self_attn.prompts"
    assert trained == {f"{prefix}.prompt": [5, 32], f"{prefix}.gate": [4]}
    assert not zero_init(model)[0].training
    assert add_prompts(model, 5, [0], gate_per_head=False, gate_activation="identity", dtype=torch.bfloat16)
    first = zero_init(model)[0]
    assert (list(first.gate.shape), first.gate_activation, first.prompt.dtype) == ([1], "identity", torch.bfloat16)
    assert first.prompt.requires_grad and zero_init(model)[1].prompt.requires_grad


def test_a_number_means_the_last_layers() -> None:
    names = add_prompts(tiny(num_hidden_layers=4), layers=3)
    assert names == [f"model.layers.{index}.self_attn" for index in (1, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_start_logits_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    # Frozen before as well: PyTorch picks another matrix product for a weight that requires a gradient.
    model = tiny(name, dtype).requires_grad_(False)
    batches = [{"input_ids": tokens(length=70 if name == "llama" else 11)}, padded(), {"input_ids": tokens(batch=1)}]
    before = [logits(model, batch) for batch in batches]
    generated = model.generate(**padded(), max_new_tokens=5, do_sample=False, output_logits=True, **KEEP)
    add_prompts(model, 5, 1)
    assert model.model.config._attn_implementation == IMPLEMENTATION
    for batch, expected in zip(batches, before, strict=True):
        assert torch.equal(logits(model, batch), expected)
    again = model.generate(**padded(), max_new_tokens=5, do_sample=False, output_logits=True, **KEEP)
    assert torch.equal(torch.stack(again.logits), torch.stack(generated.logits))


def eager_attention(attention: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor], window: int) -> Tensor:
    """The official form: one matrix of scores over prompts and words, two softmaxes, one product."""
    batch, length, _ = hidden.shape

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(-3, -2)

    query, key, value = (heads(p(hidden)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    prompts = attention.prompts
    count = len(prompts.prompt)
    own = [heads(p(prompts.prompt)).expand(batch, -1, -1, -1) for p in (attention.k_proj, attention.v_proj)]
    groups = attention.num_key_value_groups
    key = repeat_kv(torch.cat([own[0], key], 2), groups)
    value = repeat_kv(torch.cat([own[1], value], 2), groups)
    scores = query @ key.mT / attention.head_dim**0.5
    ago = torch.arange(length)[:, None] - torch.arange(length)
    scores[..., count:].masked_fill_((ago < 0) | (ago >= window), float("-inf"))
    gate = prompts.gate.tanh() if prompts.gate_activation == "tanh" else prompts.gate
    weights = torch.cat([gate[:, None, None] * scores[..., :count].softmax(-1), scores[..., count:].softmax(-1)], -1)
    return attention.o_proj((weights @ value).transpose(1, 2).flatten(2))


@torch.no_grad()
def eager_logits(model: Any, ids: Tensor, window: int) -> Tensor:
    hidden = model.model.embed_tokens(ids)
    rotation = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer in model.model.layers:
        hidden = hidden + eager_attention(layer.self_attn, layer.input_layernorm(hidden), rotation, window)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("length", [11, 160])
@pytest.mark.parametrize("options", [{}, {"gate_per_head": False, "gate_activation": "identity"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_official_form(name: str, options: dict[str, Any], length: int) -> None:
    model, ids = prompted(name, **options), tokens(length=length)
    bare = logits(tiny(name), {"input_ids": ids})
    expected = eager_logits(model.double(), ids, OPTIONS[name].get("sliding_window", length))
    found = logits(model.float(), {"input_ids": ids}).double()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - bare).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_no_sample(name: str, side: str) -> None:
    model, batch = prompted(name), padded(side)
    together = logits(model, {**batch, "position_ids": positions(batch["attention_mask"])})
    for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        alone = logits(model, {"input_ids": ids[mask == 1][None]})[0]
        torch.testing.assert_close(together[row][mask == 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_is_the_full_forward_token_by_token(name: str, cache: str) -> None:
    model = prompted(name)
    out = model.generate(
        **padded(),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        cache_implementation=cache,
        disable_compile=True,
        **KEEP,
    )
    mask = torch.cat([padded()["attention_mask"], torch.ones(3, 8, dtype=torch.long)], 1)
    full = logits(model, {"input_ids": out.sequences, "attention_mask": mask, "position_ids": positions(mask)})
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, 10:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_starts_at_the_gates(name: str) -> None:
    model = tiny(name).train()
    add_prompts(model, 5, 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for index in range(4):
        output, gradients = step(model, labelled())
        losses.append(output.loss.item())
        assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        gates = [gradient for name, gradient in gradients.items() if name.endswith("gate")]
        prompts = [gradient for name, gradient in gradients.items() if name.endswith("prompt")]
        assert all(gate.abs().min() > 0 for gate in gates)
        assert all(bool(prompt.any()) == (index > 0) for prompt in prompts)
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


@pytest.mark.skipif(bool(machine(torch.device("cpu")).lacks("cpu")), reason="the extension is not built")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("masked", [False, True], ids=["every token", "padded"])
def test_where_every_token_is_there_both_gradients_are_made_together(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are those of a words' part that transformers makes; in float32 their sums have another order."""
    window = {"sliding_window": 300} if name == "mistral" else {}
    model = prompted(model=make(name, attn_implementation="sdpa", **window))
    batch = {"input_ids": tokens(length=200), "labels": tokens(length=200)}
    if masked:
        batch["attention_mask"] = torch.ones(3, 200, dtype=torch.long)
        batch["attention_mask"][1, 90:] = 0
    op, made = importlib.import_module("mmfast.ops.zero_init_attention"), []
    together = op._BOTH_BWD
    monkeypatch.setattr(op, "_BOTH_BWD", lambda *args: made.append(1) or together(*args))
    output, found = step(model, batch)
    assert len(made) == (0 if masked else 1)  # below the first prompts nothing needs a gradient
    monkeypatch.setattr(adapt_prompts, "_is_plain", lambda *args, **options: False)
    again, expected = step(model, batch)
    assert torch.equal(again.loss, output.loss)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = prompted().train()
    output, expected = step(model, labelled())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, found = step(model, labelled())
    assert torch.equal(again.loss, output.loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)


def test_autocast() -> None:
    model = prompted()
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    assert (found - expected).norm() < 5e-2 * expected.norm()


def test_compiles_whole() -> None:
    model = prompted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-5)


def test_lora_beside_prompts_trains_and_changes_the_prompts_keys() -> None:
    model = prompted()
    expected = logits(model)
    add_lora(model, ["k_proj"], rank=2, alpha=4)
    assert torch.equal(logits(model), expected)
    add_prompts(other := tiny(), 5, [0])
    add_lora(other, ["k_proj"], rank=2, alpha=4)
    add_prompts(other, 5, [1])
    names = {name.rpartition(".")[2] for name, p in other.named_parameters() if p.requires_grad}
    assert names == {"lora_a", "lora_b", "prompt", "gate"}
    attention = model.model.layers[1].self_attn
    before = attention.prompts.prompt_key_value(attention.k_proj, attention.v_proj, torch.float32)[0]
    with torch.no_grad():
        attention.k_proj.lora_b.normal_()
    after = attention.prompts.prompt_key_value(attention.k_proj, attention.v_proj, torch.float32)[0]
    assert not torch.equal(before, after)
    assert len(remove(model)) == 4


def test_peft_around_the_model() -> None:
    import peft

    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    expected = logits(model)
    assert add_prompts(model, 5, 1) == ["base_model.model.model.layers.1.self_attn"]
    assert torch.equal(logits(model), expected)
    open_gates(model)
    with model.disable_adapter():
        bare = logits(model)
    base = copy.deepcopy(model).unload()
    torch.testing.assert_close(bare, logits(base), rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, logits(merged))
    assert not torch.allclose(logits(model), expected)


@pytest.mark.parametrize("quantised", ["nf4", "int8"])
def test_a_quantised_base(quantised: Any) -> None:
    model = tiny().train().requires_grad_(False)
    quantize(model, format=quantised)
    expected = logits(model)
    add_prompts(model, 5, 2)
    assert torch.equal(logits(model), expected)
    open_gates(model)
    _, gradients = step(model, labelled())
    assert len(gradients) == 4 and all(gradient.any() for gradient in gradients.values())
    cached = logits(model.eval())
    dequantize(model)
    torch.testing.assert_close(logits(model), cached, rtol=1e-2, atol=1e-2)


def test_the_language_model_of_a_larger_one() -> None:
    text = tiny().config
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    expected = logits(model)
    assert add_prompts(model, 5, [0]) == ["model.language_model.layers.0.self_attn"]
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), expected)
    open_gates(model)
    assert not torch.allclose(logits(model), expected)


def test_an_optimised_model() -> None:
    model = prompted().train()
    output, expected = step(model, labelled())
    report = mmfast.optimize(model)
    assert {record.op for record in report.replaced} >= {"rms_norm", "swiglu", "rope", "loss"}
    again, found = step(model, labelled())
    torch.testing.assert_close(again.loss, output.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_another_attention_function_is_not_silently_without_prompts() -> None:
    model = prompted()
    expected = logits(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="has been set to 'eager', which ignores the prompts"):
        logits(model)
    model.set_attn_implementation(IMPLEMENTATION)
    assert torch.equal(logits(model), expected)
    model.set_attn_implementation("eager")
    remove(model)
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_keeps_prompts(tmp_path: Path, beside: bool) -> None:
    model = tiny()
    if beside:
        add_bias_scale(model, ["v_proj"])
        add_lora(model, ["q_proj", "k_proj"], rank=2, alpha=4)
    add_prompts(model, 5, [0])
    add_prompts(model, 3, [1], gate_per_head=False, gate_activation="identity", gate_scale=True, base_projections=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.3)
    report = save_adapter(model, tmp_path)
    assert report.peft_type == "MMFAST" and any("has prompts" in reason for reason in report.why_not_peft)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000
    loaded = tiny()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert [module.extra_repr() for module in zero_init(loaded)] == [m.extra_repr() for m in zero_init(model)]
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (loaded, model)]
    assert trained[0] == trained[1]
    assert has_adapters(loaded)
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(loaded, tmp_path)
    small = tiny(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"no decoder layer with the attention model\.layers\.1\.self_attn"):
        load_adapter(small, tmp_path)
    assert not has_adapters(small) and small.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_remove_restores_modules_and_attention(before: str) -> None:
    model = make(attn_implementation=before).eval()
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    state = model.state_dict()
    added = add_prompts(model, 5, 1) + add_prompts(model, 5, [0])
    open_gates(model)
    assert not torch.equal(logits(model), expected)
    assert sorted(remove(model)) == sorted(added)
    assert model.config._attn_implementation == model.model.config._attn_implementation == before
    assert [name for name, _ in model.named_modules()] == names
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(logits(model), expected)
    assert remove(model) == []


def test_a_copy_is_a_model_of_its_own() -> None:
    model = prompted()
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    remove(model)
    assert copied.config._attn_implementation == IMPLEMENTATION and len(zero_init(copied)) == 2
    assert not torch.equal(logits(copied), logits(model))
    remove(copied)
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, "layers is 3 but the model has 2"),
        (0, "layers is 0"),
        ([0, 2], "layers is \\[0, 2\\] but"),
        ([-1], "layers is \\[-1\\]"),
        ([1, 1], "different indices"),
        ([], "at least one"),
    ],
)
def test_unknown_layers_change_nothing(layers: Any, message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        add_prompts(model, 5, layers)
    assert not zero_init(model) and model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_has_prompts_once() -> None:
    model = tiny()
    add_prompts(model, 5, [1])
    with pytest.raises(ValueError, match=r"layers \[1\] have prompts already"):
        add_prompts(model, 5, 2)
    assert len(zero_init(model)) == 1


def unfit() -> list[Any]:
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    phi = Phi3Config(**sizes, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    gpt = GPT2Config(n_embd=32, n_head=4, n_layer=2)
    return [
        pytest.param(lambda: nn.Sequential(nn.Linear(4, 4)), id="not a language model"),
        pytest.param(lambda: AutoModelForCausalLM.from_config(gpt), id="gpt2"),
        pytest.param(lambda: AutoModelForCausalLM.from_config(phi), id="fused projections"),
    ]


@pytest.mark.parametrize("build", unfit())
def test_models_without_such_layers_are_refused(build: Any) -> None:
    with pytest.raises(TypeError, match=r"no decoder in this \w+ whose layers have a self_attn"):
        add_prompts(build(), 5, 1)


def test_models_without_the_attention_interface_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="LlamaModel does not take its attention from transformers' attention interf"):
        add_prompts(model, 5, 1)
    assert not zero_init(model) and model.config._attn_implementation == "sdpa"


def test_samples_bring_prompts_of_their_own() -> None:
    model, ids = prompted(layers=[1]), tokens()
    prompt = model.model.layers[1].self_attn.prompts.prompt
    bias = torch.randn(3, 1, 32)
    bias[1] = 0.0
    with torch.no_grad():
        found = model(ids, prompt_bias=bias).logits
        assert torch.equal(found[1], logits(model)[1])
        prompt.add_(bias[2])
    torch.testing.assert_close(found[2], logits(model)[2], rtol=1e-4, atol=1e-5)
    add_prompts(model, 4, [0], learned=False)
    open_gates(model)
    without = logits(model)
    given = {"sample_prompts": torch.randn(3, 4, 32), "prompted": torch.tensor([True, False, True])}
    with torch.no_grad():
        found = model(ids, **given).logits
    assert torch.equal(found[1], without[1])
    assert all((found[row] - without[row]).norm() > 1e-2 * without.norm() for row in (0, 2))


@pytest.mark.parametrize("beams", [1, 3])
def test_given_prompts_reach_generate(beams: int) -> None:
    model = prompted()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, **KEEP}
    given = {"prompt_bias": torch.randn(3, 1, 32)}
    with given_prompts(model.model, **given):
        together = model.generate(**padded(), **options).sequences
        found = []
        thread = threading.Thread(target=lambda: found.append(logits(model)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], logits(model)), "another thread's calls are its own"
    rows = []
    for row in range(3):
        with given_prompts(model.model, prompt_bias=given["prompt_bias"][row : row + 1]):
            batch = {name: tensor[row : row + 1] for name, tensor in padded().items()}
            rows.append(model.generate(**batch, **options).sequences)
    assert torch.equal(together, torch.cat(rows))
    assert not torch.equal(together, model.generate(**padded(), **options).sequences)


def test_a_folder_keeps_layers_without_learned_prompts(tmp_path: Path) -> None:
    model = tiny()
    add_prompts(model, 4, [0], learned=False)
    add_prompts(model, 5, [1])
    open_gates(model)
    save_adapter(model, tmp_path)
    loaded = tiny()
    load_adapter(loaded, tmp_path)
    given = {"sample_prompts": torch.randn(3, 4, 32)}
    with torch.no_grad():
        assert torch.equal(loaded(tokens(), **given).logits, model(tokens(), **given).logits)
