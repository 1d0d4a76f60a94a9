"""`mmfast bench crossover`: what it measures, how it decides, and what it writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.benchmarks import crossover as bench
from mmfast.benchmarks.crossover import Point, Subject, forced, search
from mmfast.benchmarks.crossover_ladders import LADDERS, Ladder
from mmfast.cli import main
from mmfast.ops import backends, crossovers

CPU = torch.device("cpu")


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Points whose ratio is 1 at 2^15, without timing; the user's table."""
    monkeypatch.setattr(Subject, "point", lambda self, size, rounds=None: Point(size, size / 2**15))
    monkeypatch.setattr("mmfast.benchmarks.harness.allow_buffer_reuse", lambda: None)  # it is for the whole process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return crossovers.user_file(crossovers.device_name(CPU))


def points(*ratios: float, noise: float = 0.0) -> list[Point]:
    """Of sizes 1, 2, 4, ..."""
    return [Point(2**place, ratio, noise) for place, ratio in enumerate(ratios)]


def same(size: int) -> Point:
    """A second look that finds a loss."""
    return Point(size, 0.5)


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        (points(0.5, 0.8, 1.1, 1.5), 4),
        (points(1.1, 1.2, 1.3, 1.4), 1),
        (points(0.5, 1.2, 0.9, 1.5), 8),  # from where on it is never slower, not from where it is first faster
        (points(1.5, 1.4, 1.2, 0.9), None),
        (points(0.5, 0.985, 1.1, 1.5), 2),  # within 2 %
        (points(0.5, 0.96, 1.1, 1.5), 4),
        (points(0.5, 0.96, 1.1, 1.5, noise=0.045), 2),  # within the scatter
        (points(0.5, 0.94, 1.1, 1.5, noise=0.5), 4),  # which does not excuse more than 5 %
        ([], None),
    ],
)
def test_search(measured: list[Point], found: int | None) -> None:
    assert search(measured, same) == found


def test_a_loss_must_be_seen_twice() -> None:
    asked = []

    def again(size: int) -> Point:
        asked.append(size)
        return Point(size, 0.9 if size == 2 else 1.2)

    assert search(points(0.5, 0.9, 1.1, 0.6, 1.5), again) == 4
    assert asked == [8, 2]  # none below the crossover


def test_search_in_noisy_times() -> None:
    """Times of a call that costs 10 µs less and twice as much for each element, under noise of 1.5 %."""
    generator = random.Random(0)

    def measured(size: int) -> Point:
        noise = generator.gauss(1, 0.015)
        return Point(size, noise * (5 + 2e-3 * size) / (15 + 1e-3 * size), 0.015)

    for _ in range(50):  # they cost the same at 10000
        assert search([measured(2**place) for place in range(8, 20)], measured) == 2**14


def test_every_key_has_a_ladder_and_every_ladder_a_key() -> None:
    shipped = crossovers.read(crossovers.SHIPPED / "cpu.json").ops
    assert {(ladder.op, ladder.key) for ladder in LADDERS} == {
        (op, key) for op in shipped for key in shipped[op]["cpu"]
    }
    for ladder in LADDERS:
        assert ladder.sizes[0] < shipped[ladder.op]["cpu"][ladder.key] < ladder.sizes[-1]


def subjects() -> list[Any]:
    """On a CPU with 16-bit products and on one without them, so that every ladder has some."""
    return [
        pytest.param(ladder, fast, id=f"{ladder.op}-{ladder.key}-{'fast' if fast else 'slow'}")
        for ladder in LADDERS
        for fast in (True, False)
    ]


@pytest.mark.parametrize(("ladder", "fast"), subjects())
def test_the_calls_of_a_ladder(ladder: Ladder, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass the check, have the size and the key, and run as the table says."""
    monkeypatch.setattr("mmfast.ops.products._has_products", lambda dtype: fast or dtype == torch.float32)
    sizes = ladder.sizes[:2]
    for dtype, trained in ladder.variants("cpu"):
        _as_the_table_says(Subject(ladder, dtype, trained, CPU, rounds=1), sizes, monkeypatch)


def _as_the_table_says(subject: Subject, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ladder, op = subject.ladder, backends.OPS[subject.ladder.op]
    for size in sizes:
        call = op.check(*subject.arguments(size))
        counted = {key: number for key, number, _ in op.sizes(call, backends.machine(CPU))}
        assert counted[ladder.key] == size
    assert subject.backend(size, 0) == "cpu"
    assert subject.backend(size, crossovers.NEVER) == "reference"
    thresholds = crossovers.CPU.cpu(ladder.op)
    for key in thresholds:
        monkeypatch.setitem(thresholds, key, sizes[1] if key == ladder.key else 0)
    chosen = [op.select(op.check(*subject.arguments(size)), backends.machine(CPU)) for size in sizes]
    assert chosen == ["reference", "cpu"]


def test_every_ladder_has_a_variant_on_some_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = dict.fromkeys(LADDERS, 0)
    for fast in (True, False):
        monkeypatch.setattr("mmfast.ops.products._has_products", lambda dtype, fast=fast: fast or dtype.itemsize > 2)
        for ladder in LADDERS:
            variants[ladder] += len(ladder.variants("cpu"))
    assert all(variants.values())


def test_a_measurement_times_both_and_restores_the_table() -> None:
    before = dict(crossovers.CPU.cpu("swiglu"))
    subject = Subject(LADDERS[1], torch.float32, True, CPU, rounds=1)
    ran = []
    run = subject.run
    subject.run = lambda arguments: ran.append(crossovers.CPU.cpu("swiglu")["backward"]) or run(arguments)  # type: ignore
    point = subject.point(2**13)
    assert point.size == 2**13 and point.ratio > 0
    assert set(ran) == {0, crossovers.NEVER} and abs(ran.count(0) - len(ran) / 2) < 1
    assert crossovers.CPU.cpu("swiglu") == before


def test_on_a_gpu_its_backends_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H900, sm_90"
    table = crossovers.find(name, {})
    table.ops["swiglu"]["triton"] = {"forward": 5}
    monkeypatch.setattr(crossovers, "device_name", lambda device: name)
    monkeypatch.setattr(crossovers, "in_force", {name: table}.__getitem__)
    op, gate = backends.OPS["swiglu"], torch.zeros(2, 8, requires_grad=True)
    call, on = op.check(gate, gate), backends.Machine("cuda", (9, 0), gpu=name)
    with forced("swiglu", torch.device("cuda")) as force:
        assert op.select(call, on) == "triton"
        force(crossovers.NEVER)
        assert op.select(call, on) == "reference"
    assert op.select(call, on) == "triton"
    assert (table.ops["swiglu"]["triton"], table.ops["swiglu"]["cuda"]) == ({"forward": 5}, {})


def test_a_busy_machine_is_named(
    swift: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "crossover", "swiglu", "--device", "cpu", "--dry-run"]) == 0
    assert "quiet" not in capsys.readouterr().out
    monkeypatch.setattr(Subject, "point", lambda self, size, rounds=None: Point(size, 1.5, 0.3))
    assert main(["bench", "crossover", "rope", "--device", "cpu", "--dry-run"]) == 0
    assert "24 points scatter by more than 20%; is the machine quiet?" in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(LADDERS[0], torch.float32, False, CPU, rounds=1)
    monkeypatch.setattr("mmfast.ops.swiglu", lambda gate, up: gate * crossovers.CPU.cpu("swiglu")["forward"])
    with pytest.raises(RuntimeError, match="swiglu, float32, size 4096, backend: result 0 is off by"):
        subject.point(2**12)


def test_the_command_writes_what_ops_read(swift: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "crossover", "swiglu", "--device", "cpu", "--dry-run"]) == 0
    assert "swiglu, forward: cpu from 65536, now from 32768" in capsys.readouterr().out
    assert not swift.exists()
    assert main(["bench", "crossover", "swiglu", "rope", "--device", "cpu"]) == 0
    found = crossovers.find(crossovers.device_name(CPU), {"XDG_CACHE_HOME": str(swift.parents[2])})
    assert found.cpu("swiglu") == dict.fromkeys(crossovers.CPU.cpu("swiglu"), 32768)
    assert found.cpu("rope")["float16 forward"] == 32768
    assert found.cpu("gated_residual") == crossovers.CPU.cpu("gated_residual")
    environment = json.loads(swift.read_text())["environment"]
    assert environment["threads"] == torch.get_num_threads() and environment["rounds"] == 15


def test_a_table_is_added_to(swift: Path) -> None:
    swift.parent.mkdir(parents=True)
    old = {"rope": {"cpu": {"float16 forward": None}}, "swiglu": {"cpu": {"forward": 5}}}
    swift.write_text(json.dumps({"device": crossovers.device_name(CPU), "ops": old}))
    assert main(["bench", "crossover", "swiglu", "--device", "cpu"]) == 0
    new = {"swiglu": {"cpu": dict.fromkeys(crossovers.CPU.cpu("swiglu"), 32768)}}
    assert json.loads(swift.read_text())["ops"] == old | new


def test_never_is_null(swift: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Subject, "point", lambda self, size, rounds=None: Point(size, 0.5))
    assert main(["bench", "crossover", "rope", "--device", "cpu"]) == 0
    assert "cpu from 4194304, now from never" in capsys.readouterr().out
    never = {"float16 forward": None, "float16 backward": None}
    assert json.loads(swift.read_text())["ops"] == {"rope": {"cpu": never}}


@pytest.mark.parametrize("content", ["{", json.dumps({"device": "CPU, another", "ops": {}})])
def test_what_is_no_table_of_this_device(content: str, swift: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's own is replaced; a file that is named is not, and nothing is measured for it."""
    swift.parent.mkdir(parents=True)
    swift.write_text(content)
    named = swift.with_name("named.json")
    named.write_text(content)
    assert main(["bench", "crossover", "swiglu", "--device", "cpu", "--out", str(named)]) == 1
    printed = capsys.readouterr()
    assert str(named) in printed.err and "points" not in printed.out
    assert named.read_text() == content
    assert main(["bench", "crossover", "swiglu", "--device", "cpu"]) == 0
    assert "It will be replaced." in capsys.readouterr().out
    assert set(json.loads(swift.read_text())["ops"]) == {"swiglu"}


def test_a_stop_leaves_the_old_table(swift: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", "crossover", "swiglu", "--device", "cpu"]) == 0
    before, sizes = swift.read_text(), dict(crossovers.CPU.cpu("rope"))

    def stop(self: Subject, size: int, rounds: int | None = None) -> Point:
        raise KeyboardInterrupt

    monkeypatch.setattr(Subject, "point", stop)
    assert main(["bench", "crossover", "swiglu", "--device", "cpu"]) == 130
    assert swift.read_text() == before and [swift] == list(swift.parent.iterdir())
    assert crossovers.CPU.cpu("rope") == sizes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swish"], "'swish' has no crossover; use any of bias_scale_linear, gated_residual"),
        (["--device", "tpu"], "there is no device 'tpu' here; use cpu"),
        (["--rounds", "0"], "rounds is 0; expected at least 1"),
        (["--threads", "0"], "threads is 0; expected at least 1"),
    ],
)
def test_a_bad_command_line_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "crossover", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_backend_for_all_ops_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MMFAST_BACKEND", "cpu")
    assert main(["bench", "crossover"]) == 1
    assert "MMFAST_BACKEND is cpu, so that nothing is selected; unset it" in capsys.readouterr().err


def test_without_a_kernel_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch, swift: Path) -> None:
    monkeypatch.setattr(backends, "machine", lambda device: backends.Machine("cpu", no_extension="it is not built"))
    with pytest.raises(ValueError, match=r"(?s)no kernel of swiglu can run on cpu: .*it is not built"):
        bench.crossover("swiglu", device="cpu")
    assert not swift.exists()
