"""Bytes, launches and saved memory of each op, on each backend: what is accepted and declared, and not a byte else."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from guarded import counts, records
from guarded.cases import DECLARED, NOTHING, Case, cases
from guarded.traffic import Traffic
from torch.utils.flop_counter import FlopCounterMode

from mmfast.ops import products
from mmfast.ops.backends import OPS, machine

CASES = {case.name: case for case in cases()}
ACCEPTED = records.load(records.COUNTS)
SWIGLU = importlib.import_module("mmfast.ops.swiglu")

calls = [(case, backend) for case in CASES.values() for backend in counts.backends(case)]
every_cpu_case = pytest.mark.parametrize(
    "case", [case for case, backend in calls if backend == "cpu"], ids=lambda case: case.name
)
every_call = pytest.mark.parametrize(("case", "backend"), calls, ids=lambda part: getattr(part, "name", part))


def skip_if_lacking(backend: str) -> None:
    if reason := machine(torch.device("cpu")).lacks(backend):
        pytest.skip(reason)


def changes(case: Case, backend: str) -> list[str]:
    found = counts.rows(case, backend)
    return records.differences({name: ACCEPTED.rows.get(name, {}) for name in found}, found)


@every_call
def test_counts_are_the_accepted_ones(case: Case, backend: str) -> None:
    skip_if_lacking(backend)
    if backend == "reference" and ACCEPTED.versions != counts.versions():
        pytest.skip(f"accepted with {ACCEPTED.versions}, whose ops are not those of {counts.versions()}")
    lines = changes(case, backend)
    assert not lines, records.complaint(records.COUNTS, lines)


@every_cpu_case
def test_our_ops_touch_nothing_twice_but_what_is_declared(case: Case) -> None:
    skip_if_lacking("cpu")
    declared, found = DECLARED.get(case.name, NOTHING), counts.beyond_once(case)
    for name, beyond in found.items():
        formulas = getattr(declared, name)
        assert beyond == tuple(counts.declared_bytes(case, formula) for formula in formulas), (name, formulas)


@every_cpu_case
def test_our_ops_save_nothing_of_their_own_but_what_is_declared(case: Case) -> None:
    skip_if_lacking("cpu")
    formula = DECLARED.get(case.name, NOTHING).saved
    assert counts.count(case, "cpu").saved["own"] == counts.declared_bytes(case, formula), formula


def test_every_op_is_counted_and_every_figure_has_a_case() -> None:
    assert {name.split(",")[0] for name in CASES} == OPS.keys()
    assert {name.split(" | ")[0] for name in ACCEPTED.rows} == CASES.keys() >= DECLARED.keys()
    assert {tuple(name.split(" | ")[:2]) for name in ACCEPTED.rows} == {(case.name, backend) for case, backend in calls}


# ---- the counter itself


def test_a_byte_counts_once_for_each_op_that_is_given_it() -> None:
    x, row = torch.ones(6, 10), torch.ones(10)
    with Traffic() as traffic:
        y = x.t()[:5] + x.t()[:5]  # one region, of which half the columns; a view costs nothing
        y.add_(row[:5, None].expand(5, 6))  # an extent that repeats is read once
        torch.mm(y, x, out=torch.empty(5, 10))
        x[torch.tensor([0, 2])].zero_()  # of x two rows are read
    assert traffic.row() == {
        "read": 4 * (30 + (30 + 5) + (30 + 60) + 20) + 2 * 8,
        "written": 4 * (30 + 30 + 50 + 20 + 20),
        "flops": 2 * 5 * 6 * 10,
        "launches": {"aten.add": 1, "aten.add_": 1, "aten.index": 1, "aten.mm": 1, "aten.zero_": 1},
    }


@pytest.mark.parametrize("name", ["lora_linear", "resampler_attention", "linear_cross_entropy, trained head"])
def test_flops_are_those_of_pytorchs_counter(name: str) -> None:
    traffic, case = counts.count(CASES[name], "reference").passes, CASES[name]
    with FlopCounterMode(display=False) as counter:
        output = case.call("reference")
        forward = counter.get_total_flops()
        output.sum().backward()
    assert (traffic["forward"].flops, traffic["backward"].flops) == (forward, counter.get_total_flops() - forward)


# ---- what a change looks like


def test_an_extra_pass_of_a_reference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = SWIGLU.reference
    monkeypatch.setattr(SWIGLU, "reference", lambda gate, up: eager(gate, up) * 1.0)
    size = CASES["swiglu"].inputs["up"].numel() * 2
    assert f"swiglu | reference | forward, written: {2 * size} -> {3 * size} (+50.0%)" in changes(
        CASES["swiglu"], "reference"
    )


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_an_extra_launch_inside_an_op_is_noticed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, as_matrix = CASES["swiglu"], products.as_matrix
    skip_if_lacking(backend)
    monkeypatch.setattr(products, "as_matrix", lambda x: as_matrix(x).clone())
    found = changes(case, backend)
    assert f"swiglu | {backend} | forward, launches, aten.clone: nothing -> 3" in found
    if backend == "cpu":
        beyond = 3 * case.inputs["up"].numel() * 2
        assert counts.beyond_once(case)["forward"] == (beyond, beyond)


def test_an_extra_saved_tensor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_if_lacking("cpu")
    forward = SWIGLU._SwiGLU.forward

    def careless(ctx: Any, gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
        out = forward(ctx, gate, up, backend)
        ctx.save_for_backward(gate, up, torch.sigmoid(gate))
        return out

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, grad, None

    monkeypatch.setattr(SWIGLU._SwiGLU, "forward", staticmethod(careless))
    monkeypatch.setattr(SWIGLU._SwiGLU, "backward", staticmethod(backward))
    size = CASES["swiglu"].inputs["up"].numel() * 2
    assert f"swiglu | cpu | saved, own: 0 -> {size}" in changes(CASES["swiglu"], "cpu")


def test_a_smaller_figure_is_noticed_too() -> None:
    assert records.differences({"op": {"read": 100}}, {"op": {"read": 90}}) == ["op, read: 100 -> 90 (-10.0%)"]
