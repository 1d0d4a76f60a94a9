"""VisualResampler against Qwen-VL's form, written anew with nn.MultiheadAttention; its names and invariants."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.nn import VisualResampler


def some_resampler(dtype: torch.dtype = torch.float64, **options: Any) -> VisualResampler:
    """Small, with norms that are not the identity and biases that are not zero."""
    torch.manual_seed(0)
    resampler = VisualResampler(
        **{"grid_size": 3, "hidden_size": 16, "num_heads": 2, "encoder_hidden_size": 12, **options}
    )
    with torch.no_grad():
        for name, x in resampler.named_parameters():
            if name != "pos_embed":
                x.copy_(torch.randn(x.shape) * 0.5 + name.endswith(("ln_q.weight", "ln_kv.weight")))
    return resampler.to(dtype)


class QwenResampler(nn.Module):
    """huggingface.co/Qwen/Qwen-VL, visual.py: positions one by one, and torch's attention."""

    def __init__(self, grid_size: int, embed_dim: int, num_heads: int, kv_dim: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        quarter = embed_dim // 4
        table = torch.zeros(grid_size, grid_size, embed_dim)
        for row in range(grid_size):
            for column in range(grid_size):
                for i in range(quarter):
                    omega = 1 / 10000 ** (i / quarter)
                    for half, at in enumerate((column, row)):
                        table[row, column, 2 * half * quarter + i] = math.sin(at * omega)
                        table[row, column, (2 * half + 1) * quarter + i] = math.cos(at * omega)
        self.pos_embed = nn.Parameter(table.flatten(0, 1), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(grid_size**2, embed_dim))
        self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False) if kv_dim != embed_dim else nn.Identity()
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        positions: Tensor = self.pos_embed
        if grid != (self.grid_size, self.grid_size):
            image = positions.reshape(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
            image = nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
            positions = image.permute(0, 2, 3, 1).flatten(0, 2)
        x = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        q = self.ln_q(self.query)[:, None].repeat(1, x.shape[1], 1)
        out: Tensor = self.attn(q + self.pos_embed[:, None], x + positions[:, None], x)[0]
        return out.permute(1, 0, 2)


@pytest.mark.parametrize("grid", [(3, 3), (5, 5), (2, 2), (2, 7), (1, 1)])
@pytest.mark.parametrize("kv_dim", [12, 16])
def test_is_qwens_module(grid: tuple[int, int], kv_dim: int) -> None:
    resampler = some_resampler(encoder_hidden_size=kv_dim)
    qwen = QwenResampler(3, 16, 2, kv_dim).double()
    torch.testing.assert_close(resampler.pos_embed, qwen.pos_embed, rtol=0, atol=1e-7)
    qwen.load_state_dict(resampler.state_dict())
    x = torch.randn(2, grid[0] * grid[1], kv_dim, dtype=torch.float64, requires_grad=True)
    found, wanted = resampler(x, None if grid[0] == grid[1] else grid), qwen(x, grid)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(found)
    ours = {name: p for name, p in resampler.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in qwen.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    grads = torch.autograd.grad(found, [x, *ours.values()], grad)
    for name, a, b in zip(("x", *ours), grads, torch.autograd.grad(wanted, [x, *theirs.values()], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=partial("{}: {}".format, name))


def test_default_size_and_names() -> None:
    with torch.device("meta"):
        resampler = VisualResampler(encoder_hidden_size=1664)
    shapes = {name: tuple(x.shape) for name, x in resampler.state_dict().items()}
    assert shapes == {
        "pos_embed": (256, 4096),
        "query": (256, 4096),
        "kv_proj.weight": (4096, 1664),
        "attn.in_proj_weight": (3 * 4096, 4096),
        "attn.in_proj_bias": (3 * 4096,),
        "attn.out_proj.weight": (4096, 4096),
        "attn.out_proj.bias": (4096,),
        "ln_q.weight": (4096,),
        "ln_q.bias": (4096,),
        "ln_kv.weight": (4096,),
        "ln_kv.bias": (4096,),
    }
    assert not resampler.pos_embed.requires_grad
    assert resampler.ln_q.eps == resampler.ln_kv.eps == 1e-6
    assert str(resampler).startswith("VisualResampler(\n  grid_size=16, encoder_hidden_size=1664")


def test_queries_start_small() -> None:
    query = VisualResampler(8, 64, 2).query.detach()
    assert abs(float(query.std()) - 0.02) < 0.002


def test_without_positions_order_does_not_matter() -> None:
    resampler, x = some_resampler(), torch.randn(2, 9, 12, dtype=torch.float64)
    shuffled = x[:, torch.arange(9).roll(4)]
    assert (resampler(shuffled) - resampler(x)).abs().amax() > 1e-4
    with torch.no_grad():
        resampler.pos_embed.zero_()
    torch.testing.assert_close(resampler(shuffled), resampler(x))


def test_values_have_no_positions() -> None:
    resampler = some_resampler()
    out = resampler(torch.randn(2, 1, 12, dtype=torch.float64).expand(-1, 25, -1))
    torch.testing.assert_close(out, out[:, :1].expand(-1, 9, -1))


def test_lower_precision_and_autocast() -> None:
    resampler, x = some_resampler(torch.float32), torch.randn(2, 25, 12)
    wanted = resampler.double()(x.double())
    resampler.float()
    torch.testing.assert_close(resampler(x), wanted.float(), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = resampler(x)
    half = resampler.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for found in (cast, half):
        assert (found.double() - wanted).norm() < 0.03 * wanted.norm()


def test_compiles_as_one_graph() -> None:
    resampler, x = some_resampler(torch.float32), torch.randn(2, 25, 12)
    compiled = torch.compile(resampler, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), resampler(x))


def test_errors() -> None:
    resampler, x = some_resampler(), torch.randn(2, 8, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="grid_size is 0; expected at least 1"):
        VisualResampler(0)
    with pytest.raises(ValueError, match="hidden_size is 18; expected a multiple of 4 and of num_heads = 2"):
        VisualResampler(2, 18, 2)
    with pytest.raises(ValueError, match=r"x is \[2, 8, 11\]; expected \[B, N, 12\]"):
        resampler(x[..., :11])
    with pytest.raises(ValueError, match="of 8 patches; expected a square number; give grid"):
        resampler(x)
    with pytest.raises(ValueError, match="of 8 patches; expected 3 · 3"):
        resampler(x, (3, 3))
