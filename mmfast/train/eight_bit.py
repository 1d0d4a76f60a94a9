"""AdamW whose moments take 8 bits each, by bitsandbytes; imported only where it is asked for."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes
import torch
from torch.optim.adamw import adamw

__all__ = ["AdamW8bit"]


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW of blocks of 256 elements in 8 bits; tensors below 4096 elements are torch's AdamW, fused.

    bitsandbytes gives the small ones 32 bits too, but on a CPU compiles a function for them, anew in every process.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861).
    """

    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Zeros, in 8 bits or as torch's AdamW."""
        if not self._is_small(p):
            super().init_state(group, p, gindex, pindex)
            return
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        self.state[p].update(step=torch.zeros((), device=p.device), **moments)

    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """One step of one tensor."""
        if not self._is_small(p):
            super().update_step(group, p, gindex, pindex)
            return
        state, (beta1, beta2) = self.state[p], group["betas"]
        adamw(
            [p],
            [cast(torch.Tensor, p.grad)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _is_small(self, p: torch.Tensor) -> bool:
        return p.numel() < cast(Any, self.args).min_8bit_size
