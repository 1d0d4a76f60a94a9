"""Nothing but the instance changes, and the instance changes back; copies, pickles and folders."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from optimized_models import labelled, make, step, tokens
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava
from transformers.models.mistral import modeling_mistral

import mmfast
from mmfast.adapt.optimize.walk import OPS


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def test_restore_gives_the_very_classes_back() -> None:
    model = make()
    before, expected = classes(model), logits(model)
    report = mmfast.optimize(model)
    assert sum(type(module) is not before[name] for name, module in model.named_modules()) == len(report.replaced) == 12
    report.restore()
    assert classes(model) == before
    assert torch.equal(logits(model), expected)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_restore_twice_touches_no_later_report() -> None:
    model = make()
    first = mmfast.optimize(model)
    first.restore()
    second = mmfast.optimize(model)
    optimised = classes(model)
    first.restore()
    assert classes(model) == optimised
    second.restore()


def test_with_statement() -> None:
    model = make()
    before = classes(model)
    with mmfast.optimize(model) as report:
        assert report.replaced
        assert classes(model) != before
    assert classes(model) == before


def test_twice_is_harmless() -> None:
    model = make()
    before = classes(model)
    report = mmfast.optimize(model)
    optimised = classes(model)
    again = mmfast.optimize(model)
    assert again.replaced == []
    assert {record.reason for record in again.left} == {"it is optimised already"}
    again.restore()
    assert classes(model) == optimised
    report.restore()
    assert classes(model) == before


def test_ops_one_after_the_other() -> None:
    model, batch = make(), labelled()
    before = classes(model)
    expected, _ = step(model, batch)
    reports = [mmfast.optimize(model, ops=[op]) for op in OPS]
    assert sum(len(report.replaced) for report in reports) == 12
    output, _ = step(model, batch)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    reports[1].restore()
    assert torch.isfinite(logits(model)).all()
    for report in reports:
        report.restore()
    assert classes(model) == before


def test_restore_after_modules_came_and_went() -> None:
    model = make()
    report = mmfast.optimize(model)
    gone = weakref.ref(model.model.layers[0])
    del model.model.layers[0]
    gc.collect()
    assert gone() is None, "the report must not keep a removed layer"
    taken = model.model.layers[0].mlp
    model.model.layers[0].mlp = nn.Identity()
    model.extra = nn.Linear(2, 2)
    report.restore()
    assert not any(mmfast.adapt.optimize.__module__ in str(cls) for cls in classes(model).values())
    assert type(model) is LlamaForCausalLM
    assert type(taken) is modeling_llama.LlamaMLP


def test_a_class_that_was_derived_since_is_named() -> None:
    model = make()
    report = mmfast.optimize(model)
    norm = model.model.norm
    norm.__class__ = type("FSDPLlamaRMSNorm", (type(norm),), {})
    with pytest.warns(UserWarning, match=r"restore: model.norm got another class"):
        report.restore()
    assert type(model) is LlamaForCausalLM


def test_nothing_of_transformers_changes() -> None:
    modules = (modeling_llama, modeling_mistral, modeling_llava)

    def state() -> list[Any]:
        found: list[Any] = []
        for module in modules:
            found.append(dict(vars(module)))
            found += [dict(vars(value)) for value in vars(module).values() if isinstance(value, type)]
        found += [dict(vars(cls)) for cls in (nn.Module, nn.Linear)]
        return found

    model, untouched = make(), make()
    logits(model)
    types, expected = classes(untouched), logits(untouched)
    before = state()
    mmfast.optimize(model)
    step(model, labelled())
    after = state()
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[key] is new[key] for key in old)
    assert classes(untouched) == types
    assert torch.equal(logits(untouched), expected)
    assert untouched(tokens(), labels=tokens()).logits is not None
    # A model made from now on is a plain one, too.
    assert type(make().model.norm) is modeling_llama.LlamaRMSNorm


def test_parameters_and_names_stay() -> None:
    model = make()
    parameters = dict(model.named_parameters())
    keys, text = list(model.state_dict()), repr(model)
    mmfast.optimize(model)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    model.load_state_dict(make().state_dict())


def test_hooks_run() -> None:
    model = make()
    expected = logits(model)
    seen: list[Any] = []
    norm = model.model.layers[0].post_attention_layernorm
    mmfast.optimize(model)
    for module in (norm, model.model.layers[0], model.model.layers[0].mlp, model):
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 4
    assert isinstance(seen[0], torch.Tensor), "the norm maps a tensor to a tensor for its hooks"


@pytest.mark.parametrize("before", [True, False], ids=["hooked, optimised", "optimised, hooked"])
def test_hooks_of_accelerate(before: bool) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model = make()
    expected, hook = logits(model), Counter()
    hooked = [m for m in model.modules() if type(m).__name__ in ("LlamaRMSNorm", "LlamaDecoderLayer", "LlamaMLP")]

    def add() -> None:
        for module in hooked:
            add_hook_to_module(module, hook)

    if before:
        add()
    report = mmfast.optimize(model)
    # The hook of the last layer would not run if another module stood in for it.
    assert [record.op for record in report.left] == ["loss"] * before
    if not before:
        add()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert hook.calls == 9
    report.restore()
    assert torch.equal(logits(model), expected)
    assert hook.calls == 18
    for module in hooked:
        remove_hook_from_module(module)
    mmfast.optimize(model).restore()
    assert torch.equal(logits(model), expected)


def test_offloaded_weights() -> None:
    from accelerate import cpu_offload

    model = make()
    with torch.no_grad():
        expected = model(tokens(), labels=tokens())
    cpu_offload(model, execution_device=torch.device("cpu"))
    report = mmfast.optimize(model)
    # The weight of the head is not there until the head is called.
    assert [(record.op, record.reason) for record in report.left] == [("loss", "its lm_head is a Linear with hooks")]
    with torch.no_grad():
        output = model(tokens(), labels=tokens())
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)


def round_trip(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    return pickle.loads(pickle.dumps(model, protocol=int(how)))


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "2", "5"])
def test_copies_are_optimised_and_apart(how: str) -> None:
    model = make()
    before = classes(model)
    report = mmfast.optimize(model)
    copied = round_trip(model, how)
    assert classes(copied) == classes(model)
    assert torch.equal(logits(copied), logits(model))
    assert copied(tokens(), labels=tokens()).logits is None
    expected = logits(model)
    copied.model.norm.weight.data.zero_()
    assert torch.equal(logits(model), expected)
    # The report is of the first model; the copy has a way back of its own.
    report.restore()
    assert classes(copied) != before
    assert len(mmfast.adapt.restore(copied)) == 12
    assert classes(copied) == before
    assert mmfast.adapt.restore(copied) == []


def test_a_pickle_of_a_class_that_is_known_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mmfast.adapt.optimize.classes")

    model = make()
    before, expected = classes(model), logits(model)
    mmfast.optimize(model)
    pickled = pickle.dumps(model)
    monkeypatch.setattr(module, "BY_NAME", {})
    loaded = pickle.loads(pickled)
    assert classes(loaded) == before
    assert torch.equal(logits(loaded), expected)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "before")
    expected = logits(model)
    mmfast.optimize(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "after")
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded), expected)


def test_a_model_goes_when_only_its_report_is_left() -> None:
    model = make()
    report = mmfast.optimize(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    report.restore()


class TestReport:
    """What a user reads."""

    def test_text(self) -> None:
        model = make(hidden_act="gelu")
        report = mmfast.optimize(model)
        assert str(report) == (
            "mmfast.optimize on LlamaForCausalLM, ops lora, rms_norm, swiglu, rope, loss:\n"
            "  lora: no layer that it could serve\n"
            "  rms_norm: replaced 5 LlamaRMSNorm, 2 LlamaDecoderLayer\n"
            "  swiglu: left 2 LlamaMLP (model.layers.0.mlp, model.layers.1.mlp): "
            "its activation is GELUActivation, not SiLU\n"
            "  rope: replaced 2 LlamaAttention\n"
            "  loss: replaced 1 LlamaForCausalLM"
        )
        report.restore()
        assert str(report).startswith(
            "mmfast.optimize on LlamaForCausalLM, ops lora, rms_norm, swiglu, rope, loss: rest"
        )
        assert report.restored

    def test_records(self) -> None:
        report = mmfast.optimize(make(num_hidden_layers=1), ops={"rope", "loss"})
        assert report.ops == ("rope", "loss")
        assert report.replaced == [
            ("model.layers.0.self_attn", "rope", "LlamaAttention"),
            ("", "loss", "LlamaForCausalLM"),
        ]

    def test_many_names_are_counted(self) -> None:
        report = mmfast.optimize(make(num_hidden_layers=4, hidden_act="gelu"), ops=["swiglu"])
        assert "left 4 LlamaMLP (model.layers.0.mlp, model.layers.1.mlp and 2 more): " in str(report)
