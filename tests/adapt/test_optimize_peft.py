"""PEFT's LoRA layers on mmfast's op, in every state that PEFT knows."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast

peft = pytest.importorskip("peft")
from optimized_models import assert_same, labelled, make, step, tokens
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear

lora = importlib.import_module("mmfast.adapt.optimize.lora")

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@pytest.fixture(autouse=True)
def no_call_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests are; PEFT's own forward would do all the work."""
    monkeypatch.setitem(lora.LEAST, "rows", 0)


def make_peft(dtype: torch.dtype = torch.float32, model: Any = None, **options: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "lora_dropout": 0.0, "init_lora_weights": False}
    model = make(dtype=dtype) if model is None else model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{**config, "task_type": "CAUSAL_LM", **options})).train()


def lora_records(report: mmfast.adapt.OptimizeReport) -> tuple[list[Any], list[Any]]:
    return [r for r in report.replaced if r.op == "lora"], [r for r in report.left if r.op == "lora"]


def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(), **kwargs).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"modules_to_save": ["embed_tokens"]}, {"r": 1}],
    ids=["plain", "rslora", "trained bias", "modules_to_save", "rank 1"],
)
def test_logits_and_gradients(options: dict[str, Any]) -> None:
    base = make("qwen2") if options.get("bias") else None  # with biases on q, k and v
    model, batch = make_peft(model=base, **options), labelled()
    expected, gradients = step(model, batch)
    report = mmfast.optimize(model)
    replaced, left = lora_records(report)
    assert (len(replaced), left) == (8, [])
    assert report.left == []
    output, found = step(model, batch)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert any("lora_A" in name for name in found)
    assert_same(found, gradients, 2e-5)


def test_the_op_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_peft()
    mmfast.optimize(model, ops=["lora"])
    calls = []
    op = lora.lora_linear
    monkeypatch.setattr(lora, "lora_linear", lambda *args: calls.append(1) or op(*args))
    monkeypatch.setattr(LoraLinear, "forward", None)
    logits(model)
    assert len(calls) == 8


@pytest.mark.parametrize("rows", [33, 600])
def test_a_small_call_is_pefts_own(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lora.LEAST, "rows", 512)
    model, calls = make_peft(target_modules=["q_proj"]), []
    mmfast.optimize(model, ops=["lora"])
    op = lora.lora_linear
    monkeypatch.setattr(lora, "lora_linear", lambda *args: calls.append(1) or op(*args))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer(torch.randn(rows, 32))
    assert len(calls) == (rows > 512)


def test_float32_adapters_on_a_bfloat16_base() -> None:
    model, batch = make_peft(torch.bfloat16), labelled()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.float32
    exact, exact_gradients = step(copy.deepcopy(model).double(), batch)
    eager, eager_gradients = step(model, batch)
    mmfast.optimize(model)
    ours, our_gradients = step(model, batch, output_logits=True)
    assert ours.logits.dtype == torch.bfloat16

    def error(value: Tensor, reference: Tensor) -> float:
        return ((value.double() - reference).norm() / reference.norm()).item()

    assert error(ours.logits, exact.logits) < 1.5 * error(eager.logits, exact.logits) + 2**-9
    for name, reference in exact_gradients.items():
        assert our_gradients[name].dtype == eager_gradients[name].dtype
        assert error(our_gradients[name], reference) < 1.5 * error(eager_gradients[name], reference) + 2**-8, name


def test_autocast() -> None:
    model, batch = make_peft(), labelled()
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = step(model, batch)
    mmfast.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        output, found = step(model, batch, output_logits=True)
    assert output.logits.dtype == torch.bfloat16
    assert_same(found, gradients, 3e-2)


def test_dropout_drops_in_training_alone() -> None:
    model = make_peft(lora_dropout=0.5)
    expected = logits(model.eval())
    mmfast.optimize(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.train()
    torch.manual_seed(3)
    first = logits(model)
    torch.manual_seed(3)
    assert torch.equal(logits(model), first)
    assert not torch.allclose(logits(model), first)
    # The mean over masks is the value without dropout.
    layer, x = model.base_model.model.model.layers[0].self_attn.q_proj, torch.randn(4, 32)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
        update = layer.eval()(x) - layer.base_layer(x)
        assert (mean - layer(x)).norm() < 0.1 * update.norm()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_each_layer_in_one_graph(dtype: torch.dtype, backend: str) -> None:
    torch._dynamo.reset()
    model, batch = make_peft(dtype), labelled()
    mmfast.optimize(model)
    expected, gradients = step(model, batch)
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    output, found = step(model, batch)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.loss, expected.loss, rtol=tolerance, atol=tolerance)
    assert_same(found, gradients, tolerance)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_mask(reentrant: bool) -> None:
    model, batch = make_peft(lora_dropout=0.3), labelled()
    mmfast.optimize(model)
    model.enable_input_require_grads()
    torch.manual_seed(5)
    _, expected = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    _, found = step(model, batch)
    assert_same(found, expected, 1e-5)


class TestAdapters:
    """PEFT's switches, thrown after the model was optimised."""

    @pytest.fixture
    def models(self) -> tuple[Any, Any]:
        model = make_peft()
        other = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model.add_adapter("other", other)
        optimised = copy.deepcopy(model)
        mmfast.optimize(optimised)
        return model.eval(), optimised.eval()

    def agree(self, models: tuple[Any, Any], **kwargs: Any) -> Tensor:
        expected, found = (logits(model, **kwargs) for model in models)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return found

    def test_another_is_chosen(self, models: tuple[Any, Any]) -> None:
        first = self.agree(models)
        for model in models:
            model.set_adapter("other")
        assert not torch.allclose(self.agree(models), first)

    def test_several_at_once(self, models: tuple[Any, Any]) -> None:
        first = self.agree(models)
        for model in models:
            model.base_model.set_adapter(["default", "other"])
        assert not torch.allclose(self.agree(models), first)
        gradients = [step(model, labelled())[1] for model in models]
        assert_same(gradients[1], gradients[0], 2e-5)

    def test_several_with_unequal_dropout(self, models: tuple[Any, Any]) -> None:
        for model in models:
            model.base_model.set_adapter(["default", "other"])
            for layer in model.modules():
                if isinstance(layer, LoraLinear) and {"default", "other"} <= set(layer.lora_dropout):
                    layer.lora_dropout["other"] = nn.Dropout(0.5)
            model.train()
        outputs = []
        for model in models:
            torch.manual_seed(0)
            outputs.append(logits(model))
        # PEFT's own forward has to do it, with PEFT's masks.
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)

    def test_disabled(self, models: tuple[Any, Any]) -> None:
        first = self.agree(models)
        with models[0].disable_adapter(), models[1].disable_adapter():
            assert not torch.allclose(self.agree(models), first)
        assert torch.equal(self.agree(models), first)

    def test_merged_and_unmerged(self, models: tuple[Any, Any]) -> None:
        first = self.agree(models)
        for model in models:
            model.merge_adapter()
        torch.testing.assert_close(self.agree(models), first, rtol=1e-3, atol=1e-3)
        for model in models:
            model.unmerge_adapter()
        self.agree(models)

    def test_one_of_several_for_each_sample(self, models: tuple[Any, Any]) -> None:
        self.agree(models, adapter_names=["default", "other", "__base__"])

    def test_scaled(self, models: tuple[Any, Any]) -> None:
        for model in models:
            for layer in model.modules():
                if isinstance(layer, LoraLinear):
                    layer.set_scale("default", 3)
        self.agree(models)

    def test_added_and_deleted(self, models: tuple[Any, Any]) -> None:
        for model in models:
            model.delete_adapter("default")
            model.set_adapter("other")
        self.agree(models)
        for model in models:
            torch.manual_seed(2)
            model.add_adapter("dora", LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
            model.set_adapter("dora")
        self.agree(models)

    def test_merge_and_unload(self, models: tuple[Any, Any]) -> None:
        expected = self.agree(models)
        merged = models[1].merge_and_unload()
        assert not any(isinstance(module, LoraLinear) for module in merged.modules())
        torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)

    def test_saved_and_loaded(self, models: tuple[Any, Any], tmp_path: Any) -> None:
        models[1].save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        mmfast.optimize(loaded)
        torch.testing.assert_close(logits(loaded), self.agree(models), rtol=1e-4, atol=1e-5)


class TestLeft:
    """Layers that are not base + A B on a dense weight."""

    def reasons(self, model: nn.Module) -> set[str]:
        replaced, left = lora_records(mmfast.optimize(model))
        assert replaced == []
        return {record.reason for record in left}

    def test_variants(self) -> None:
        model = make_peft(use_dora=True)
        expected = logits(model)
        assert self.reasons(model) == {"adapter 'default' is a variant of LoRA (DoraLinearVariant)"}
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)

    def test_lora_bias(self) -> None:
        with pytest.warns(Warning, match="no bias"):
            model = make_peft(lora_bias=True)
        assert self.reasons(model) == {"adapter 'default' has a bias (lora_bias)"}

    def test_a_quantised_base(self) -> None:
        base = make()
        mmfast.adapt.quantize(base.requires_grad_(False), ["q_proj"])
        model = make_peft(model=base, target_modules=["q_proj"])
        assert self.reasons(model) == {"its base is quantised (QuantizedLinear)"}

    def test_a_base_that_bitsandbytes_quantised(self) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        base = make()
        for layer in base.model.layers:
            layer.self_attn.q_proj = bitsandbytes.nn.Linear4bit(32, 32, bias=False)
        base.is_loaded_in_4bit = True
        model = make_peft(model=base, target_modules=["q_proj"])
        assert self.reasons(model) == {"it is bnb.Linear4bit, not PEFT's layer for a dense nn.Linear"}

    def test_embeddings(self) -> None:
        model = make_peft(target_modules=["embed_tokens"])
        assert self.reasons(model) == {"it is layer.Embedding, not PEFT's layer for a dense nn.Linear"}

    def test_hooks(self) -> None:
        model = make_peft(target_modules=["q_proj"])
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)
        assert self.reasons(model) == {"its base has hooks, which would not run"}

    def test_a_hook_that_comes_later_runs(self) -> None:
        model = make_peft(target_modules=["q_proj"])
        mmfast.optimize(model)
        calls = []
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(
            lambda *_: calls.append(1)
        )
        logits(model)
        assert calls == [1]

    def test_an_adapted_head(self) -> None:
        model = make_peft(target_modules=["lm_head"])
        expected = model(**labelled())
        report = mmfast.optimize(model)
        assert [r.reason for r in report.left if r.op == "loss"] == ["its lm_head is a Linear"]
        output = model(**labelled())
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert output.logits is not None
