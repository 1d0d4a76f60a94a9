"""Accepting a change: on purpose, wholly or not at all, and said aloud where nothing can be compared."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from guarded import records


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", records.ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(read: int) -> records.Record:
    return records.Record({"torch": "2"}, {"op | cpu | forward": {"read": read, "launches": {"aten.mm": 1}}})


def test_a_record_is_read_back_and_has_a_line_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    records.save(path, record(4))
    assert records.load(path) == record(4)
    assert '  "op | cpu | forward": {"read": 4, "launches": {"aten.mm": 1}}' in path.read_text().splitlines()


def test_only_accept_replaces_what_was_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard, path = script("guard"), tmp_path / "counts.json"
    records.save(path, record(4))
    assert not guard.settle(path, record(8), accept=False)
    assert records.load(path) == record(4)
    assert "op | cpu | forward, read: 4 -> 8 (+100.0%)" in capsys.readouterr().out
    assert guard.settle(path, record(8), accept=True)
    assert records.load(path) == record(8)
    assert guard.settle(path, record(8), accept=False)


def test_rows_of_other_versions_are_not_compared_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard, path, found = script("guard"), tmp_path / "counts.json", record(8)
    records.save(path, record(4))
    found.versions = {"torch": "3"}
    assert guard.settle(path, found, accept=False)
    assert "1 rows NOT COMPARED, accepted of {'torch': '2'}, this is {'torch': '3'}" in capsys.readouterr().out
    assert not guard.settle(path, found, accept=False, versioned=lambda name: " | reference | " in name)


def test_a_record_that_cannot_be_written_leaves_the_accepted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "counts.json"
    records.save(path, record(4))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.save(path, record(8))
    assert records.load(path) == record(4)
    assert list(tmp_path.iterdir()) == [path]


def test_a_message_shows_what_changed_and_how_to_accept_it() -> None:
    message = records.complaint(records.COUNTS, records.differences({"op": 1}, {"op": 2}))
    assert message == (
        "1 figures are not those of tests/guard/counts.json:\n  op: 1 -> 2 (+100.0%)\n"
        "If that is meant: python scripts/guard.py --accept"
    )


def test_registers_are_compared_with_those_of_the_same_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    compiler = script("compile_kernels")
    monkeypatch.setattr(records, "COMPILED", tmp_path / "compile.json")
    rows = [compiler.Row("swiglu: forward", "sm_90", 40, 0, 1024, False)]
    assert compiler.compare(rows, {}, set(), accept=True) == []
    rows[0].registers = 48
    change = "swiglu: forward, sm_90: 40 registers, 1024 B shared -> 48 registers, 1024 B shared"
    assert compiler.compare(rows, {}, set(), accept=False) == [change]
    assert "python scripts/compile_kernels.py --accept" in capsys.readouterr().out
    monkeypatch.setattr(compiler, "triton_versions", lambda: {"triton": "0"})
    assert compiler.compare(rows, {}, set(), accept=False) == []
    assert "NOT COMPARED" in capsys.readouterr().out


def test_kernels_of_accepted_source_and_versions_keep_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    compiler = script("compile_kernels")
    monkeypatch.setattr(records, "COMPILED", tmp_path / "compile.json")
    rows = [compiler.Row(name, "sm_90", 40) for name in ("rope: forward", "swiglu: backward", "swiglu: forward")]
    sources = {"rope": "1", "swiglu": "2"}
    assert compiler.unchanged(sources) == set()
    compiler.compare(rows, sources, set(), accept=True)
    assert compiler.unchanged(sources) == {"rope", "swiglu"}
    changed = {"rope": "1", "swiglu": "3", "int8": "4"}
    assert compiler.unchanged(changed) == {"rope"}
    gone = "swiglu: backward, sm_90: 40 registers, 0 B shared -> nothing"
    assert compiler.compare(rows[2:], changed, {"rope"}, accept=False) == [gone]
    compiler.compare(rows[2:], changed, {"rope"}, accept=True)
    assert records.load(records.COMPILED).rows.keys() == {"rope: forward", "swiglu: forward"}
    assert compiler.unchanged(changed) == changed.keys()
    monkeypatch.setattr(compiler, "triton_versions", lambda: {"triton": "0"})
    assert compiler.unchanged(changed) == set()


def test_a_source_is_all_that_a_kernel_is_compiled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    compiler = script("compile_kernels")
    kernel = SimpleNamespace(__name__="kernel", arg_names=["x", "size"], cache_key="its source and what it inlines")
    case = {"name": "a", "fn": kernel, "signature": {"x": "*fp32", "size": "constexpr"}, "constexprs": {"size": 4}}
    case |= {"attrs": {}, "num_warps": 4}
    changes = [
        {},
        {"name": "b"},
        {"fn": SimpleNamespace(**{**vars(kernel), "cache_key": "another source"})},
        {"signature": {"x": "*fp16", "size": "constexpr"}},
        {"constexprs": {"size": 8}},
        {"attrs": {(0,): [["tt.divisibility", 16]]}},
        {"num_warps": 8},
        {"num_stages": 3},
        {"capabilities": (90,)},
    ]
    digests = set()
    for change in changes:
        monkeypatch.setattr(compiler, "_cases", lambda module, made=case | change: [made])
        digests.add(compiler._source("swiglu"))
    assert len(digests) == len(changes)


def test_two_forms_of_one_name_are_refused() -> None:
    compiler = script("compile_kernels")
    rows = [compiler.Row("swiglu: forward", "sm_90", 40), compiler.Row("swiglu: forward", "sm_90", 41)]
    with pytest.raises(ValueError, match="two forms are called 'swiglu: forward'"):
        compiler.figures(rows)
