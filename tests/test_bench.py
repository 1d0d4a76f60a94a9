"""The harness of the benchmarks: order, percentiles, gates, floors, files; `mmfast bench` and its documents."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.benchmarks import harness, plot, suite, tables
from mmfast.cli import main
from mmfast.ops import BackendUnavailable

ROOT = Path(__file__).resolve().parents[1]
ONCE = harness.Settings("cpu", rounds=5, seconds=0.0)


def case_of(mode: str = "both", **providers: Callable[..., Any]) -> harness.Case:
    """The square of eight numbers, and of as many that need no gradient."""
    return harness.Case(
        op="square",
        name="8",
        mode=mode,
        arguments=lambda: [torch.randn(8, requires_grad=True), torch.randn(8)],
        providers={"eager": lambda x, y: x * x + y, **providers},
        limit=1e-6,
        bytes=64,
        flops=2 * 300**3,
        device="cpu",
    )


def right(x: Tensor, y: Tensor) -> Tensor:
    return x.square() + y


def test_every_round_has_every_provider_once_in_a_new_order() -> None:
    called: list[str] = []
    providers = {name: (lambda name=name: called.append(name)) for name in "abcd"}
    samples = harness.sample(providers, "cpu", rounds=12, warmup=1)
    assert called[:4] == list("abcd")
    rounds = ["".join(called[i : i + 4]) for i in range(4, len(called), 4)]
    assert len(rounds) == 12 and all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 6
    assert {len(times) for times in samples.values()} == {12}


def test_rounds_go_on_until_the_time_is_spent() -> None:
    slow = harness.sample({"a": lambda: sum(range(20000))}, "cpu", rounds=1, seconds=0.02)["a"]
    assert len(slow) > 5 and sum(slow[:-1]) < 20 <= sum(slow)


def test_memory_that_was_there_before_counts_neither_when_it_is_freed() -> None:
    before: list[Tensor] = []
    assert harness.allocated_bytes(lambda: before.append(torch.empty(1000))) == (4000, 4000)

    def provider() -> Tensor:
        before.clear()
        torch.empty(700)
        return torch.empty(500)

    assert harness.allocated_bytes(provider) == (2800, 2000)


def test_median_and_percentiles() -> None:
    found = harness.summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert found == {"ms": 3.5, "p20": 2.0, "p80": 5.0, "rounds": 6}


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_rows_of_a_case(mode: str) -> None:
    found = harness.run(case_of(mode, peer=right, mmfast=right), ONCE)
    rows = {row["provider"]: row for row in found.rows}
    kinds = {name: row["kind"] for name, row in rows.items()}
    floors = {harness.COPY: "floor", harness.PRODUCT: "floor"}
    assert kinds == {"eager": "baseline", "peer": "peer", "mmfast": "mmfast", **floors}
    for name, row in rows.items():
        assert row["p20"] <= row["ms"] <= row["p80"] and row["rounds"] == 5 and row["mode"] == mode
        assert row["ratio"] == pytest.approx(rows["eager"]["ms"] / row["ms"])
        assert (row["bytes"], row["flops"]) == (64, 2 * 300**3)
        assert harness.summary(found.samples[name])["ms"] == row["ms"]
    assert rows["mmfast"]["cold ms"] > 0 and rows["mmfast"]["peak MiB"] >= 0 and "cold ms" not in rows[harness.COPY]


@pytest.mark.parametrize("flops", [2, 1000, 2 * 100**3, 2 * 2048**3, 4 * 16384 * 4096 * 4096])
def test_the_product_that_is_the_floor_has_the_flops_of_the_case(flops: int) -> None:
    rows, inner = harness._square(flops)
    assert abs(2 * rows * inner * inner - flops) <= inner * inner  # half a row
    assert inner < 64 or inner % 64 == 0


@pytest.mark.parametrize(
    ("wrong", "mode"),
    [
        (lambda x, y: x * x + 1.001 * y, "forward"),
        (lambda x, y: x.detach() * x + y, "both"),
        (lambda x, y: (x.detach().square() + y).requires_grad_(), "backward"),
        (lambda x, y: x * x + y * math.nan, "forward"),
        (lambda x, y: (x * x + y, y), "forward"),
    ],
)
def test_a_wrong_provider_is_refused_and_nothing_is_timed(
    wrong: Callable[..., Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "sample", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match=r"^square, 8, \w+, mmfast: result"):
        harness.run(case_of(mode, mmfast=wrong), ONCE)


def test_a_bound_may_compute_something_else() -> None:
    case = case_of("both", alone=lambda x, y: x + y, mmfast=right)
    found = harness.run(harness.Case(**{**vars(case), "limits": {"alone": math.inf}}), ONCE)
    assert next(row["kind"] for row in found.rows if row["provider"] == "alone") == "bound"


def test_who_cannot_run_is_a_row_with_the_reason_unless_it_is_ours() -> None:
    def fails(*_: Tensor) -> Tensor:
        raise ImportError("peer is not installed")

    def unavailable(*_: Tensor) -> Tensor:
        raise BackendUnavailable("not on this machine")

    found = harness.run(case_of(peer=fails, **{"mmfast:cuda": unavailable}), ONCE)
    left_out = {row["provider"]: row["left out"] for row in found.rows if "left out" in row}
    assert left_out == {"peer": "ImportError: peer is not installed", "mmfast:cuda": "not on this machine"}
    with pytest.raises(ImportError):
        harness.run(case_of(mmfast=fails), ONCE)


def test_a_file_is_whole_and_no_row_is_without_its_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "swiglu", "--device", "cpu", "--quick", "--untested", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mmfast:cpu" in printed and "floor: copy" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["swiglu.json"]
    document = json.loads((tmp_path / "swiglu.json").read_text())
    for row in document["rows"]:
        environment = document["environments"][row["environment"]]
        assert {"device", "torch", "revision", "date", "threads", "clocks", "tests"} <= set(environment)
    assert {row["mode"] for row in document["rows"]} == {"forward", "backward", "both"}
    assert "| 1024x11008 bfloat16, both |" in tables.op_tables(document)


def test_cases_of_one_name_in_two_tables_are_kept_apart() -> None:
    rows = [{"case": "8", "mode": "both", "table": table, "provider": "mmfast"} for table in ("", "on NF4")]
    assert [name for name, _ in tables.by_case(rows)] == ["8, both", "8, both"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swiglo"], "there is no benchmark 'swiglo'; there are bias_scale_linear, "),
        (["swiglu", "--device", "tpu"], "device is 'tpu'; cpu and cuda are accepted"),
        (["swiglu", "--rounds", "0"], "rounds is 0; 1 or more are accepted"),
        (["swiglu", "--threads", "0"], "threads is 0; 1 or more are accepted"),
    ],
)
def test_bad_command_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", suite.op_names())
def test_cases_are_distinct_and_name_a_baseline_and_ours(op: str, device: str) -> None:
    cases = suite.cases(op, harness.Settings(device))
    assert len({(case.table, case.name, case.mode) for case in cases}) == len(cases)
    for case in cases:
        assert case.op == op and "mmfast" in case.providers and case.kind(next(iter(case.providers))) == "baseline"
        assert case.bytes > 0 and case.mode in ("forward", "backward", "both")
    quick = {str(case) for case in suite.cases(op, harness.Settings(device, quick=True))}
    assert quick and quick <= {str(case) for case in cases}


def test_an_op_whose_tests_fail_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    file = tmp_path / "tests/ops/test_swiglu.py"
    file.parent.mkdir(parents=True)
    file.write_text("def test_cpu():\n    assert False, 'the kernel is wrong'\n")
    with pytest.raises(RuntimeError, match=r"tests of swiglu fail, so it is not timed(.|\n)*the kernel is wrong"):
        suite.run_tests("swiglu", "cpu")
    file.write_text("def test_cpu():\n    pass\n")
    assert suite.run_tests("swiglu", "cpu") == "passed"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it ran again"))
    assert suite.run_tests("swiglu", "cpu") == "passed"
    assert suite.run_tests("rope", "cpu") == "none here"


def test_pytest_benchmark_gets_the_samples_that_were_taken(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "-k", "rope and forward", "--bench-quick"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # in whose processes pytest-benchmark measures nothing
    ran = subprocess.run(
        [*command, "--bench-untested", "-p", "no:cacheprovider", f"--benchmark-json={target}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(target.read_text())["benchmarks"]
    assert {one["extra_info"]["provider"] for one in found} >= {"eager", "mmfast", harness.COPY}
    for one in found:
        assert one["stats"]["median"] * 1e3 == pytest.approx(one["extra_info"]["ms"])
        assert one["stats"]["rounds"] == one["extra_info"]["rounds"] >= 5


def test_documents_hold_what_the_results_give() -> None:
    plot.plot(check=True)


def test_steps_before_and_after() -> None:
    before = {"ms": 6.0, "ratio": 1.0, "tokens/s": 100, "peak MiB": 8.0}
    after = {"ms": 4.0, "ratio": 1.5, "tokens/s": 150, "peak MiB": 2.0}
    alone = {**after, "ratio": 1.25}
    environment = {"device": "D", "torch": "2", "revision": "r", "date": "d"}

    def table(make: Callable[..., str], **rows: dict[str, Any]) -> list[str]:
        named = [{"case": "c", "provider": name.replace("__", ":"), **row} for name, row in rows.items()]
        return make({"rows": named, "environments": {"e": environment}}).splitlines()

    checkpointing = {"hf_peft_checkpointing": {**before, "ms": 9.0}, "mmfast_checkpointing": {**after, "ms": 3.0}}
    lines = table(tables.trained, hf_peft=before, mmfast=after, **checkpointing)
    assert lines[2] == "| c | 6.00 ms | 4.00 ms | **1.50** | 8.00 MiB | 2.00 MiB | 150 | 0.25 |"
    assert lines[3] == "| c, checkpointing | 9.00 ms | 3.00 ms | **3.00** | 8.00 MiB | 2.00 MiB | 150 | 0.25 |"
    lines = table(tables.optimized, eager=before, mmfast=after, mmfast__rope=alone)
    assert lines[0].endswith("| peak before | peak after | `rope` alone |")
    assert lines[2] == "| c | 6.00 ms | 4.00 ms | **1.50** | 8.00 MiB | 2.00 MiB | 1.25 |"
    assert table(tables.packed, packed=after)[2:] == [
        "| packed | 150 | 1.50 | 2.00 MiB |",
        "",
        "D, torch 2, revision r, d.",
    ]


def test_a_document_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "number", lambda value: "0")
    with pytest.raises(RuntimeError, match=r"README\.md, .*optimize\.md, .*swiglu\.md.* differ from the results"):
        plot.plot(check=True)


def test_without_matplotlib_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib, which draws, is not installed; `pip install mmfast\[plot\]`"):
        plot.plot()


def test_without_results_the_error_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no results; `mmfast bench --out"):
        plot.plot(tmp_path)


def test_the_table_of_a_gpu_shows_its_figures_and_what_is_missing(tmp_path: Path) -> None:
    shown = next(case for case in suite.cases("swiglu", harness.Settings("cuda", quick=True)) if case.mode == "both")
    about = {"case": shown.name, "table": "", "mode": "both", "timing": "eager", "p20": 1.0, "p80": 3.0}
    rows = [
        {**about, "provider": "eager", "kind": "baseline", "ms": 4.0},
        {**about, "provider": "Liger", "kind": "peer", "ms": 2.5},
        {**about, "provider": "mmfast", "kind": "mmfast", "ms": 2.0, "ratio": 2.0},
        {**about, "provider": harness.COPY, "kind": "floor", "ms": 1.5},
    ]
    environment = {"device": "H", "torch": "2", "revision": "r", "date": "d"}
    (tmp_path / "h").mkdir()
    document = {"op": "swiglu", "environments": {"e": environment}, "rows": rows}
    (tmp_path / "h/gpu_check.json").write_text(json.dumps({"benchmarks": {"swiglu": document}}))
    lines = tables.wanted({"h": tables.read(tmp_path / "h")}).splitlines()
    swiglu = next(line for line in lines if line.startswith("| `swiglu`"))
    assert "4.00 ms | Liger 2.50 ms | 2.00 <sub>1.00 to 3.00</sub> ms | 2.00x | copy 1.50 ms" in swiglu
    assert next(line for line in lines if line.startswith("| `rope`")).count(tables.NOT_MEASURED) == 1
