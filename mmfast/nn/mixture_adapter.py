"""LaVIN's mixture-of-modality adapter as a module: experts weighted by a router that looks at the first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.nn.adapted_linear import MergeDrift
from mmfast.nn.adapter import check_options
from mmfast.ops.mixture_adapter import mixture_adapter

__all__ = ["MixtureAdapter"]

# What a published checkpoint calls the up-projections of the two experts, and a module's tensors.
_LAVIN_EXPERTS = ("conv_B", "conv_D")
_PARTS = ("weight", "bias")


class _Kept(NamedTuple):
    """The router's weights [B, K] of a prefill, and what its parameters were then."""

    weights: Tensor
    parameters: tuple[object, ...]


class MixtureAdapter(nn.Module):
    """y = x + scale · Σ_k w_k · Up_k(drop(act(Down x))), w = softmax(E x[:, 0] / temperature), in one pass over x.

    Parameters are `down_weight` [R, H] and `down_bias`, which the experts share, `up_weight` [K, H, R / groups] and
    `up_bias` [K, H], `router_weight` E [K, H] and `router_bias`, with H = hidden_size, R = bottleneck_size and K =
    num_experts. The up-projections are grouped as convolutions are: H / groups output channels see R / groups ranks.
    They start at zero: a fresh adapter is the identity. The output has the input's dtype, under autocast too; the
    arithmetic is float32.

    While decoding, the first token of an input is no longer the one that tells the modality. After `cache_router()`,
    the first call (the prefill) keeps its weights and later calls take them, until `cache_router(False)`. They are in
    no state dict, `train()` drops them, and a call that finds the router's parameters changed is an error.

    LaVIN's CLIP routes every token of all images by the same token of the first image: `router_input` of
    `x[:1].expand_as(x)` is that. Its language model routes each sample by its modality token, the first one.

    Source: Luo et al., "Cheap and Quick" (arXiv 2305.15023), equations 3 to 7; luogen1996/LaVIN,
    lavin/mm_adapter.py:10-51.

    Args:
        hidden_size: Size H of the last dimension of input and output.
        bottleneck_size: Size R between the projections; groups divides it. LaVIN has 8.
        num_experts: How many up-projections there are, 1 or more.
        groups: Of the up-projections; it divides both sizes.
        dropout: Probability in [0, 1) of dropping an element between the projections while training.
        scale: The factor on the update.
        temperature: Divides the router's logits, above 0; LaVIN has 10 (7B) and 5 (13B).
        activation: "identity" (LaVIN), "relu", "gelu" (by the error function) or "silu".
        device: Device of all parameters.
        dtype: Dtype of all parameters; default float32, whatever the dtype of the model around them.

    Raises:
        ValueError: If an option is outside its range.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 8,
        num_experts: int = 2,
        groups: int = 2,
        dropout: float = 0.1,
        scale: float = 1.0,
        temperature: float = 10.0,
        activation: str = "identity",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options("MixtureAdapter", hidden_size, bottleneck_size, activation, dropout)
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(f"MixtureAdapter: num_experts is {num_experts!r}; a whole number of 1 or more is accepted")
        if not isinstance(groups, int) or groups < 1 or hidden_size % groups or bottleneck_size % groups:
            raise ValueError(
                f"MixtureAdapter: groups is {groups!r}; a whole number of 1 or more that divides hidden_size "
                f"{hidden_size} and bottleneck_size {bottleneck_size} is accepted"
            )
        if not temperature > 0:
            raise ValueError(f"MixtureAdapter: temperature is {temperature!r}; a number above 0 is accepted")
        super().__init__()
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.num_experts, self.groups, self.activation = num_experts, groups, activation
        self.dropout, self.scale, self.temperature = float(dropout), float(scale), float(temperature)
        self._caching = False
        self._kept: _Kept | None = None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype or torch.float32))

        self.down_weight = parameter(bottleneck_size, hidden_size)
        self.down_bias = parameter(bottleneck_size)
        self.up_weight = parameter(num_experts, hidden_size, bottleneck_size // groups)
        self.up_bias = parameter(num_experts, hidden_size)
        self.router_weight = parameter(num_experts, hidden_size)
        self.router_bias = parameter(num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As LaVIN: `down_weight` xavier-uniform, the router as `nn.Linear` draws it, zero for the rest."""
        nn.init.xavier_uniform_(self.down_weight)
        for zero in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.router_weight, -bound, bound)
        nn.init.uniform_(self.router_bias, -bound, bound)

    def forward(self, x: Tensor, router_input: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Maps [B, T, hidden_size] (or [B, hidden_size], one token) to the same shape and dtype.

        Args:
            x: The input.
            router_input: [B, hidden_size], what the router looks at instead of x[:, 0]; or the shape of x, for weights
                of each token.
            weights: [B, num_experts], or [B, T, num_experts] for each token: what `route` gave, instead of asking the
                router.

        Raises:
            ValueError: If x has another number of dimensions, or cached weights are those of another batch size.
            RuntimeError: If the router's parameters changed after its weights were cached.
        """
        if x.dim() not in (2, 3):
            raise ValueError(
                f"MixtureAdapter: x is {list(x.shape)}; [B, T, {self.hidden_size}] or "
                f"[B, {self.hidden_size}] is accepted"
            )
        return mixture_adapter(
            x,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            self._weights(x, router_input) if weights is None else weights,
            self.scale,
            self.dropout if self.training else 0.0,
            self.activation,
        )

    def route(self, router_input: Tensor) -> Tensor:
        """The experts' weights [..., num_experts] for inputs [..., hidden_size]; they sum to 1."""
        logits = F.linear(router_input.to(self.router_weight.dtype), self.router_weight, self.router_bias)
        return torch.softmax(logits / self.temperature, -1)

    def cache_router(self, enabled: bool = True) -> None:
        """Forgets cached weights; if enabled, the next call caches its own, without a gradient, for those after it.

        Raises:
            RuntimeError: If the module is training.
        """
        if enabled and self.training:
            raise RuntimeError("MixtureAdapter.cache_router: the module is training; call eval() first")
        self._caching, self._kept = enabled, None

    def train(self, mode: bool = True) -> MixtureAdapter:
        """As `nn.Module.train`; training ends the caching of the router's weights."""
        if mode:
            self.cache_router(False)
        return super().train(mode)

    def _weights(self, x: Tensor, router_input: Tensor | None) -> Tensor:
        if self._kept is None:
            if router_input is None:
                router_input = x if x.dim() == 2 else x[:, 0]
            weights = self.route(router_input)
            if self._caching:
                self._kept = _Kept(weights.detach(), self._router_state())
            return weights
        if self._kept.parameters != self._router_state():
            raise RuntimeError(
                "MixtureAdapter: the router's parameters changed after its weights were cached; cached weights are "
                "accepted as long as they stay; call cache_router() and run the prefill again"
            )
        weights = self._kept.weights
        if weights.shape[0] != x.shape[0]:
            raise ValueError(
                f"MixtureAdapter: x has {x.shape[0]} samples but the cached router weights are those of "
                f"{weights.shape[0]}; the batch of the prefill is accepted; call cache_router() before another one"
            )
        return weights

    def _router_state(self) -> tuple[object, ...]:
        """Changes with every change of the router's parameters, in place or by another tensor."""
        return tuple(
            part
            for p in (self.router_weight, self.router_bias)
            for part in (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version)
        )

    # ---- folding

    @torch.no_grad()
    def fold_into(self, linear: nn.Linear, weights: Tensor) -> tuple[nn.Linear, MergeDrift]:
        """linear(adapter(x)) as one plain linear, for inputs whose router gives these weights: W (I + scale · M A).

        Summed in float64, rounded once to the dtype of the linear's parameters.

        Args:
            linear: An `nn.Linear` of hidden_size inputs; it stays as it is.
            weights: [num_experts], of one modality.

        Returns:
            A new `nn.Linear` (with a bias), and how far the rounding took its weight from the exact one, as
            `LoRALinear.merge` measures it.

        Raises:
            RuntimeError: If the adapter is not linear: its activation is not "identity", or it is training.
            TypeError: If `linear` is anything but an `nn.Linear`.
            ValueError: If a size does not fit.
        """
        if self.activation != "identity" or self.training:
            why = "training" if self.training else f"of activation {self.activation!r}"
            raise RuntimeError(f"MixtureAdapter.fold_into: the adapter is {why}; a linear one in eval() is accepted")
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"MixtureAdapter.fold_into: the layer is a {type(linear).__name__}; a torch.nn.Linear is accepted; "
                "merge or dequantise it first"
            )
        if linear.in_features != self.hidden_size or weights.shape != (self.num_experts,):
            raise ValueError(
                f"MixtureAdapter.fold_into: the layer takes {linear.in_features} features and weights is "
                f"{list(weights.shape)}; {self.hidden_size} and [{self.num_experts}] are accepted"
            )
        down, base, weights = self.down_weight.double(), linear.weight.double(), weights.double()
        up = self.scale * torch.einsum("k,kgor->gor", weights, self.up_weight.double().unflatten(1, (self.groups, -1)))
        up = torch.block_diag(*up)  # M [H, R]
        offset = up @ self.down_bias.double() + self.scale * (weights @ self.up_bias.double())
        exact = base + (base @ up) @ down
        folded = nn.Linear(linear.in_features, linear.out_features, device="meta").train(linear.training)
        weight, trained = exact.to(linear.weight.dtype), linear.weight.requires_grad
        bias = base @ offset if linear.bias is None else base @ offset + linear.bias.double()
        folded.weight = nn.Parameter(weight, requires_grad=trained)
        folded.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=trained)
        return folded, self._drift(base, exact, weight, up, down)

    def _drift(self, base: Tensor, exact: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> MergeDrift:
        error, change = exact - weight.double(), exact - base
        # (I + M A)⁻¹ = I - M (I + A M)⁻¹ A, where that exists.
        inner, info = torch.linalg.inv_ex(torch.eye(down.shape[0], dtype=down.dtype, device=down.device) + down @ up)
        unmerged = float("nan")
        if info.item() == 0:
            back = weight.double() - weight.double() @ up @ inner @ down
            unmerged = (back.to(weight.dtype).double() - base).abs().max().item()
        relative = (error.norm() / change.norm()).item() if change.any() else 0.0
        return MergeDrift(error.abs().max().item(), relative, unmerged)

    # ---- published checkpoints

    @classmethod
    def from_lavin(
        cls, state: Mapping[str, Tensor], *, dropout: float = 0.1, scale: float = 1.0, temperature: float = 10.0
    ) -> MixtureAdapter:
        """The adapter of a published LaVIN checkpoint, with its tensors' sizes and dtype.

        Args:
            state: One adapter's tensors: `weight` and `bias` of `conv_A` [R, H, 1], `conv_B` and `conv_D`
                [H, R / groups, 1] and `expert_weights` [2, H].
            dropout: As in the class: a checkpoint has no options.
            scale: As in the class.
            temperature: As in the class.

        Raises:
            ValueError: If a tensor is missing, unknown, or of a shape that does not fit the others.
        """
        names = {f"{module}.{part}" for module in ("conv_A", *_LAVIN_EXPERTS, "expert_weights") for part in _PARTS}
        if state.keys() != names:
            raise ValueError(
                f"MixtureAdapter.from_lavin: missing {sorted(names - state.keys())}, unknown "
                f"{sorted(state.keys() - names)}; exactly {sorted(names)} are accepted; pass one adapter's tensors, "
                "without their prefix"
            )
        down, up = state["conv_A.weight"], state["conv_B.weight"]
        ranks, hidden_size = down.shape[:2] if down.dim() == 3 else (0, 0)
        seen = up.shape[1] if up.dim() == 3 else 0
        shapes = {
            "conv_A": ((ranks, hidden_size, 1), (ranks,)),
            **dict.fromkeys(_LAVIN_EXPERTS, ((hidden_size, seen, 1), (hidden_size,))),
            "expert_weights": ((2, hidden_size), (2,)),
        }
        for module, expected in shapes.items():
            for part, shape in zip(_PARTS, expected, strict=True):
                found = state[f"{module}.{part}"]
                if found.shape != shape or 0 in shape or ranks % seen:
                    raise ValueError(
                        f"MixtureAdapter.from_lavin: {module}.{part} is {list(found.shape)}; {list(shape)} is "
                        f"accepted, after conv_A.weight {list(down.shape)} and conv_B.weight {list(up.shape)}, whose "
                        "ranks per group divide those of conv_A"
                    )
        adapter = cls(
            hidden_size,
            ranks,
            groups=ranks // seen,
            dropout=dropout,
            scale=scale,
            temperature=temperature,
            device=down.device,
            dtype=down.dtype,
        )
        adapter.load_state_dict(
            {
                "down_weight": down[..., 0],
                "down_bias": state["conv_A.bias"],
                "up_weight": torch.stack([state[f"{module}.weight"][..., 0] for module in _LAVIN_EXPERTS]),
                "up_bias": torch.stack([state[f"{module}.bias"] for module in _LAVIN_EXPERTS]),
                "router_weight": state["expert_weights.weight"],
                "router_bias": state["expert_weights.bias"],
            }
        )
        return adapter

    def to_lavin(self) -> dict[str, Tensor]:
        """The parameters under the names and in the shapes of a published checkpoint: the inverse of `from_lavin`.

        Raises:
            ValueError: If there are not two experts, or the activation is not "identity".
        """
        if self.num_experts != 2 or self.activation != "identity":
            raise ValueError(
                f"MixtureAdapter.to_lavin: there are {self.num_experts} experts and activation is "
                f"{self.activation!r}; 2 and 'identity' are accepted"
            )
        state = {"conv_A.weight": self.down_weight.detach()[..., None], "conv_A.bias": self.down_bias.detach()}
        for module, weight, bias in zip(_LAVIN_EXPERTS, self.up_weight.detach(), self.up_bias.detach(), strict=True):
            state |= {f"{module}.weight": weight[..., None], f"{module}.bias": bias}
        router = {
            "expert_weights.weight": self.router_weight.detach(),
            "expert_weights.bias": self.router_bias.detach(),
        }
        return state | router

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.hidden_size}, {self.bottleneck_size}, num_experts={self.num_experts}, groups={self.groups}, "
            f"dropout={self.dropout:g}, scale={self.scale:g}, temperature={self.temperature:g}, "
            f"activation={self.activation!r}"
        )
