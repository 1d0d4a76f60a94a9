"""QuantizedLinear against its ops, and its state against bitsandbytes' own layers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmfast.nn import BaseLinear, LoRALinear, QuantizedLinear
from mmfast.nn.quantized_state import NF4_STATE, Format, state_names
from mmfast.ops import (
    Int8Weight,
    NF4Weight,
    int8_dequantize,
    int8_linear,
    int8_quantize,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
)

KINDS: list[tuple[Format, bool]] = [("nf4", True), ("nf4", False), ("int8", False)]
kinds = pytest.mark.parametrize(("format", "double_quant"), KINDS, ids=["nf4-double", "nf4", "int8"])


def linear(columns: int = 96, rows: int = 40, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias, dtype=dtype)


def parts(layer: BaseLinear) -> list[Tensor]:
    return layer.base_weight().tensors()  # type: ignore[union-attr]


def same(a: BaseLinear, b: BaseLinear) -> bool:
    return a.weight_dtype == b.weight_dtype and all(map(torch.equal, parts(a), parts(b)))


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_op(format: Format, double_quant: bool, bias: bool) -> None:
    base = linear(bias=bias)
    layer = QuantizedLinear.from_linear(base, format, double_quant)
    if format == "nf4":
        weight: Any = nf4_quantize(base.weight, double_quant=double_quant)
        op: Any = nf4_linear
        dense = nf4_dequantize(weight)
    else:
        weight, op = int8_quantize(base.weight), int8_linear
        dense = int8_dequantize(weight)
    x = torch.randn(2, 5, 96, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, op(x, weight, base.bias))
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = x.detach().double() @ dense.double().T + (base.bias.detach().double() if bias else 0)
    assert (out.double() - exact).norm() <= 1e-5 * exact.norm()
    exact = grad.double() @ dense.double()
    assert x.grad is not None
    assert (x.grad.double() - exact).norm() <= 1e-5 * exact.norm()
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))
    assert dict(layer.named_parameters()).keys() == ({"bias"} if bias else set())
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_inputs_dtype_is_the_outputs(format: Format, double_quant: bool, dtype: torch.dtype) -> None:
    layer = QuantizedLinear.from_linear(linear(64, 8), format, double_quant)
    out = layer(torch.randn(3, 64, dtype=dtype))
    assert out.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 64)).dtype == torch.bfloat16


@kinds
def test_casts_leave_the_quantisation_alone_and_moves_take_it_along(format: Format, double_quant: bool) -> None:
    layer = QuantizedLinear.from_linear(linear(), format, double_quant)
    before = [part.clone() for part in parts(layer)]
    for cast_to in (
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu", torch.float16),
    ):
        changed = cast_to(layer)
        assert changed is layer
        assert [part.dtype for part in parts(layer)] == [part.dtype for part in before]
        assert all(map(torch.equal, parts(layer), before))
    assert layer.bias.dtype == torch.float16
    assert layer.weight_dtype == torch.float32
    layer.to("meta", torch.bfloat16)
    assert all(part.is_meta for part in parts(layer))
    assert [part.dtype for part in parts(layer)] == [part.dtype for part in before]
    layer.to_empty(device="cpu")
    assert [(part.dtype, part.shape) for part in parts(layer)] == [(part.dtype, part.shape) for part in before]


@kinds
def test_copies_pickles_and_freezing(format: Format, double_quant: bool, tmp_path: Path) -> None:
    layer = QuantizedLinear.from_linear(linear(), format, double_quant).eval()
    x = torch.randn(3, 96)
    torch.save(layer, tmp_path / "layer.pt")
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(tmp_path / "layer.pt", weights_only=False),
    ):
        assert same(twin, layer)
        assert torch.equal(twin(x), layer(x))
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
        assert not twin.training
    layer.requires_grad_(True)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert not any(parameter.requires_grad for parameter in layer.requires_grad_(False).parameters())


@kinds
def test_a_state_dict_goes_through_a_file_and_fills_other_layers(
    format: Format, double_quant: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(*(QuantizedLinear.from_linear(linear(64, 64), format, double_quant) for _ in range(2)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    names = {*state_names(format, double_quant), "bias"}
    assert state.keys() == {f"{index}.{name}" for index in range(2) for name in names}

    def fresh(device: str) -> nn.Sequential:
        layers = (
            QuantizedLinear(64, 64, format=format, double_quant=double_quant, device=device, dtype=torch.float32)
            for _ in range(2)
        )
        return nn.Sequential(*layers)

    x = torch.randn(3, 64)
    empty = fresh("cpu")
    assert not empty(x).any()
    empty.load_state_dict(state)
    meta = fresh("meta")
    assert all(entry.is_meta for entry in meta.state_dict().values())
    with (
        pytest.warns(UserWarning, match="which is a no-op"),
        pytest.raises(RuntimeError, match=r"0\.weight: the layer is on the meta device.*assign=True"),
    ):
        meta.load_state_dict(state)
    meta.load_state_dict(state, assign=True)
    for filled in (empty, meta):
        assert all(map(same, cast(Any, filled), cast(Any, model)))
        assert torch.equal(filled(x), model(x))
    assert empty[0].weight.data_ptr() != state["0.weight"].data_ptr()
    assert meta[0].weight.data_ptr() == state["0.weight"].data_ptr()


@settings(deadline=None, max_examples=12)
@given(
    # bitsandbytes transposes what it dequantises from a single byte.
    rows=st.integers(2, 70),
    columns=st.integers(1, 70).map(lambda half: 2 * half),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    double_quant=st.booleans(),
)
def test_bitsandbytes_makes_reads_and_writes_the_same_nf4_state(
    rows: int, columns: int, dtype: torch.dtype, double_quant: bool
) -> None:
    base = linear(columns, rows, dtype)
    options = {"quant_type": "nf4", "compress_statistics": double_quant}
    theirs = bitsandbytes.nn.Linear4bit(columns, rows, compute_dtype=dtype, **options)
    theirs.weight = bitsandbytes.nn.Params4bit(base.weight.detach(), **options)
    theirs.bias = base.bias
    theirs = theirs.to("cpu")
    state = theirs.state_dict()
    ours = QuantizedLinear.from_linear(base, "nf4", double_quant)
    saved = ours.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(entry, state[name]) for name, entry in saved.items())
    filled = QuantizedLinear(columns, rows, double_quant=double_quant, dtype=dtype)
    filled.load_state_dict(state)
    assert same(filled, ours)
    back = bitsandbytes.nn.Params4bit.from_prequantized(
        saved["weight"], {name: entry for name, entry in saved.items() if name not in ("weight", "bias")}, device="cpu"
    )
    # With AVX-512, bitsandbytes 0.50 dequantises rows wrongly that are not whole blocks.
    if columns % 64 == 0 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        dense = bitsandbytes.functional.dequantize_4bit(back, back.quant_state)
        assert torch.equal(dense, nf4_dequantize(cast(NF4Weight, ours.base_weight())))


def test_bitsandbytes_reads_and_writes_the_same_int8_state() -> None:
    base = linear(64, 48, torch.float16)
    ours = QuantizedLinear.from_linear(base, "int8")
    theirs = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(base.state_dict())
    theirs = theirs.to("cpu")
    theirs(torch.randn(2, 64, dtype=torch.float16))
    state = theirs.state_dict()
    saved = ours.state_dict()
    assert saved.keys() == state.keys()
    torch.testing.assert_close(saved["SCB"], state["SCB"])
    assert (saved["weight"].int() - state["weight"].int()).abs().max() <= 1
    filled = QuantizedLinear(64, 48, format="int8", dtype=torch.float16)
    filled.load_state_dict(state)
    assert torch.equal(filled.weight, state["weight"])


def test_int8_scales_survive_their_name_in_the_state_to_the_last_bit() -> None:
    # Every mantissa of the largest magnitude of a row; a power of two changes nothing.
    largest = (torch.arange(2**23, dtype=torch.int32) | 127 << 23).view(torch.float32)
    scale = largest / 127
    layer = QuantizedLinear(1, 2**23, bias=False, format="int8")
    layer.hold(Int8Weight(layer.weight, scale, torch.float32))
    twin = QuantizedLinear(1, 2**23, bias=False, format="int8")
    twin.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(cast(Tensor, twin.weight_scale), scale)


def described(**changes: Any) -> Tensor:
    state = QuantizedLinear.from_linear(linear(64, 4)).state_dict()
    values = json.loads(bytes(state[NF4_STATE].tolist())) | changes
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(4, 64)}, r"weight: it is torch\.float32, dense, but the layer's is nf4"),
        ({"weight": torch.zeros(64, 1, dtype=torch.uint8)}, r"weight is torch\.uint8 \[64, 1\]; expected"),
        ({"weight": torch.zeros(128, 1, dtype=torch.int8)}, r"weight is torch\.int8 \[128, 1\]; expected torch\.uint8"),
        ({"weight.absmax": torch.zeros(4)}, r"weight\.absmax is torch\.float32 \[4\]; expected torch\.uint8 \[4\]"),
        ({"weight.absmax": None}, r"Missing key.*weight\.absmax"),
        ({"weight.nested_absmax": torch.zeros(2)}, r"nested_absmax is torch\.float32 \[2\]; expected"),
        ({"weight.nested_quant_map": torch.zeros(16)}, r"nested_quant_map is torch\.float32 \[16\]"),
        ({"weight.quant_map": torch.zeros(16)}, r"quant_map is \[0\.0.*expected the levels of NF4"),
        ({NF4_STATE: torch.tensor(list(b"{"), dtype=torch.uint8)}, "is not JSON"),
        ({NF4_STATE: torch.tensor(list(b"[]"), dtype=torch.uint8)}, r"holds \[\]; expected a JSON object"),
        ({NF4_STATE: described(quant_type="fp4")}, r"says \{'quant_type': 'fp4'\}; expected \{'quant_type': 'nf4'\}"),
        ({NF4_STATE: described(blocksize=128)}, "'blocksize': 128.*expected.*64"),
        ({NF4_STATE: described(shape=[8, 32])}, r"'shape': \[8, 32\].*expected.*\[4, 64\]"),
        ({NF4_STATE: described(dtype="float8_e4m3fn")}, "dtype 'float8_e4m3fn'; expected float32"),
        ({NF4_STATE: described(nested_offset=None)}, "nested_offset None; expected a number"),
        ({NF4_STATE: described(nested_blocksize=64)}, "'nested_blocksize': 64.*expected.*256"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    changes: dict[str, Tensor | None], message: str
) -> None:
    layer = QuantizedLinear.from_linear(linear(64, 4))
    twin = copy.deepcopy(layer)
    state = QuantizedLinear.from_linear(linear(64, 4)).state_dict() | changes
    state = {name: entry for name, entry in state.items() if entry is not None}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert same(layer, twin)


def test_a_state_of_another_format_is_refused() -> None:
    double, plain, int8 = (QuantizedLinear.from_linear(linear(64, 4), *kind) for kind in KINDS)
    with pytest.raises(RuntimeError, match=r"Missing key.*nested_absmax"):
        double.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*SCB"):
        plain.load_state_dict(plain.state_dict() | {"SCB": torch.zeros(4)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nested_absmax"):
        plain.load_state_dict(double.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*SCB"):
        int8.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"weight_format is 1.*expected 0"):
        int8.load_state_dict(int8.state_dict() | {"weight_format": torch.tensor(1, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*absmax"):
        BaseLinear(64, 4).load_state_dict(plain.state_dict())


def test_a_dense_base_linear_is_an_nn_linear() -> None:
    base = linear()
    layer = BaseLinear(96, 40)
    layer.load_state_dict(base.state_dict())
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert layer.base_weight() is layer.weight
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), base(x))
    assert layer.half().weight.dtype == torch.float16
    assert repr(layer) == "BaseLinear(in_features=96, out_features=40, bias=True)"


@kinds
def test_adopt_shares_the_weight_whatever_it_is(format: Format, double_quant: bool) -> None:
    base = linear()
    layer = BaseLinear(96, 40, device="meta")
    layer.adopt(base)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    quantised = QuantizedLinear.from_linear(base, format, double_quant)
    layer.adopt(quantised)
    assert [part.data_ptr() for part in parts(layer)] == [part.data_ptr() for part in parts(quantised)]
    assert layer.state_dict().keys() == quantised.state_dict().keys()
    assert layer.weight_format == format
    layer.adopt(base)
    assert layer.weight is base.weight
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert not list(layer.buffers())


@kinds
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_from_linear_and_back(format: Format, double_quant: bool, dtype: torch.dtype | None) -> None:
    base = linear(dtype=torch.bfloat16).eval()
    layer = QuantizedLinear.from_linear(base, format, double_quant)
    assert layer.bias is base.bias
    assert not layer.training
    dense = layer.to_linear(dtype)
    assert type(dense) is nn.Linear
    assert not dense.training
    assert dense.weight.dtype == (dtype or torch.bfloat16)
    assert dense.bias.dtype == (dtype or torch.bfloat16)
    assert not dense.weight.requires_grad
    assert dense.bias.requires_grad
    # The widest gap between two levels of NF4 is 0.304 of the block's largest magnitude, which is at most 96^-0.5.
    bound = {"nf4": 0.16, "int8": 0.005}[format] * base.weight.abs().max()
    assert (dense.weight - base.weight).abs().max() <= bound


@kinds
def test_compiles_without_a_graph_break(format: Format, double_quant: bool) -> None:
    layer = QuantizedLinear.from_linear(linear(64, 8), format, double_quant)
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, layer(x))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x).sum(), x)[0])


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(TypeError, match="the layer is a LoRALinear; a plain"):
        QuantizedLinear.from_linear(LoRALinear(4, 4, 2, 1.0))
    with pytest.raises(TypeError, match="the layer is a QuantizedLinear"):
        QuantizedLinear.from_linear(QuantizedLinear(4, 4))
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="hooks"):
        QuantizedLinear.from_linear(hooked)
    with pytest.raises(ValueError, match=r"format is 'fp4'; 'nf4' or 'int8' is accepted"):
        QuantizedLinear(4, 4, format="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_features is 3; NF4 takes an even number"):
        QuantizedLinear(3, 4)


def test_repr_names_the_format() -> None:
    assert repr(QuantizedLinear(4, 5)) == "QuantizedLinear(in_features=4, out_features=5, bias=True, weight=nf4)"
