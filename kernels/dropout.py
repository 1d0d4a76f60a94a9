"""The dropout mask of `mmfast.ops.dropout` in Triton, for kernels that read or write a tile."""

from __future__ import annotations

import triton
import triton.language as tl


# Eight neighbouring columns share a call of Philox. What depends on the row alone or the column alone stays a vector
# until the third round, so that a tile costs five full rounds of seven.
@triton.jit
def kept(seed, threshold, o_m, first_column, BLOCK: tl.constexpr):
    """[rows, BLOCK] (bool), True where an element stays, for rows o_m (int64) and columns from `first_column`.

    Args:
        seed: what the seed tensor holds, int64.
        threshold: an element is dropped if its 16 bits are below this.
        o_m [rows, 1] (int64): rows of the whole matrix.
        first_column: a multiple of 8.
        BLOCK: a power of two, 8 at least.
    """
    group = (first_column // 8 + tl.arange(0, BLOCK // 8)).to(tl.int32)[None, :]
    low, high = o_m.to(tl.int32), (o_m >> 32).to(tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, group, low, high, tl.zeros_like(low), 7)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [rows, groups, word // 2, word % 2]
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (o_m.shape[0], BLOCK)).to(tl.int32) >= threshold
