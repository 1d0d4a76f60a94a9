"""The prompts and gates of LLaMA-Adapter for one attention layer, which stays frozen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.nn.adapted_linear import AdaptedLinear
from mmfast.nn.base_linear import BaseLinear
from mmfast.ops import zero_init_attention
from mmfast.ops.zero_init_attention import GATE_ACTIVATIONS


class _Cached(NamedTuple):
    """Keys and values of the prompts, and what they were made of: tensors (held, so that no other takes their place),
    with their addresses and versions."""

    sources: tuple[Tensor, ...]
    states: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    prompts: tuple[Tensor, Tensor]


class ZeroInitAttention(nn.Module):
    """Attention of a frozen layer plus gated attention to trained prompts: `ops.zero_init_attention` with its weights.

    The module takes the place of the product of attention inside a layer, after the rotary embedding and before the
    output projection. Its prompts live in the hidden space and pass through the layer's own projections, without norm
    and without rotary embedding. With the gates at 0, as they start, the layer gives the bits that it gave before.

    Outside of training and where no gradient is wanted, the prompts' keys and values are kept from call to call; they
    are made again when the prompts, the projections, `prompt_bias` or the dtype change, and dropped by `train()` and
    `eval()`. Projections that hold other modules, as PEFT's LoRA does, are called every time. Only writes through
    `.data`, which PyTorch does not count, go unseen: `train()` or `eval()` after those.

    Args:
        num_heads: H, of the queries.
        num_kv_heads: Hkv, of keys and values; H is a multiple of it.
        head_dim: D.
        prompt_length: P, prompts of this layer (10 in the paper).
        hidden_size: C, what the projections take; default H · D.
        gate_per_head: one gate for each head (the official code) or one for all (PEFT).
        gate_activation: "tanh" (the training code) or "identity" (the paper, the inference code, PEFT, LitGPT).
        learned: False: the layer has no prompts of its own; each sample brings its prompts, as `prompt_bias`.
        gate_scale: a trained factor on all gates, after the activation (LLaMA-Adapter V2's 7B with LoRA).
        base_projections: prompts pass through the projections without adapters of this package (V2's 7B).

    Parameters: `prompt` [P, C], from N(0, 1) as in the official code (None if not learned), `gate` [H] or [1], zeros,
    and `gate_scale` [1], one (None without); all in `dtype`.

    Raises:
        ValueError: If the sizes do not fit or `gate_activation` is unknown.
    """

    prompt: nn.Parameter | None
    gate_scale: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        prompt_length: int = 10,
        hidden_size: int | None = None,
        *,
        gate_per_head: bool = True,
        gate_activation: Literal["tanh", "identity"] = "tanh",
        learned: bool = True,
        gate_scale: bool = False,
        base_projections: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__()
        if min(num_heads, num_kv_heads, head_dim, prompt_length) < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"ZeroInitAttention: num_heads is {num_heads}, num_kv_heads {num_kv_heads}, head_dim {head_dim} and "
                f"prompt_length {prompt_length}; expected positive numbers and a multiple of num_kv_heads as num_heads"
            )
        if gate_activation not in GATE_ACTIVATIONS:
            raise ValueError(
                f"ZeroInitAttention: gate_activation is {gate_activation!r}; use one of {', '.join(GATE_ACTIVATIONS)}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.prompt_length = prompt_length
        self.hidden_size = num_heads * head_dim if hidden_size is None else hidden_size
        self.gate_per_head, self.gate_activation = gate_per_head, gate_activation
        self.base_projections = base_projections
        prompt = nn.Parameter(torch.empty(prompt_length, self.hidden_size, device=device, dtype=dtype))
        self.register_parameter("prompt", prompt if learned else None)
        self.gate = nn.Parameter(torch.empty(num_heads if gate_per_head else 1, device=device, dtype=dtype))
        self.register_parameter("gate_scale", None)
        if gate_scale:
            self.add_gate_scale()
        self._cached: _Cached | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Prompts from N(0, 1), gates closed."""
        if self.prompt is not None:
            nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)
        if self.gate_scale is not None:
            nn.init.ones_(self.gate_scale)

    def add_gate_scale(self) -> None:
        """Gives the gates their common factor, which starts at one."""
        self.gate_scale = nn.Parameter(torch.ones_like(self.gate[:1]))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_proj: nn.Module,
        value_proj: nn.Module,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        prompt_bias: Tensor | None = None,
        words: Tensor | None = None,
        prompted: Tensor | None = None,
    ) -> Tensor:
        """Attends to the words and to the prompts.

        Args:
            query, key, value: [B, H, L, D], [B, Hkv, S, D] and the same, of the words, rotated where the layer rotates.
            key_proj, value_proj: the layer's projections, from [..., C] to [..., Hkv · D].
            attn_mask, is_causal, scale: as in `F.scaled_dot_product_attention`; masks concern the words alone.
            prompt_bias: [B, P, C] or [B, 1, C], added to the prompts of each sample, an image's features for instance;
                the prompts themselves where the layer has none of its own.
            words: [B, H, L, D], the words' part, if another attention has computed it.
            prompted: [B] bool, the samples that attend to prompts; None: all. The others get the words' part, bit for
                bit.

        Returns:
            [B, H, L, D] in the dtype of `query` (autocast's under autocast).
        """
        prompt_key, prompt_value = self.prompt_key_value(key_proj, value_proj, query.dtype, prompt_bias)
        gate: Tensor = self.gate
        activation = self.gate_activation
        if self.gate_scale is not None:
            gate, activation = self.gate_scale * (gate.tanh() if activation == "tanh" else gate), "identity"
        tensors = query, key, value, prompt_key, prompt_value, gate
        if prompted is None:
            return zero_init_attention(*tensors, attn_mask, is_causal, scale, activation, words)
        if words is None:
            grouped = key.shape[1] != query.shape[1]
            words = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )
        both = zero_init_attention(*tensors, scale=scale, gate_activation=activation, words=words)
        return torch.where(prompted[:, None, None, None], both, words)

    def prompt_key_value(
        self,
        key_proj: nn.Module,
        value_proj: nn.Module,
        dtype: torch.dtype,
        prompt_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts, [Hkv, P, D], or [B, Hkv, P, D] with `prompt_bias`; in `dtype`."""
        composed = any(projection._modules for projection in (key_proj, value_proj))  # may have switches of their own
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or composed:
            return self._project(key_proj, value_proj, dtype, prompt_bias)
        if torch.is_autocast_enabled(self.gate.device.type):
            dtype = torch.get_autocast_dtype(self.gate.device.type)
        given = tuple(prompts for prompts in (self.prompt, prompt_bias) if prompts is not None)
        modules = (
            module
            for projection in (key_proj, value_proj)
            for module in (projection.parameters(), projection.buffers())
        )
        sources = (*given, *chain.from_iterable(modules))
        if any(source.is_inference() for source in sources):  # changes of these are not counted
            return self._project(key_proj, value_proj, dtype, prompt_bias)
        states = tuple((source.data_ptr(), source._version) for source in sources)
        cached = self._cached
        if (
            cached is None
            or cached.dtype != dtype
            or cached.states != states
            or any(new is not old for new, old in zip(sources, cached.sources, strict=True))
        ):
            prompts = self._project(key_proj, value_proj, dtype, prompt_bias)
            cached = self._cached = _Cached(sources, states, dtype, prompts)
        return cached.prompts

    def _project(
        self, key_proj: nn.Module, value_proj: nn.Module, dtype: torch.dtype, prompt_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        expected = (self.prompt_length, self.hidden_size)
        if self.prompt is None:
            hidden = prompt_bias
        else:
            hidden = self.prompt if prompt_bias is None else self.prompt + prompt_bias
        if hidden is None or hidden.shape[-2:] != expected or hidden.dim() > 3:
            one = "" if self.prompt is None else " or [B, 1, C]"
            raise ValueError(
                f"ZeroInitAttention: prompt_bias is {[] if prompt_bias is None else list(prompt_bias.shape)}; expected "
                f"[B, P, C]{one} with [P, C] = {list(expected)}"
            )
        hidden = hidden.to(dtype)
        key, value = (
            through(hidden).to(dtype).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(-3, -2)
            for through in map(self._through, (key_proj, value_proj))
        )
        return key, value

    def _through(self, projection: nn.Module) -> Callable[[Tensor], Tensor]:
        """The map of this projection that prompts pass through."""
        if not self.base_projections:
            return projection
        if isinstance(projection, AdaptedLinear):
            return projection.base_forward
        if type(projection) is nn.Linear or isinstance(projection, BaseLinear):
            return projection
        raise TypeError(
            f"ZeroInitAttention: prompts pass by the adapters of the projections (base_projections), and one is a "
            f"{type(projection).__name__}; a torch.nn.Linear or a layer of mmfast.nn is accepted"
        )

    def train(self, mode: bool = True) -> ZeroInitAttention:
        """As in any module; forgets the prompts' keys and values."""
        self._cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}

    def extra_repr(self) -> str:
        """The sizes and the activation."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"prompt_length={self.prompt_length}, hidden_size={self.hidden_size}, "
            f"gate_per_head={self.gate_per_head}, gate_activation={self.gate_activation!r}"
            f"{'' if self.prompt is not None else ', learned=False'}"
            f"{', gate_scale=True' * (self.gate_scale is not None)}"
            f"{', base_projections=True' * self.base_projections}"
        )
