"""The calls by which `mmfast bench crossover` finds from which size a backend is faster: a row for each key of a table.

A ladder makes, for a size as the op counts it (see `mmfast.ops.backends.Size`), a call of that size in a shape that
the models have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import products
from mmfast.ops.resampler_attention import only_reference_has_matrix

Arguments = tuple[Any, ...]

HALVES = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Ladder:
    """The calls for one key.

    Attributes:
        op, key: as tables name them.
        first, last: the sizes run from 2 to the power of `first` to that of `last`.
        call: (size, dtype, device) to the arguments of the op.
        dtypes: of which each is measured; the crossover is that of the slowest.
        trained: whether gradients are asked for; each is measured.
        train: places of the arguments that want one then.
        fits: whether the op counts calls like this (dtype, trained, device) under the key.
    """

    op: str
    key: str
    first: int
    last: int
    call: Callable[[int, torch.dtype, str], Arguments]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    trained: tuple[bool, ...] = (False,)
    train: tuple[int, ...] = (0,)
    fits: Callable[[torch.dtype, bool, str], bool] = lambda dtype, trained, device: True

    @property
    def sizes(self) -> list[int]:
        return [2**exponent for exponent in range(self.first, self.last + 1)]

    def variants(self, device: str) -> list[tuple[torch.dtype, bool]]:
        """What is measured on this device: dtypes, with gradients or without."""
        pairs = itertools.product(self.dtypes, self.trained)
        return [(dtype, trained) for dtype, trained in pairs if self.fits(dtype, trained, device)]


def _some(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _slow(dtype: torch.dtype, trained: bool, device: str) -> bool:
    return device == "cpu" and products.is_slow(dtype, 1024, grad=trained)


def _fast(dtype: torch.dtype, trained: bool, device: str) -> bool:
    return not _slow(dtype, trained, device)


def _calls_sgemm(dtype: torch.dtype, trained: bool, device: str) -> bool:
    return device == "cpu" and products.calls_sgemm()


def _in_tiles(dtype: torch.dtype, trained: bool, device: str) -> bool:
    return products.tiles_f32(products.TILED_F32_ROWS, device)


def _no_matrix(dtype: torch.dtype, trained: bool, device: str) -> bool:
    return not only_reference_has_matrix(dtype, trained, device)


def _swiglu(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return tuple(_some(size // 1024, 1024, dtype=dtype, device=device) for _ in range(2))


def _halves(size: int, dtype: torch.dtype, device: str) -> Arguments:
    """As of a fused projection."""
    return _some(size // 1024, 2048, dtype=dtype, device=device).chunk(2, 1)


def _rope(size: int, dtype: torch.dtype, device: str) -> Arguments:
    length = size // 1024
    q, k = (_some(1, length, 8, 64, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    return q, k, *(_some(1, length, 64, dtype=dtype, device=device) for _ in range(2))


def _gated_residual(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return *_swiglu(size, dtype, device), torch.full((1,), 0.5, device=device)


def _gated_halves(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return *_halves(size, dtype, device), torch.full((1,), 0.5, device=device)


def _mixture_adapter(size: int, dtype: torch.dtype, device: str) -> Arguments:
    x = _some(1, size // 1024, 1024, dtype=dtype, device=device)
    shapes = (8, 1024), (8,), (2, 1024, 4), (2, 1024), (1, 2)
    return x, *(_some(*shape, dtype=torch.float32, device=device) for shape in shapes)


def _lora_linear(rows: int, columns: int, features: int, dtype: torch.dtype, device: str, ranks: int = 8) -> Arguments:
    shapes = (rows, features), (columns, features), (ranks, features), (columns, ranks)
    return *(_some(*shape, dtype=dtype, device=device) for shape in shapes), 2.0


def _packed_lora(rows: int, dtype: torch.dtype, device: str) -> Arguments:
    return _lora_linear(rows, 1024, 512, dtype, device)


def _long_lora(rows: int, dtype: torch.dtype, device: str) -> Arguments:
    return _unpacked(_packed_lora(rows, dtype, device))


def _wide_lora(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _unpacked(_lora_linear(1024, size // 1024, 256, dtype, device))


def _unpacked(arguments: Arguments) -> Arguments:
    """The same with the first tensor as a part of a larger one."""
    x, *rest = arguments
    return torch.cat([x, x], -1)[..., : x.shape[-1]], *rest


def _ranked_lora(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _lora_linear(64, 1024, 512, dtype, device, 64 // size)


def _tiled_lora(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _lora_linear(256, 1024, 1024, dtype, device, 256 // size)


def _narrow_lora(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _lora_linear(128, size // (128 * 256), 256, dtype, device, 4)


def _shared_lora(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _lora_linear(512, 256, 256, dtype, device, 128 // size)


def _lora_product(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _lora_linear(size // (256 * 64), 256, 64, dtype, device)


def _bias_scale_linear(
    rows: int, columns: int, features: int, scale_on: str, dtype: torch.dtype, device: str
) -> Arguments:
    scaled = features if scale_on == "input" else columns
    scale = None if scale_on == "none" else _some(scaled, dtype=torch.float32, device=device)
    x, weight = _some(rows, features, dtype=dtype, device=device), _some(columns, features, dtype=dtype, device=device)
    return x, weight, _some(columns, dtype=torch.float32, device=device), scale, scale_on


def _scaled_output(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _bias_scale_linear(size // 1024, 1024, 64, "output", dtype, device)


def _scaled_input(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _bias_scale_linear(size // 1024, 64, 1024, "input", dtype, device)


def _biased(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _bias_scale_linear(size // 1024, 1024, 64, "none", dtype, device)


def _scaled_product(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _bias_scale_linear(size // (256 * 64), 256, 64, "output", dtype, device)


def _tiled_product(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _bias_scale_linear(256, size // (256 * 512), 512, "none", dtype, device)


def _linear_cross_entropy(size: int, dtype: torch.dtype, device: str) -> Arguments:
    rows = size // (128 * 2048)
    hidden, weight = (_some(n, 128, dtype=dtype, device=device) for n in (rows, 2048))
    labels = torch.randint(2048, (rows,), device=device)
    return hidden, weight, torch.where(torch.arange(rows, device=device) % 7 == 0, labels, -100)  # 15 % labelled


def _spatio_temporal_pool(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return (_some(1, 8, size // 1024, 128, dtype=dtype, device=device),)


def _one_text(size: int, dtype: torch.dtype, device: str) -> Arguments:
    return _zero_init_attention(1, 2, size // 128, 64, dtype, device)


def _decoding(batch: int, dtype: torch.dtype, device: str) -> Arguments:
    return _zero_init_attention(batch, 32, 1, 128, dtype, device)


def _zero_init_attention(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, device: str) -> Arguments:
    query = _some(batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    prompts = (_some(heads, 10, dim, dtype=dtype, device=device) for _ in range(2))
    # The words' part is given: it is the same on every backend.
    return query, query, query, *prompts, torch.full((1,), 0.5, device=device), None, False, None, "tanh", query


def _resampler_attention(size: int, dtype: torch.dtype, device: str) -> Arguments:
    queries = 32 if size < 2**27 else 512
    lengths = queries, size // (8 * queries * 64), size // (8 * queries * 64)
    return tuple(_some(1, n, 8, 64, dtype=dtype, device=device).transpose(1, 2) for n in lengths)


FLOATS = torch.float32, torch.bfloat16
YES, BOTH = (True,), (False, True)

LADDERS = (
    Ladder("swiglu", "packed forward", 10, 21, _swiglu, FLOATS),
    Ladder("swiglu", "packed backward", 10, 21, _swiglu, FLOATS, YES, (0, 1)),
    Ladder("swiglu", "forward", 12, 21, _halves, FLOATS),
    Ladder("swiglu", "backward", 13, 21, _halves, FLOATS, YES, (0, 1)),
    Ladder("rope", "float16 forward", 12, 24, _rope, (torch.float16,)),
    Ladder("rope", "float16 backward", 12, 22, _rope, (torch.float16,), YES, (0, 1)),
    Ladder("gated_residual", "packed forward", 10, 22, _gated_residual, FLOATS),
    Ladder("gated_residual", "packed backward", 10, 22, _gated_residual, FLOATS, YES, (0, 1, 2)),
    Ladder("gated_residual", "float32", 12, 22, _gated_halves, (torch.float32,), BOTH, (0, 1, 2)),
    Ladder("gated_residual", "float16", 12, 22, _gated_halves, (torch.float16,), BOTH, (0, 1, 2)),
    Ladder("gated_residual", "bfloat16", 12, 22, _gated_halves, (torch.bfloat16,), BOTH, (0, 1, 2)),
    Ladder("mixture_adapter", "32-bit forward", 13, 21, _mixture_adapter),
    Ladder("mixture_adapter", "32-bit backward", 13, 21, _mixture_adapter, (torch.float32,), YES, (0, 1, 2, 3, 4, 5)),
    Ladder("mixture_adapter", "16-bit forward", 13, 20, _mixture_adapter, HALVES),
    Ladder("mixture_adapter", "16-bit backward", 13, 20, _mixture_adapter, HALVES, YES, (0, 1, 2, 3, 4, 5)),
    Ladder("lora_linear", "packed rows", 4, 10, _packed_lora, trained=BOTH, train=(0, 2, 3), fits=_calls_sgemm),
    Ladder("lora_linear", "packed rows per rank", 0, 5, _ranked_lora, trained=BOTH, train=(0, 2, 3), fits=_calls_sgemm),
    Ladder("lora_linear", "tiled rows per rank", 0, 5, _tiled_lora, trained=BOTH, train=(0, 2, 3), fits=_in_tiles),
    Ladder("lora_linear", "packed work", 21, 27, _narrow_lora, trained=BOTH, train=(0, 2, 3), fits=_calls_sgemm),
    Ladder("lora_linear", "packed share", 0, 5, _shared_lora, trained=BOTH, train=(0, 2, 3), fits=_calls_sgemm),
    Ladder("lora_linear", "rows", 6, 11, _long_lora, FLOATS, BOTH, (0, 2, 3), _fast),
    Ladder("lora_linear", "forward", 15, 22, _wide_lora, FLOATS, fits=_fast),
    Ladder("lora_linear", "backward", 15, 22, _wide_lora, FLOATS, YES, (0, 2, 3), _fast),
    Ladder("lora_linear", "16-bit product", 18, 24, _lora_product, HALVES, BOTH, (0, 2, 3), _slow),
    # In float32 the kernel runs at every size.
    Ladder("bias_scale_linear", "output", 15, 22, _scaled_output, (torch.bfloat16,), BOTH, (0, 2, 3), _fast),
    # Without a gradient there is nothing to gain.
    Ladder("bias_scale_linear", "input", 15, 22, _scaled_input, FLOATS, YES, (0, 2, 3), _fast),
    # Beside a bias in float32, as training keeps it.
    Ladder("bias_scale_linear", "none", 15, 22, _biased, (torch.bfloat16,), BOTH, (0, 2), _fast),
    Ladder("bias_scale_linear", "16-bit product", 18, 24, _scaled_product, HALVES, BOTH, (0, 2, 3), _slow),
    Ladder("bias_scale_linear", "32-bit product", 23, 29, _tiled_product, trained=BOTH, train=(0, 2), fits=_in_tiles),
    Ladder("linear_cross_entropy", "work", 20, 28, _linear_cross_entropy, FLOATS, YES),
    Ladder("spatio_temporal_pool", "float32 backward", 13, 21, _spatio_temporal_pool, trained=YES),
    Ladder("zero_init_attention", "elements", 11, 18, _one_text, FLOATS, BOTH, (0, 3, 4, 5)),
    Ladder("zero_init_attention", "rows", 1, 7, _decoding, FLOATS, BOTH, (0, 3, 4, 5)),
    Ladder("resampler_attention", "float32", 19, 26, _resampler_attention, trained=BOTH, train=(0, 1, 2)),
    Ladder("resampler_attention", "16-bit forward", 17, 24, _resampler_attention, HALVES, fits=_no_matrix),
    Ladder("resampler_attention", "16-bit backward", 15, 22, _resampler_attention, HALVES, YES, (0, 1, 2)),
    Ladder(
        "resampler_attention",
        "16-bit matrix forward",
        20,
        27,
        _resampler_attention,
        HALVES,
        fits=only_reference_has_matrix,
    ),
)
