"""x + scale · Σ_k router_k · Up_k(drop(act(Down x))): LaVIN's mixture-of-modality adapter, and the plain bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops import backends, crossovers, merged_experts, products
from mmfast.ops import dropout as dropouts
from mmfast.ops.backends import Backend, Machine, Op, Size
from mmfast.ops.dropout import Dropout

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}

# Elements of x from which the kernels are faster on a CPU, by the width of one, without a gradient and with one.
LEAST = crossovers.CPU.cpu("mixture_adapter")
# Tokens of a sample below which merging its experts costs more than it saves.
CPU_TOKENS = 4
# Ranks of all projections above which PyTorch's products are as fast: with 8 the op is 1.1 to 1.9 times as fast, with
# 16 0.85 to 1.0 times.
CPU_RANKS = 12
# Rows from which products of many ranks are faster in 16 bits, on a CPU that has such instructions.
CPU_16_BIT_ROWS = 64
# Ranks that a program of the Triton kernels can hold.
TRITON_RANKS = 128


def reference(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    router: Tensor | None,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    activation: str = "identity",
    product_dtype: torch.dtype | None = None,
    drop: Callable[[Tensor, Dropout], Tensor] = dropouts.reference,
) -> Tensor:
    """The definition: y = x + scale · Σ_k router_k · (Û_k h_k + bias_k), h_k = drop(act(A_k x + a_k)).

    Args:
        x: [B, ..., H] (fp32, fp16, bf16, fp64; any strides).
        down_weight A: [R, H], which all K experts share (LaVIN), or [K, R, H], one for each.
        down_bias a: [R] or [K, R], or None.
        up_weight: [K, H, R / G], grouped as in a convolution; output channels g · H / G to (g + 1) · H / G - 1 see the
            ranks g · R / G to (g + 1) · R / G - 1 of h_k. Û_k [H, R] is that matrix with zeros elsewhere. G is R
            divided by the last dimension; LaVIN has 2, a plain adapter 1.
        up_bias: [K, H], or None.
        router: [B, K], the experts' weights for each sample, or [B, ..., K] for each token; None: 1, for K = 1.
        scale: the factor on the update.
        dropout: the mask of h, whose columns are the ranks of A_0, A_1, ...; None: every element stays.
        activation: "identity", "relu", "gelu" (z · Φ(z), by the error function) or "silu".
        product_dtype: of everything below; default fp32 (fp64 for fp64).
        drop: how dropout is made.

    Parameters and router have any floating dtype.

    Returns:
        [B, ..., H] in the dtype of x, also under autocast.

    Numerics: all of it in fp32, y rounded once; or in another `product_dtype`, as PyTorch rounds there.

    Source: Luo et al., "Cheap and Quick" (arXiv 2305.15023), equations 3 to 7; luogen1996/LaVIN,
    lavin/mm_adapter.py:10-51. A plain adapter (K = 1, G = 1): Houlsby et al. (arXiv 1902.00751), section 2.1.
    """
    if torch.is_autocast_enabled(x.device.type):
        tensors = x, down_weight, down_bias, up_weight, up_bias, router
        with torch.autocast(x.device.type, enabled=False):
            return reference(*tensors, scale, dropout, activation, product_dtype, drop)
    dtype, wide = x.dtype, product_dtype or torch.promote_types(x.dtype, torch.float32)
    x, up = x.to(wide), up_weight.to(wide)
    down_bias = None if down_bias is None else down_bias.flatten().to(wide)
    up_bias = None if up_bias is None else up_bias.to(wide)
    h = ACTIVATIONS[activation](F.linear(x, down_weight.flatten(0, -2).to(wide), down_bias))
    if dropout is not None:
        h = drop(h, dropout).to(wide)
    groups, router = down_weight.shape[-2] // up.shape[2], None if router is None else router.to(wide)
    if router is None and groups == 1:
        update = _single(h, up, up_bias)
    elif router is not None and router.dim() == 2 and x.dim() == 3 and _merges(x, down_weight):
        update = _merged_update(h, up, up_bias, router, groups)
    else:
        update = _update(h, up, up_bias, router, groups)
    return products.add_scaled(x, update, scale).to(dtype)


def _single(h: Tensor, up: Tensor, up_bias: Tensor | None) -> Tensor:
    """`_update` of one expert and one group. (The gradient of up[0] would be zeros into which the row is copied.)"""
    return F.linear(h, up.squeeze(0), None if up_bias is None else up_bias.squeeze(0))


def _update(h: Tensor, up: Tensor, up_bias: Tensor | None, router: Tensor | None, groups: int) -> Tensor:
    """Σ_k router_k · (Û_k h_k + bias_k), by its letters."""
    dims = h.dim()
    h = h.unflatten(-1, (-1, groups, up.shape[2]))  # [B, ..., K or 1, G, R / G]
    if router is not None:
        if router.dim() < dims:
            router = router.view(router.shape[0], *[1] * (dims - 2), -1)
        h = h * router[..., None, None]
    update = torch.einsum("...kgr,kgor->...go", h, up.unflatten(1, (groups, -1))).flatten(-2)
    return update if up_bias is None else update + (up_bias[0] if router is None else router @ up_bias)


def _merges(x: Tensor, down_weight: Tensor) -> bool:
    """Whether merging the experts of each sample first is the faster way to write the definition."""
    return down_weight.dim() == 2 and x.shape[1] >= x.shape[0]


def _merged_update(h: Tensor, up: Tensor, up_bias: Tensor | None, router: Tensor, groups: int) -> Tensor:
    """`_update` for h [B, T, R], which all experts share: one product for each sample."""
    merged = (router @ up.flatten(1)).view(-1, *up.shape[1:])  # [B, H, R / G]
    if groups > 1:
        seen = up.shape[2]
        parts = enumerate(merged.chunk(groups, 1))
        merged = torch.cat([F.pad(part, (g * seen, (groups - 1 - g) * seen)) for g, part in parts], 1)
    if up_bias is None:
        return torch.bmm(h, merged.transpose(1, 2))
    return torch.baddbmm((router @ up_bias)[:, None], h, merged.transpose(1, 2))


class Call(NamedTuple):
    """The checked arguments, and whether a gradient will be asked for."""

    x: Tensor
    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    router: Tensor | None
    scale: float
    dropout: float
    activation: str
    differentiated: bool

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def ranks(self) -> int:
        """Of all projections."""
        return self.down_weight.shape[:-1].numel()

    @property
    def tokens(self) -> int:
        """That share their experts' weights."""
        return self.x.shape[(0 if self.router is None else 1) : -1].numel()


def check(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    router: Tensor | None,
    scale: float = 1.0,
    dropout: float = 0.0,
    activation: str = "identity",
) -> Call:
    """The arguments of `mixture_adapter`, checked."""
    where = "mixture_adapter"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{where}: dropout is {dropout}; expected a probability in [0, 1)")
    if x.dim() < 2:
        raise ValueError(f"{where}: x is {list(x.shape)}; expected [B, ..., H]; add a batch dimension")
    if x.dtype not in DTYPES:
        raise TypeError(f"{where}: x is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    _check_weights(where, x.shape[-1], down_weight, up_weight)
    experts = up_weight.shape[0]
    if router is None and experts != 1:
        raise ValueError(f"{where}: there are {experts} experts but no router; expected one expert, or a router")
    if router is not None and router.shape not in (shapes := ((x.shape[0], experts), (*x.shape[:-1], experts))):
        raise ValueError(
            f"{where}: router is {list(router.shape)}; expected a weight for each sample or token and each of the "
            f"{experts} experts, {' or '.join(str(list(shape)) for shape in dict.fromkeys(shapes))}"
        )
    for name, tensor, shape in (
        ("down_bias", down_bias, down_weight.shape[:-1]),
        ("up_bias", up_bias, up_weight.shape[:2]),
    ):
        if tensor is not None and tensor.shape != shape:
            weight = name.replace("bias", "weight")
            raise ValueError(f"{where}: {name} is {list(tensor.shape)}; expected {list(shape)}, after {weight}")
    trained = x.requires_grad
    named = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    for name, tensor in (named | {"router": router}).items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{where}: {name} is on {tensor.device} but x on {x.device}; move one")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{where}: {name} is {tensor.dtype}; expected a floating dtype")
        trained = trained or tensor.requires_grad
    return Call(
        x,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        router,
        float(scale),
        float(dropout),
        activation,
        trained and torch.is_grad_enabled(),
    )


def _check_weights(where: str, features: int, down_weight: Tensor, up_weight: Tensor) -> None:
    down, up = list(down_weight.shape), list(up_weight.shape)
    if len(down) not in (2, 3) or down[-1] != features or 0 in down[:-1]:
        raise ValueError(
            f"{where}: down_weight is {down} but x has {features} features; expected [R, {features}], shared, or "
            f"[K, R, {features}], with R >= 1; was it made for another layer?"
        )
    if len(up) != 3 or up[1] != features or 0 in (up[0], up[2]) or down[-2] % up[2] or features % (down[-2] // up[2]):
        raise ValueError(
            f"{where}: up_weight is {up}, down_weight {down}; expected [K, H, R / groups] with H = {features}, "
            f"R = {down[-2]} and groups that divide both"
        )
    if len(down) == 3 and down[0] != up[0]:
        raise ValueError(
            f"{where}: down_weight has {down[0]} experts and up_weight {up[0]}; expected as many, or a down_weight "
            "[R, H] that all share"
        )


def _kernels_cannot(call: Call, machine: Machine) -> str | None:
    if call.x.dtype == torch.float64:
        return "there is no float64 kernel"
    if call.router is not None and call.router.dim() > 2:
        return "the router has a weight for each token; the kernels merge the experts once for each sample"
    return None


def _cpu_avoids(call: Call, machine: Machine) -> str | None:
    if call.ranks > CPU_RANKS:
        return f"there are {call.ranks} ranks; above {CPU_RANKS} the reference is as fast"
    if not call.dropout and call.tokens < CPU_TOKENS:
        return f"each sample has {call.tokens} tokens; below {CPU_TOKENS} the reference is as fast"
    return None


def _key(x: Tensor, differentiated: bool) -> str:
    if x.element_size() > 2:
        return "32-bit backward" if differentiated else "32-bit forward"
    return "16-bit backward" if differentiated else "16-bit forward"


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    if call.dropout:  # the reference makes its mask in PyTorch, slowly at any size
        return ()
    return (Size(_key(call.x, call.differentiated), call.x.numel(), "x has {} elements"),)


def _product_dtype(x: Tensor, ranks: int, differentiated: bool) -> torch.dtype:
    """That of the reference: with many ranks its products are made in 16 bits, where these are fast."""
    rows = x.shape[:-1].numel()
    if ranks > CPU_RANKS and rows >= CPU_16_BIT_ROWS and not products.is_slow(x.dtype, rows, grad=differentiated):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def _triton_cannot(call: Call, machine: Machine) -> str | None:
    if call.ranks > TRITON_RANKS:
        return f"there are {call.ranks} ranks; a program holds up to {TRITON_RANKS}"
    return _kernels_cannot(call, machine)


def _is_small(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    router: Tensor | None,
    activation: str,
    backend: str | None,
) -> bool:
    """Whether `OP.select` would take the reference for a call whose mistakes, if it has any, PyTorch's ops find."""
    if not backends.plain((x, down_weight, down_bias, up_weight, up_bias, router), backend) or up_weight.dim() != 3:
        return False
    experts = up_weight.shape[0]
    return (
        x.numel() < LEAST[_key(x, torch.is_grad_enabled())]
        and x.dim() > 1
        and activation in ACTIVATIONS
        # What broadcasting would let pass.
        and up_weight.shape[1] == x.shape[-1]
        and (down_weight.dim() == 2 or down_weight.shape[0] == experts)
        and (down_bias is None or down_bias.shape == down_weight.shape[:-1])
        and (up_bias is None or up_bias.shape == up_weight.shape[:2])
        and (experts == 1 if router is None else router.shape == (x.shape[0], experts))
    )


def _fits_one_expert(pattern: str, tensors: tuple[Tensor | None, ...], activation: str, backend: str | None) -> int:
    """What `backends.fits` counts of x and what belongs to one expert without a router, if `check` could find nothing
    else; else -1.
    """
    if activation not in ACTIVATIONS or torch._C._is_any_autocast_enabled():
        return -1
    return backends.fits(backend, pattern, *tensors)


def _is_small_float32(tensors: tuple[Any, ...], activation: str, backend: str | None) -> bool:
    """`_is_small` for one expert without a router where all is fp32 and `reference` casts nothing."""
    x = tensors[0]
    if x.dtype != torch.float32:
        return False
    elements = _fits_one_expert("*bh *bh rh= r=? 1hr= 1h=?", tensors, activation, backend)
    return 0 <= elements < LEAST[_key(x, torch.is_grad_enabled())]


def _has_many_ranks(tensors: tuple[Any, ...], activation: str, backend: str | None) -> bool:
    """Whether `_cpu_avoids` would leave to the reference a call of one expert without a router."""
    elements = _fits_one_expert("*bh *bh rh r? 1hr 1h?", tensors, activation, backend)
    return elements >= 0 and tensors[1].shape[0] > CPU_RANKS


def _of_one_expert(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: float,
    activation: str,
) -> Tensor:
    """`reference` of one expert without a router; without gradients, in fewer passes."""
    trained = torch.is_grad_enabled()
    dtype = _product_dtype(x, down_weight.shape[0], trained)
    wide, down_bias = x.to(dtype), None if down_bias is None else down_bias.to(dtype)
    z = F.linear(wide, down_weight.to(dtype), down_bias)
    h = z.relu_() if activation == "relu" and not trained else ACTIVATIONS[activation](z)
    up, up_bias = up_weight.to(dtype), None if up_bias is None else up_bias.to(dtype)
    if trained or scale != 1:
        return products.add_scaled(wide, _single(h, up, up_bias), scale).to(x.dtype)
    if products.multiplies_16_bit(dtype, "cpu"):
        return products.linear_plus(h, up[0], None if up_bias is None else up_bias[0], wide)
    return _single(h, up, up_bias).add_(wide).to(x.dtype)


OP = Op(
    "mixture_adapter",
    check,
    (Backend("cpu", _kernels_cannot, _cpu_avoids), Backend("triton", _triton_cannot), Backend("reference")),
    _sizes,
)


def mixture_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    router: Tensor | None,
    scale: float = 1.0,
    dropout: float = 0.0,
    activation: str = "identity",
    *,
    backend: str | None = None,
) -> Tensor:
    """x + scale · Σ_k router_k · Up_k(drop(act(Down x))): `reference` says what exactly.

    The experts of a sample are merged into one update of few ranks, so that x is read and y written once, and so in
    backward with the gradient. Saved for backward: x if `down_weight` is trained; the pre-activations [rows, ranks] in
    fp32 where the gradients need h or the slope of the activation; the merged experts [B, ranks / groups + 1, H] in
    fp32, and with a router the K that are merged; no mask. Only gradients that are asked for are made. Differentiable
    once, except on the reference.

    Args:
        x: [B, ..., H] (fp32, fp16, bf16; fp64 on the reference; any strides).
        down_weight: [R, H], which the experts share, or [K, R, H].
        down_bias: [R] or [K, R], or None.
        up_weight: [K, H, R / groups], its last dimension says how many groups there are.
        up_bias: [K, H], or None.
        router: [B, K], the experts' weights for each sample; or [B, ..., K], for each token (on the reference); None:
            no weights, for one expert.
        scale: the factor on the update.
        dropout: probability of dropping an element of h, rounded to a multiple of 2⁻¹⁶. The mask depends on PyTorch's
            generator alone, so every backend has the same one and checkpointing repeats it.
        activation: "identity", "relu", "gelu" (by the error function) or "silu".
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [B, ..., H] in the dtype of x, also under autocast. Parameters may have any floating dtype, and so have their
        gradients.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: parameters, h and all sums in fp32, y rounded once; where x has 16 bits, Triton rounds the factors of its
    products (parameters, h, gradients of z) to them. Deterministic, on any number of threads.

    Source: Luo et al., "Cheap and Quick" (arXiv 2305.15023): see `reference`.
    """
    if router is None and not dropout:
        tensors = x, down_weight, down_bias, up_weight, up_bias
        if _is_small_float32(tensors, activation, backend):
            h = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
            return products.add_scaled(x, _single(h, up_weight, up_bias), scale)
        if _has_many_ranks(tensors, activation, backend):
            return _of_one_expert(*tensors, scale, activation)
    arguments = x, down_weight, down_bias, up_weight, up_bias, router
    if not dropout and _is_small(*arguments, activation, backend):
        return backends.checked_late(_reference, check, *arguments, scale, dropout, activation)
    call = check(*arguments, scale, dropout, activation)
    chosen = OP.select(call, backends.machine(call.device), backend)
    threshold = dropouts.threshold(call.dropout)
    seed = dropouts.draw_seed(call.device) if threshold else None
    if chosen == "reference":
        dropout_ = None if seed is None else Dropout(seed, threshold)
        dtype = _product_dtype(x, call.ranks, call.differentiated)
        asked = backend or backends._requested
        by_kernel = not (asked or backends.machine(call.device).lacks("cpu")) and dtype != torch.float64
        drop = dropouts.on_cpu if by_kernel else dropouts.reference
        return reference(*arguments, scale, dropout_, activation, dtype, drop)
    downs = 1 if down_weight.dim() == 2 else down_weight.shape[0]
    groups = down_weight.shape[-2] // up_weight.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        up = merged_experts.merge(up_weight, up_bias, router, call.scale, downs)
    down, bias = down_weight.flatten(0, -2), None if down_bias is None else down_bias.flatten()
    samples = x.reshape(1 if router is None else x.shape[0], call.tokens, x.shape[-1])
    settings = groups, downs, activation, threshold
    if call.differentiated:
        y = merged_experts.MergedExperts.apply(samples, down, bias, up, settings, seed, chosen)
    else:
        y = merged_experts.FWD(samples, down, bias, up, *settings, seed, False, chosen)[0]
    return y.view(x.shape)


def _reference(*arguments: Any) -> Tensor:
    """`reference` of the public function's arguments, for no dropout."""
    definition: Callable[..., Tensor] = reference
    return definition(*arguments[:7], None, arguments[8])
