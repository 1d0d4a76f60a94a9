"""Every block of Python that README.md and docs/ show is run, in the folder of the commands, in the order of the page.

A block sees torch, mmfast and what the blocks before it made. What it takes for granted beside that (a model, tensors
of some size) is made here, block by block.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documents import PAGES, blocks

import mmfast

LLAMA = """
from transformers import AutoModelForCausalLM
{0} = AutoModelForCausalLM.from_pretrained("path/to/vicuna-7b")
"""
LINEAR = """
x, weight, bias, scale = torch.randn(5, 64), torch.randn(32, 64), torch.randn(32), torch.randn(32)
lora_a, lora_b, scaling = torch.randn(8, 64), torch.randn(32, 8), 2.0
"""

MADE: dict[str, list[str]] = {
    "README.md": [
        LLAMA.format("hf_model")
        + LINEAR
        + "linear, hidden, head_weight = torch.nn.Linear(64, 32), torch.randn(2, 6, 64), torch.randn(100, 64)\n"
        + "labels = torch.randint(100, (2, 6))"
    ],
    "docs/adapters.md": [
        LLAMA.format("model") + LLAMA.format("base"),
        """
from mmfast.adapt import add_prompts, load_prompts
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
model, base = (LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=32, **sizes)) for _ in range(2))
gates = {f"layers.{i}.attention.gate": torch.randn(1, 4, 1, 1) for i in range(2, 32)}
torch.save({"adapter_query.weight": torch.randn(300, 32), **gates}, "llama_adapter.pth")
""",
    ],
    "docs/data.md": [
        'from datasets import Dataset, Image\npaths, captions = ["cat.jpg", "dog.jpg"], ["a cat", "a dog"]'
    ],
    "docs/systems/high_resolution.md": [
        """
from mmfast.data import pinpoints_up_to
from mmfast.models import Llava
llm, encoder = "path/to/vicuna-7b", "path/to/clip-vit-l-14-336"
Llava.from_parts(llm, encoder, image_grid_pinpoints=pinpoints_up_to(2, 32)).save_pretrained("llava-v1.6-vicuna-7b-hf")
"""
    ],
    "docs/optimize.md": [
        LLAMA.format("model")
        + """
from types import SimpleNamespace
words = torch.randint(4, 500, (2, 8))
trainer = SimpleNamespace(train=lambda: model(words, labels=words).loss.backward())
"""
    ],
    "docs/quantization.md": [LLAMA.format("model")],
    "docs/ops/bias_scale_linear.md": [
        LINEAR + "weight, bias, scale = torch.randn(64, 64), torch.randn(64), torch.randn(64)"
    ],
    "docs/ops/gated_cross_attention.md": [
        """
query, key, value = (torch.randn(2, 4, length, 16) for length in (6, 128, 128))
image_id = 7
input_ids = torch.tensor([[7, 1, 2, 7, 3, 4]] * 2)
x, media = torch.randn(2, 6, 4096), torch.randn(2, 2, 64, 1024)
"""
    ],
    "docs/ops/gated_residual.md": ["x, y, gate = torch.randn(2, 8), torch.randn(2, 8), torch.zeros(())"],
    "docs/ops/int8.md": [LINEAR],
    "docs/ops/linear_cross_entropy.md": [
        "hidden, lm_head = torch.randn(2, 6, 64), torch.nn.Linear(64, 100)\nlabels = torch.randint(100, (2, 6))"
    ],
    "docs/ops/lora_linear.md": [
        LINEAR
        + """
weights, lora_as, lora_bs, scalings = [weight] * 3, [lora_a] * 3, [lora_b] * 3, [scaling] * 3
a1, a2, b1, b2, linear = lora_a, lora_a, lora_b, lora_b, torch.nn.Linear(64, 32)
"""
    ],
    "docs/ops/mixture_adapter.md": [
        """
x, router = torch.randn(2, 5, 32), torch.softmax(torch.randn(2, 2), 1)
down_weight, down_bias = torch.randn(8, 32), torch.randn(8)
up_weight, up_bias = torch.randn(2, 32, 4), torch.randn(2, 32)
"""
    ],
    "docs/ops/nf4.md": [LINEAR],
    "docs/ops/resampler_attention.md": [
        """
query, latent_key, latent_value = (torch.randn(2, 4, 8, 16) for _ in range(3))
media_key, media_value, media_mask = torch.randn(2, 4, 20, 16), torch.randn(2, 4, 20, 16), torch.rand(2, 20) < 0.5
media, frame_mask = torch.randn(1, 1, 2, 4, 1024), torch.ones(1, 1, 2, dtype=bool)
"""
    ],
    "docs/ops/rms_norm.md": [
        LLAMA.format("model")
        + "model, eps = model.model, 1e-6\nx, residual, weight = *torch.randn(2, 3, 64), torch.ones(64)"
    ],
    "docs/ops/rope.md": [
        "q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)\ncos, sin = torch.randn(2, 1, 6, 16)"
    ],
    "docs/ops/spatio_temporal_pool.md": ["features, mask = torch.randn(2, 8, 16, 32), torch.ones(2, 8, dtype=bool)"],
    "docs/ops/swiglu.md": ["x, gate_up_proj = torch.randn(3, 16), torch.nn.Linear(16, 64)"],
    "docs/ops/zero_init_attention.md": [
        """
query, key, value = torch.randn(1, 32, 6, 128), torch.randn(1, 8, 6, 128), torch.randn(1, 8, 6, 128)
prompt_key, prompt_value, gate = torch.randn(8, 10, 128), torch.randn(8, 10, 128), torch.zeros(1, 32, 1, 1)
attention = torch.nn.Module()
attention.k_proj, attention.v_proj = torch.nn.Linear(4096, 1024), torch.nn.Linear(4096, 1024)
"""
    ],
}
# Runs that blocks open.
RUNS = ["runs/a", "runs/mine"]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_blocks_run(page: str, scratch: Path, make_run: Callable[[str], Path]) -> None:
    for run in RUNS:
        shutil.copytree(make_run("llava-world"), scratch / run)
    names = {"torch": torch, "mmfast": mmfast}
    made = MADE.get(page, [])
    for index, block in enumerate(blocks(page, "python")):
        if index < len(made):
            exec(compile(made[index], f"made for {block.place}", "exec"), names)
        # Lines are counted as in the page, so that a traceback points there.
        exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)


def test_nothing_is_made_for_pages_without_code() -> None:
    assert [page for page, made in MADE.items() if len(made) > len(blocks(page, "python"))] == []
