"""Times a training step of a small Llama with PEFT's LoRA, before and after `mmfast.optimize`, with its peak memory."""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mmfast
from mmfast.benchmarks import harness

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPS = ("lora", "rms_norm", "swiglu", "rope", "loss")


class Case(NamedTuple):
    """A model of `layers` × `hidden`, and a batch of which a quarter is supervised; `each_op`: alone, too."""

    batch: int
    length: int
    hidden: int
    layers: int
    dtype: torch.dtype
    each_op: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{self.length} tokens {self.layers}x{self.hidden} {kind}"

    def model(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            use_cache=False,
            pad_token_id=0,
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, init_lora_weights=False)
        return get_peft_model(LlamaForCausalLM(config).to(device, self.dtype), lora).train()

    def tokens(self, device: str) -> dict[str, Tensor]:
        ids = torch.randint(3, 32000, (self.batch, self.length), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : self.length - self.length // 4] = -100
        return {"input_ids": ids.to(device), "labels": labels.to(device)}


DTYPES = (torch.float32, torch.bfloat16)
CPU = [
    *(Case(1, 512, 512, 4, dtype, each_op=True) for dtype in DTYPES),
    *(Case(1, 512, 1024, 2, dtype) for dtype in DTYPES),
    *(Case(1, 32, 256, 4, dtype, each_op=True) for dtype in DTYPES),
]
CUDA = [
    *(Case(4, 2048, 2048, 8, dtype, each_op=True) for dtype in DTYPES),
    Case(1, 512, 1024, 8, torch.bfloat16),
    Case(1, 32, 1024, 8, torch.bfloat16),
]


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of one forward and backward; the gradients stay in .grad."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def gradient(model: nn.Module) -> list[Tensor]:
    return [torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def rows_of(case: Case, settings: harness.Settings) -> list[harness.Row]:
    model, batch = case.model(settings.device), case.tokens(settings.device)
    models = {"eager": model, "mmfast": copy.deepcopy(model)}
    mmfast.optimize(models["mmfast"])
    for op in OPS if case.each_op else ():
        models[f"mmfast:{op}"] = copy.deepcopy(model)
        mmfast.optimize(models[f"mmfast:{op}"], ops=[op])
    step(model, batch)
    expected = gradient(model)
    for name, other in models.items():
        step(other, batch)
        harness.gate(name, gradient(other), expected, 1e-4 if case.dtype == torch.float32 else 5e-2, str(case))
    providers = {name: partial(step, other, batch) for name, other in models.items()}
    small = case.batch * case.length < 256
    timings = harness.measure(providers, settings.device, settings.rounds * (5 if small else 1), warmup=2)
    rows = []
    for name, timing in timings.items():
        models[name].zero_grad(set_to_none=True)
        peak = harness.peak_extra_bytes(providers[name], settings.device)
        about = {"case": str(case), "provider": name, "kind": harness.kind_by_name(name, "eager")}
        rows.append(about | timing | {"peak MiB": round(peak / 2**20, 1)})
    return rows


def rows(settings: harness.Settings) -> list[harness.Row]:
    cases = (CUDA if settings.device == "cuda" else CPU)[: 2 if settings.quick else None]
    return [row for case in cases for row in rows_of(case, settings)]
