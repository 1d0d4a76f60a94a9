"""RMSNorm as a module that takes the place of a Llama model's or of PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.ops.rms_norm import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """y = weight ⊙ h / sqrt(mean(h²) + eps) over the last dimension, with h = x + residual if there is one.

    Its one parameter is `weight` [hidden_size], at first 1, as in transformers' LlamaRMSNorm and in `torch.nn.RMSNorm`.
    It rounds where LlamaRMSNorm does; `mmfast.ops.rms_norm` says what exactly.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), equation 4.

    Args:
        hidden_size: Size of the last dimension of the input.
        eps: Added to the mean of the squares.
        device: Device of `weight`.
        dtype: Dtype of `weight`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps

    @classmethod
    def from_norm(cls, module: nn.Module) -> RMSNorm:
        """Takes over the parameter of another RMSNorm: nothing is copied, `requires_grad` and the mode stay.

        Args:
            module: Any with a `weight` [hidden_size] and a number `variance_epsilon` or `eps`, which means what they
                mean here (a norm that scales with 1 + weight does not). `eps` None is, as in `torch.nn.RMSNorm`, the
                machine epsilon of the weight's dtype.

        Raises:
            TypeError: If `module` has no such weight or no epsilon, or a bias.
        """
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or getattr(module, "bias", None) is not None:
            raise TypeError(
                f"RMSNorm.from_norm: got {type(module).__name__}; a module with a parameter `weight` [hidden_size] and "
                "no bias is accepted"
            )
        for name in ("variance_epsilon", "eps"):
            if hasattr(module, name):
                eps = getattr(module, name)
                break
        else:
            raise TypeError(
                f"RMSNorm.from_norm: {type(module).__name__} has neither `variance_epsilon` nor `eps`; "
                "build an RMSNorm and set its weight"
            )
        norm = cls(0, torch.finfo(weight.dtype).eps if eps is None else float(eps), device="meta")
        norm.weight = weight
        return norm.train(module.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Maps [..., hidden_size] to the same shape; with a residual to (norm of the sum, the sum)."""
        return rms_norm(x, self.weight, self.eps, residual)

    def extra_repr(self) -> str:
        """The size and eps, as LlamaRMSNorm prints them."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
