"""Computing layers again changes what is kept, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimized_models import CONFIGS, labelled, make, step
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mmfast
from mmfast.adapt import add_lora, recompute
from mmfast.adapt.recompute import POLICIES, parse_policies
from mmfast.benchmarks.harness import allocated_bytes

MIXED = ["mlp", "full"]


def with_lora(model: Any, dropout: float = 0.3) -> Any:
    """LoRA on what an MLP and an attention have, its B not zero; everything else is frozen."""
    model.requires_grad_(False)
    add_lora(model, ("q_proj", "gate_proj", "up_proj", "down_proj"), rank=2, alpha=4, dropout=dropout)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def seeded_step(model: nn.Module, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        output, gradients = step(model, labelled())
    return output.loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_equal(model: nn.Module, run: Callable[[], tuple[Tensor, dict[str, Tensor]]]) -> None:
    recompute(model, "none")
    loss, gradients = run()
    for policies in (*POLICIES, MIXED):
        recompute(model, policies)
        found_loss, found = run()
        assert torch.equal(found_loss, loss), policies
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), (policies, name)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_parameters_trained(name: str, optimized: bool) -> None:
    model = make(name).train()
    if optimized:
        mmfast.optimize(model)
    assert_equal(model, lambda: seeded_step(model))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("optimized", [False, True])
def test_lora_with_dropout(optimized: bool, autocast: bool) -> None:
    model = with_lora(make("llama"))
    if optimized:
        mmfast.optimize(model)
    assert_equal(model, lambda: seeded_step(model, autocast))


def test_peft_with_dropout() -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["gate_proj", "up_proj", "down_proj", "o_proj"]
    model = get_peft_model(make("llama"), LoraConfig(r=2, lora_dropout=0.3, target_modules=targets)).train()
    mmfast.optimize(model)
    assert_equal(model, lambda: seeded_step(model))


def test_only_down_proj_trained_in_the_first_layer() -> None:
    model = make("llama").requires_grad_(False)
    add_lora(model, ("down_proj",), rank=2, alpha=4)
    assert_equal(model.train(), lambda: seeded_step(model))


@pytest.mark.parametrize("policy", ["product", "mlp"])
def test_backward_twice_through_one_graph(policy: str) -> None:
    model = with_lora(make("llama"))
    recompute(model, policy)
    loss = model(**labelled()).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def test_each_policy_keeps_less() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = with_lora(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), dropout=0.0)
    mmfast.optimize(model)
    ids = torch.randint(0, 64, (2, 520))  # swiglu runs its kernel from 2^18 elements on
    kept = []
    for policy in ("none", "product", "mlp", "full"):
        recompute(model, policy)
        model(input_ids=ids, labels=ids)  # what is allocated once is there afterwards
        kept.append(allocated_bytes(lambda: model(input_ids=ids, labels=ids).loss)[1])
    # The product is F floats a token and layer, gate and up are two more; what LoRA keeps instead was kept before.
    matrix = 4 * 1040 * 256 * 4
    assert kept[0] - kept[1] == pytest.approx(matrix, rel=0.01)
    assert kept[1] - kept[2] == pytest.approx(2 * matrix, rel=0.01)
    # All that is left of a layer is its input, of C floats a token; then the last norm's, and the loss's gradient.
    assert kept[3] == pytest.approx((4 + 2) * 1040 * 64 * 4, rel=0.1)


def test_none_undoes_everything() -> None:
    model = with_lora(make("llama"))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    recompute(model, "mlp")
    recompute(model, "none")
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__ or "forward" in before[name], name
        assert not getattr(module, "gradient_checkpointing", False), name


def test_a_copy_and_inference() -> None:
    model = with_lora(make("llama"), dropout=0.0)
    inputs = {"input_ids": labelled()["input_ids"]}
    model.eval()
    expected = model(**inputs).logits
    recompute(model, "mlp")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model(**inputs).logits, expected)  # the copy's MLPs are its own
    model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_runs_of_policies() -> None:
    assert parse_policies("full", 3) == ["full"] * 3
    assert parse_policies("full*2, none*1", 3) == ["full", "full", "none"]
    assert parse_policies("mlp,none", 2) == ["mlp", "none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "'half' holds 'half'; none, product, mlp, full, offload are accepted"),
        ("full*x", "holds 'full\\*x'"),
        ("full*2,none*2", "is for 4 layers, but there are 3"),
        ("", "holds ''"),
    ],
)
def test_wrong_runs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policies(text, 3)


def test_wrong_calls_change_nothing() -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="the policy is 'some'"):
        recompute(model, ["full", "some"])
    with pytest.raises(ValueError, match="there are 3 policies but 2 layers"):
        recompute(model, ["full"] * 3)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with pytest.raises(ValueError, match="Linear has no decoder layers"):
        recompute(nn.Linear(2, 2), "full")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=16))
    with pytest.raises(ValueError, match=r'the policy of .*h.1 is "mlp", but its MLP cannot be computed in parts'):
        recompute(gpt2, ["full", "mlp"])
    assert not any(getattr(module, "gradient_checkpointing", False) for module in gpt2.modules())


@pytest.mark.gpu
def test_offload_on_a_gpu() -> None:
    model = with_lora(make("llama")).cuda()
    batch = {name: value.cuda() for name, value in labelled().items()}

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        output, gradients = step(model, batch)
        return output.loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}

    assert_equal(model, run)
