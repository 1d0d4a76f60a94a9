"""An optimised model computes what the model computes, in every way in which it is used."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimized_models import CONFIGS, SIZES, assert_same, labelled, make, step, tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
)

import mmfast
from mmfast.adapt.optimize.walk import OPS


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients(name: str, attention: str) -> None:
    model, batch = make(name, attn_implementation=attention), labelled()
    expected, gradients = step(model, batch)
    report = mmfast.optimize(model)
    assert [record.op for record in report.left] == []
    output, found = step(model, batch, output_logits=True)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert_same(found, gradients, 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_near_to_float64_as_before(name: str) -> None:
    model, batch = make(name, torch.bfloat16), labelled()
    exact, exact_gradients = step(copy.deepcopy(model).double(), batch)
    eager, eager_gradients = step(model, batch)
    mmfast.optimize(model)
    ours, our_gradients = step(model, batch, output_logits=True)

    def error(value: Tensor, reference: Tensor) -> float:
        return ((value.double() - reference).norm() / reference.norm()).item()

    assert error(ours.logits, exact.logits) < 1.5 * error(eager.logits, exact.logits) + 2**-9
    for key, reference in exact_gradients.items():
        assert error(our_gradients[key], reference) < 1.5 * error(eager_gradients[key], reference) + 2**-8, key


@pytest.mark.parametrize("op", OPS)
def test_a_subset_replaces_that_op_alone(op: str) -> None:
    model, batch = make(), labelled()
    _, gradients = step(model, batch)
    before = {name: type(module) for name, module in model.named_modules()}
    report = mmfast.optimize(model, ops=[op])
    changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
    assert {record.op for record in report.replaced} <= {op}
    assert changed == {record.name for record in report.replaced}
    assert bool(changed) == (op != "lora")
    _, found = step(model, batch)
    assert_same(found, gradients, 1e-5)


@pytest.mark.parametrize(
    ("op", "function", "count"),
    [("rms_norm", "rms_norm", 5), ("swiglu", "swiglu", 2), ("rope", "rope", 2), ("loss", "linear_cross_entropy", 1)],
)
def test_the_op_is_called(op: str, function: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"mmfast.adapt.optimize.{op}")
    plain, calls = getattr(module, function), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, function, counted)
    model = make()
    mmfast.optimize(model, ops=[op])
    step(model, labelled())
    assert len(calls) == count


def test_the_addition_before_a_norm_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mmfast.adapt.optimize.rms_norm")
    plain, residuals = module.rms_norm, []

    def seen(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Any:
        residuals.append(residual is not None)
        return plain(x, weight, eps, residual)

    monkeypatch.setattr(module, "rms_norm", seen)
    model = make()
    mmfast.optimize(model, ops=["rms_norm"])
    model(tokens())
    assert residuals == [False, True, False, True, False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = make(), labelled()
    model.enable_input_require_grads()
    _, gradients = step(model, batch)
    mmfast.optimize(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    _, found = step(model, batch)
    assert len(calls) == 2, "the layer must run again in backward"
    assert_same(found, gradients, 1e-5)


def test_autocast() -> None:
    model, batch = make(), labelled()
    with torch.autocast("cpu", torch.bfloat16):
        expected, gradients = step(model, batch)
    mmfast.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        output, found = step(model, batch, output_logits=True)
    assert output.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-2, atol=1e-2)
    assert_same(found, gradients, 3e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_with_cache(name: str) -> None:
    model = make(name).eval()
    ids, mask = tokens(), torch.ones(3, 11, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    beams = model.generate(ids, num_beams=3, **options)
    mmfast.optimize(model)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, num_beams=3, **options), beams)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_each_layer_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    model, batch = make(), labelled()
    _, gradients = step(model, batch)
    mmfast.optimize(model)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    _, found = step(model, batch)
    assert_same(found, gradients, 1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_the_model_in_one_graph(backend: str) -> None:
    model, batch = make(), labelled()
    batch["use_cache"] = False  # type: ignore[assignment]
    torch.compile(model, fullgraph=True, backend=backend)(**batch)  # the original can
    torch._dynamo.reset()
    _, gradients = step(model, batch)
    report = mmfast.optimize(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    compiled(**batch).loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, gradients, 1e-5)
    # A change back is noticed.
    report.restore()
    assert compiled(**batch).logits is not None


def test_compile_with_inductor() -> None:
    model, batch = make(num_hidden_layers=1), labelled()
    batch["use_cache"] = False  # type: ignore[assignment]
    _, gradients = step(model, batch)
    mmfast.optimize(model)
    model.model.layers[0].compile(fullgraph=True)
    _, found = step(model, batch)
    assert_same(found, gradients, 1e-5)


def test_hidden_states_and_attentions_are_recorded() -> None:
    model = make(attn_implementation="eager").eval()
    expected = model(tokens(), output_hidden_states=True, output_attentions=True)
    optimised = make(attn_implementation="eager").eval()
    mmfast.optimize(optimised)
    for options in ({}, {"labels": tokens()}):
        output = optimised(tokens(), output_hidden_states=True, output_attentions=True, **options)
        for field in ("hidden_states", "attentions"):
            assert len(output[field]) == len(expected[field])
            for value, reference in zip(output[field], expected[field], strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


class TestLoss:
    """What `labels=` gives."""

    def test_no_logits_unless_asked(self) -> None:
        model = make()
        expected = model(tokens(), labels=tokens())
        mmfast.optimize(model)
        for context in (torch.enable_grad(), torch.no_grad()):
            for training in (True, False):
                model.train(training)
                with context:
                    output = model(tokens(), labels=tokens())
                    assert output.logits is None
                    assert list(output)[:1] == ["loss"]
                    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
                    output = model(tokens(), labels=tokens(), output_logits=True)
                    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert model(tokens()).logits is not None

    def test_a_hook_on_the_head_runs(self) -> None:
        model = make()
        expected = model(tokens(), labels=tokens()).loss
        mmfast.optimize(model)
        model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
        output = model(tokens(), labels=tokens())
        assert output.logits is not None
        assert output.loss > expected + 0.1

    @pytest.mark.parametrize("items", [7, torch.tensor(7), None])
    def test_the_trainers_normalisation(self, items: Any) -> None:
        model, batch = make(), labelled()
        expected, gradients = step(model, batch, num_items_in_batch=items)
        mmfast.optimize(model)
        output, found = step(model, batch, num_items_in_batch=items)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert_same(found, gradients, 1e-5)

    def test_shift_labels_and_ignore_index(self) -> None:
        model, batch = make(), labelled()
        labels = batch["labels"].masked_fill(batch["labels"] == -100, 0)
        options = {"shift_labels": F.pad(labels[:, 1:], (0, 1), value=0), "ignore_index": 0}
        expected = model(**{**batch, "labels": labels}, **options)
        mmfast.optimize(model)
        output = model(**{**batch, "labels": labels}, **options)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)

    def test_no_label_gives_zero_and_a_gradient(self) -> None:
        model = make()
        mmfast.optimize(model)
        output, gradients = step(model, {"input_ids": tokens(), "labels": torch.full((3, 11), -100)})
        assert output.loss == 0
        assert gradients
        assert all(not gradient.any() for gradient in gradients.values())

    def test_positional_arguments_and_tuples(self) -> None:
        model, batch = make(), labelled()
        arguments = (batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])
        expected = model(*arguments, return_dict=False)
        mmfast.optimize(model)
        output = model(*arguments, return_dict=False)
        assert isinstance(output, tuple)
        torch.testing.assert_close(output[0], expected[0], rtol=1e-5, atol=1e-6)
        assert len(output) == len(expected) - 1

    def test_what_only_the_original_can_do(self) -> None:
        model = make()
        mmfast.optimize(model)
        labels = tokens()[:, -4:]
        assert model(tokens(), labels=labels, logits_to_keep=4).logits.shape == (3, 4, 97)
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
        output = model(tokens(), labels=tokens())
        torch.testing.assert_close(output.loss, output.logits.sum())
        del model._loss_function
        model.lm_head = nn.Linear(32, 97)
        assert model(tokens(), labels=tokens()).logits is not None

    def test_signature_is_that_of_the_model(self) -> None:
        model = make()
        before = inspect.signature(model.forward)
        mmfast.optimize(model)
        assert inspect.signature(model.forward) == before


class TestImageText:
    """LLaVA, of transformers and of mmfast."""

    @pytest.fixture
    def llava(self) -> LlavaForConditionalGeneration:
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, image_token_index=96)
        return LlavaForConditionalGeneration(config).train()

    def batch(self) -> dict[str, Tensor]:
        ids = tokens().clamp(max=95)
        ids[:2, 2:6] = 96
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28), "labels": ids.masked_fill(ids == 96, -100)}

    def test_transformers(self, llava: LlavaForConditionalGeneration) -> None:
        batch = self.batch()
        expected, gradients = step(llava, batch)
        report = mmfast.optimize(llava)
        assert report.left == []
        assert ("", "loss", "LlavaForConditionalGeneration") in report.replaced
        output, found = step(llava, batch, output_logits=True)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.image_hidden_states, expected.image_hidden_states)
        # A bias of all keys changes no softmax: its gradient is zero but for rounding.
        for name in [name for name in gradients if name.endswith("k_proj.bias")]:
            assert max(found.pop(name).abs().max(), gradients.pop(name).abs().max()) < 1e-7
        assert_same(found, gradients, 1e-5)

    def test_mmfast(self, tiny_llm: Any, tiny_clip: Any) -> None:
        model = mmfast.models.Llava.from_parts(tiny_llm, tiny_clip).train()
        image = model.config.image_token_id
        ids = torch.randint(3, 90, (2, 10))
        ids[:, 2:6] = image
        batch = {
            "input_ids": ids,
            "pixel_values": torch.randn(2, 3, 28, 28),
            "labels": ids.masked_fill(ids == image, -100),
        }
        expected, gradients = step(model, batch)
        report = mmfast.optimize(model)
        assert report.left == []
        assert {record.op for record in report.replaced} == {"rms_norm", "swiglu", "rope", "loss"}
        output, found = step(model, batch)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert_same(found, gradients, 1e-5)
        prompt = {"input_ids": ids[:, :7], "pixel_values": batch["pixel_values"], "max_new_tokens": 8}
        generated = model.eval().generate(**prompt)
        report.restore()
        assert torch.equal(model.generate(**prompt), generated)


class TestLeft:
    """What is not known is left, with the reason."""

    def reasons(self, model: nn.Module) -> dict[str, str]:
        return {record.name: record.reason for record in mmfast.optimize(model).left}

    def test_an_architecture_that_is_not_known(self) -> None:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
        report = mmfast.optimize(model)
        assert report.replaced == []
        assert [(record.name, record.op) for record in report.left] == [("", "loss")]
        assert "no layer that it could serve" in str(report)

    def test_a_module_without_layers(self) -> None:
        report = mmfast.optimize(nn.Linear(3, 3))
        assert (report.replaced, report.left) == ([], [])

    def test_subclasses_that_compute_something_else(self) -> None:
        from transformers.models.llama import modeling_llama as llama

        class ScaledRMSNorm(llama.LlamaRMSNorm):
            def forward(self, hidden_states: Tensor) -> Tensor:
                return 2 * super().forward(hidden_states)

        class RenamedRMSNorm(llama.LlamaRMSNorm):
            pass

        model = make()
        expected = None
        model.model.layers[0].post_attention_layernorm.__class__ = ScaledRMSNorm
        model.model.layers[1].post_attention_layernorm.__class__ = RenamedRMSNorm
        expected = model(tokens()).logits
        assert self.reasons(model) == {
            "model.layers.0.post_attention_layernorm": "its forward is not that of LlamaRMSNorm",
            "model.layers.0": "its post_attention_layernorm is a ScaledRMSNorm, which is left",
        }
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)

    def test_another_activation(self) -> None:
        reasons = self.reasons(make(hidden_act="gelu", num_hidden_layers=1))
        assert reasons == {"model.layers.0.mlp": "its activation is GELUActivation, not SiLU"}

    def test_another_norm(self) -> None:
        model = AutoModelForCausalLM.from_config(GemmaConfig(**SIZES))
        expected = model(tokens()).logits
        reasons = self.reasons(model)
        assert reasons["model.norm"] == "its forward is not that of LlamaRMSNorm"
        assert reasons["model.layers.0"] == "its post_attention_layernorm is a GemmaRMSNorm, which is left"
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)

    def test_a_mixture_of_experts(self) -> None:
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES)).eval()
        expected = model(tokens(), labels=tokens())
        reasons = self.reasons(model)
        assert set(reasons) == {"", "model.layers.0", "model.layers.1"}
        assert reasons[""] == "its forward is not that of LlamaForCausalLM or LlavaForConditionalGeneration"
        output = model(tokens(), labels=tokens())
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss)

    def test_another_rotary_function(self) -> None:
        model = AutoModelForCausalLM.from_config(Phi3Config(**SIZES))
        reasons = self.reasons(model)
        assert reasons["model.layers.0.self_attn"] == "its apply_rotary_pos_emb is not that of Llama"
        assert reasons["model.layers.0"] == "its forward is not that of LlamaDecoderLayer"
        assert reasons[""].startswith(
            "its last layer computes unlabelled positions too: its last layer: its forward is"
        )

    def test_a_forward_on_the_instance(self) -> None:
        model = make(num_hidden_layers=1)
        model.model.norm.forward = lambda hidden: hidden
        reasons = self.reasons(model)
        assert reasons.pop("model.norm") == "its forward was replaced on the instance"
        assert list(reasons) == [""]

    def test_a_head_that_is_more_than_a_product(self) -> None:
        model = make(num_hidden_layers=1)
        model.lm_head = nn.Linear(32, 97)
        assert self.reasons(model) == {"": "its lm_head has a bias"}
        model = make(num_hidden_layers=1)
        model.loss_function = lambda **_: None
        assert self.reasons(model) == {"": "its loss_function is not ForCausalLMLoss"}


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"optimize: there is no op \['fast'\]; accepted are \['lora', 'rms_norm'"):
        mmfast.optimize(make(), ops=["rope", "fast"])
    with pytest.raises(TypeError, match="ops is the string 'rope'"):
        mmfast.optimize(make(), ops="rope")
    with pytest.raises(TypeError, match="optimize: model is a dict"):
        mmfast.optimize({})  # type: ignore[arg-type]


def test_the_type_of_a_model_stays() -> None:
    model = make()
    mmfast.optimize(model)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "LlamaForCausalLM"
