"""Tables of crossovers: which one is in force, what is no table, and that ops do as it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.ops import backends, crossovers, explain, swiglu
from mmfast.ops.backends import OPS, Machine

DEVICE = "CPU, Fast 9000, AVX512"
GPU = "NVIDIA H900, sm_90"


def write(path: Path, size: Any = 7, device: str = DEVICE, backend: str = "cpu", key: str = "forward") -> Path:
    """A table with one size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "ops": {"swiglu": {backend: {key: size}}}}))
    return path


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A folder of shipped tables, with that for any CPU."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "cpu.json").write_bytes((crossovers.SHIPPED / "cpu.json").read_bytes())
    return folder


def test_tables_are_looked_for_in_order(tmp_path: Path, shipped: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def found(device: str = DEVICE) -> tuple[int, str]:
        table = crossovers.find(device, environ, shipped)
        assert table.ops["rope"]["cpu"]["float16 backward"] == 65536  # what a table leaves open is as shipped
        return table.cpu("swiglu")["forward"], table.source

    assert found() == (65536, "shipped for any CPU")
    write(shipped / "cpu-fast-9000-avx512.json", 11)
    assert found() == (11, f"shipped for {DEVICE}")
    assert found("CPU, Fast 9000, AVX2")[0] == 65536
    own = write(crossovers.user_file(DEVICE, environ), 12)
    assert own == tmp_path / "cache" / "mmfast" / "crossovers" / "cpu-fast-9000-avx512.json"
    assert found() == (12, f"{own}, measured on this device")
    named = write(tmp_path / "mine.json", 13, device="another")
    environ["MMFAST_CROSSOVERS"] = str(named)
    assert found() == (13, f"{named} (MMFAST_CROSSOVERS)")


def test_a_table_of_another_device_is_passed_over(tmp_path: Path, shipped: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    own = write(crossovers.user_file(DEVICE, environ), device="CPU, Fast 9000, AVX2")
    table = crossovers.find(DEVICE, environ, shipped)
    assert table.cpu("swiglu")["forward"] == 65536
    assert f"passed over: {own}, measured on CPU, Fast 9000, AVX2, while this is {DEVICE}" in table.source


def test_an_own_table_that_is_none_is_passed_over_with_a_warning(tmp_path: Path, shipped: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    own = write(crossovers.user_file(DEVICE, environ), -1)
    with pytest.warns(UserWarning, match=r"avx512.json: ops.swiglu.cpu.forward is -1"):
        table = crossovers.find(DEVICE, environ, shipped)
    assert table.cpu("swiglu")["forward"] == 65536
    assert f"passed over: crossovers: {own}" in table.source


def test_without_a_cache_folder_of_its_own_the_user_has_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert crossovers.user_file(GPU, {}) == Path("/somewhere/.cache/mmfast/crossovers/nvidia-h900-sm-90.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it cannot be read as JSON"),
        ("[]", "it names no device"),
        ({"device": 3, "ops": {}}, "it names no device"),
        ({"device": "x"}, "ops is None; expected an object"),
        ({"device": "x", "ops": {"swish": {}}}, "ops has 'swish'; expected any of 'swiglu', 'rope'"),
        (
            {"device": "x", "ops": {"swiglu": {"gpu": {}}}},
            "ops.swiglu has 'gpu'; expected any of 'cpu', 'triton', 'cuda'",
        ),
        ({"device": "x", "ops": {"swiglu": {"cpu": 3}}}, "ops.swiglu.cpu is 3; expected an object"),
        (
            {"device": "x", "ops": {"swiglu": {"cpu": {"both": 3}}}},
            "ops.swiglu.cpu has 'both'; expected any of 'packed forward', 'packed backward', 'forward', 'backward'",
        ),
        *(
            (
                {"device": "x", "ops": {"swiglu": {"cpu": {"forward": size}}}},
                "ops.swiglu.cpu.forward is .*; expected a whole",
            )
            for size in (-1, 1.5, True, "8", float("inf"))
        ),
    ],
)
def test_what_is_no_table(content: Any, message: str, tmp_path: Path, shipped: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"crossovers: {path}: {message}"):
        crossovers.find(DEVICE, {"MMFAST_CROSSOVERS": str(path)}, shipped)


def test_a_named_file_must_be_there(tmp_path: Path, shipped: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.json: it cannot be read"):
        crossovers.find(DEVICE, {"MMFAST_CROSSOVERS": str(tmp_path / "missing.json")}, shipped)


def test_shipped_tables_are_tables() -> None:
    known = crossovers.read(crossovers.SHIPPED / "cpu.json").ops
    for path in crossovers.SHIPPED.glob("*.json"):
        table = crossovers.read(path, known)
        assert path.name in ("cpu.json", crossovers.user_file(table.device).name)
    assert set(known) <= set(OPS)


def test_null_is_never(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = crossovers.read(write(tmp_path / "table.json", None))
    assert table.cpu("swiglu")["forward"] == crossovers.NEVER
    monkeypatch.setitem(crossovers.CPU.cpu("swiglu"), "forward", crossovers.NEVER)
    gate = torch.zeros(1).expand(2**20, 2**20)
    assert "cpu: gate has 1099511627776 elements; at every size the reference is faster" in explain(swiglu, gate, gate)


def test_a_gpu_has_no_sizes_until_they_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = crossovers.find(GPU, {"XDG_CACHE_HOME": str(tmp_path)})
    assert table.source == "none: kernels run at every size"
    op, gate = OPS["swiglu"], torch.zeros(2, 8)
    call = op.check(gate, gate)
    monkeypatch.setattr(crossovers, "in_force", lambda device: table)
    machine = Machine("cuda", (9, 0), gpu=GPU)
    assert op.select(call, machine) == "triton"
    write(crossovers.user_file(GPU, {"XDG_CACHE_HOME": str(tmp_path)}), 17, GPU, "triton")
    table = crossovers.find(GPU, {"XDG_CACHE_HOME": str(tmp_path)})
    assert op.select(call, machine) == "reference"
    assert "triton: gate has 16 elements; below 17 the reference is faster" in op.explain(call, machine)
    assert op.select(call, machine, "triton") == "triton"
    assert op.select(op.check(gate.requires_grad_(), gate), machine) == "triton"


def test_siblings_of_lora_linear_are_measured_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, a, b = torch.zeros(8, 4), torch.zeros(4, 4), torch.zeros(2, 4), torch.zeros(4, 2)
    group = OPS["lora_linear_group"]
    call = group.check(x, [weight], [a], [b], [1.0])
    assert "the number of rows is 8; below 512" in group.explain(call, backends.machine(x.device))
    sizes = crossovers.CPU.cpu("lora_linear")
    for key in sizes:
        monkeypatch.setitem(sizes, key, 8)
    assert group.select(call, Machine("cpu")) == "cpu"


def test_ops_do_as_the_named_table_says(tmp_path: Path) -> None:
    """In a process of its own: a table is read at import."""
    code = """
import sys, torch, mmfast.ops
module = sys.modules["mmfast.ops.swiglu"]
module._fwd_packed = lambda *arguments: sys.exit("the kernel ran")
gate = torch.randn(512, 1024)
torch.set_grad_enabled(False)
assert torch.equal(mmfast.ops.swiglu(gate, gate), module.reference(gate, gate))
print(mmfast.ops.explain("swiglu", gate, gate))
"""
    runs = []
    for size in (2**40, 2**19):
        table = write(tmp_path / "table.json", size, key="packed forward")
        env = {**os.environ, "PYTHONSAFEPATH": "1", "MMFAST_CROSSOVERS": str(table)}
        runs.append(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True))
    assert (runs[0].returncode, runs[1].stderr) == (0, "the kernel ran\n"), runs
    below = f"gate has 524288 elements; below {2**40} the reference is faster"
    assert runs[0].stdout.startswith(f"swiglu runs on: reference\n  cpu: {below}\n")


def test_a_compiled_call_does_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    compiled = torch.compile(swiglu, fullgraph=True, backend="eager")
    gate = torch.randn(8, 64)
    torch.testing.assert_close(compiled(gate, gate), swiglu(gate, gate))
    monkeypatch.setitem(crossovers.CPU.cpu("swiglu"), "forward", 8 * 64)
    torch.compiler.reset()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["mmfast.ops.swiglu"], "reference", lambda *arguments: pytest.fail("not the kernel"))
        found = compiled(gate, gate)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * gate)
