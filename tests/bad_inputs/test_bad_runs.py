"""Bad configurations, run folders, checkpoints and disks: what `mmfast train` refuses, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import BadInput, table
from disks import read_only, small_files

from mmfast.train import TrainConfig, load_config, save_config
from mmfast.train.checkpoint import read_newest_checkpoint, write_checkpoint
from mmfast.train.log import StepLog
from mmfast.train.run import Progress, RunFolder

Maker = Callable[[Path], Any]


def yaml(text: str | bytes) -> Maker:
    """A configuration file."""

    def make(folder: Path) -> Path:
        path = folder / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


CONFIGS = [
    BadInput("no configuration", lambda folder: folder / "no.yaml", "no.yaml", FileNotFoundError),
    BadInput("no YAML", yaml("stages: ["), ["config.yaml: not readable as YAML", "line"]),
    BadInput("not text", yaml(b"\xff\xfe\x00"), ["config.yaml: not readable as YAML"]),
    BadInput("an empty file", yaml(""), ["config.yaml: holds a NoneType", "mapping of field names is accepted"]),
    BadInput("a list", yaml("- llava\n"), ["config.yaml: holds a list", "mapping"]),
    BadInput("an unknown field", yaml("sytem: llava\n"), ["config.sytem is not a field", "system"]),
    BadInput("an unknown field of a stage", yaml("stages: [{name: a, lrr: {}}]"), "stages.lrr is not a field"),
    BadInput("a stage without a name", yaml("stages: [{batch_size: 4}]"), "stages.name is None"),
    BadInput("a stage that is a word", yaml("stages: [align]"), ["stages.'align'", "mapping"]),
    BadInput("an unknown system", yaml("system: gpt\n"), ["system is 'gpt'", "llava", "accepted"]),
    BadInput("float16", yaml("dtype: float16\n"), ["dtype is 'float16'", "float32 or bfloat16 is accepted"]),
    BadInput("no step between evaluations", yaml("eval_every: 0\n"), ["eval_every is 0", "1 or more is accepted"]),
    BadInput("half a checkpoint", yaml("keep_checkpoints: 0.5\n"), ["keep_checkpoints is 0.5", "1 or more"]),
    BadInput("keep_best as a number", yaml("keep_best: 3\n"), ["keep_best is 3", "true or false is accepted"]),
    BadInput("held-out data as a number", yaml("eval_data: 3\n"), ["eval_data is 3", "a data set"]),
    BadInput("no held-out data in a list", yaml("eval_data: []\n"), ["eval_data is []", "a list of some or null"]),
    BadInput("fewer than no skipped steps", yaml("max_nonfinite_steps: -1\n"), ["max_nonfinite_steps is -1", "0 or"]),
    BadInput("out that is no name", yaml("out: 3\n"), ["out is 3", "a folder is accepted"]),
    BadInput("a learning rate of NaN", yaml("stages: [{name: a, lr: {lora: .nan}}]"), ["stages.lr.lora is nan"]),
    BadInput("a negative rate", yaml("stages: [{name: a, lr: {lora: -1e-3}}]"), ["stages.lr.lora is -0.001"]),
]


@table(CONFIGS)
def test_configurations(case: BadInput, tmp_path: Path) -> None:
    case.check(tmp_path, load_config)


def write(folder: Path, step: int) -> Path:
    tensors = {"trained": {"a": torch.ones(40)}, "optimizer": {}, "rng": {"0/torch": torch.zeros(3)}}
    return write_checkpoint(folder, step, {"progress": Progress(step=step).to_dict()}, tensors, keep=2)


def checkpoint(change: Callable[[Path], object]) -> Maker:
    """A folder with one checkpoint, which is then changed."""

    def make(folder: Path) -> Path:
        change(write(folder, 3))
        return folder

    return make


def state(change: Callable[[dict[str, Any]], object]) -> Maker:
    def edit(path: Path) -> None:
        document = json.loads((path / "state.json").read_text())
        change(document)
        (path / "state.json").write_text(json.dumps(document))

    return checkpoint(edit)


def content(name: str, new: bytes | Callable[[bytes], bytes]) -> Maker:
    def edit(path: Path) -> None:
        file = path / name
        file.write_bytes(new if isinstance(new, bytes) else new(file.read_bytes()))

    return checkpoint(edit)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


NONE_WHOLE = ["no checkpoint is whole", "another --out", "{folder}/step-00000003: "]
CHECKPOINTS = [
    BadInput("cut tensors", content("trained.safetensors", lambda data: data[:50]), [*NONE_WHOLE, "has 50 bytes"]),
    BadInput("no bytes", content("optimizer.safetensors", b""), [*NONE_WHOLE, "optimizer.safetensors has 0 bytes"]),
    BadInput("a flipped bit", content("rng.safetensors", flipped), [*NONE_WHOLE, "rng.safetensors differs", "SHA-256"]),
    BadInput("no tensors", checkpoint(lambda path: (path / "trained.safetensors").unlink()), [*NONE_WHOLE, "No such"]),
    BadInput("no state", checkpoint(lambda path: (path / "state.json").unlink()), [*NONE_WHOLE, "state.json"]),
    BadInput("a state cut off", content("state.json", lambda data: data[:99]), [*NONE_WHOLE, "state.json is not read"]),
    BadInput("a state that is a list", content("state.json", b"[]"), [*NONE_WHOLE, "state.json is not readable"]),
    BadInput("a state that is no text", content("state.json", b"\xff"), [*NONE_WHOLE, "state.json is not readable"]),
    BadInput("a later format", state(lambda document: document.update(format=99)), [*NONE_WHOLE, "has format 99"]),
    BadInput(
        "an altered step", state(lambda d: d["state"]["progress"].update(step=4)), [*NONE_WHOLE, "state.json dif"]
    ),
    BadInput("files forgotten", state(lambda document: document.update(files={})), [*NONE_WHOLE, "state.json differs"]),
]


@table(CHECKPOINTS)
def test_checkpoints(case: BadInput, tmp_path: Path) -> None:
    case.check(tmp_path, read_newest_checkpoint)


CONFIG = TrainConfig(llm="world", encoder="world", data="world:train")


def run(change: Callable[[Path], object], saved: bool = True) -> Maker:
    """A started run, with a checkpoint if `saved`, which is then changed."""

    def make(folder: Path) -> RunFolder:
        place = folder / "run"
        place.mkdir()
        save_config(CONFIG, place / "config.yaml")
        if saved:
            write(place / "checkpoints", 3)
        change(place)
        return RunFolder(place)

    return make


def other_config(**values: Any) -> Maker:
    return run(lambda place: save_config(TrainConfig(**{**vars(CONFIG), **values}), place / "config.yaml"))


def only_damaged(place: Path) -> None:
    (place / "checkpoints" / "step-00000003" / "trained.safetensors").write_bytes(b"")


TO_RESUME = [
    BadInput(
        "no folder", lambda folder: RunFolder(folder / "no"), ["no holds no run to", "config.yaml"], FileNotFoundError
    ),
    BadInput("nothing saved", run(id, saved=False), ["has no checkpoint yet", "without --resume"], FileNotFoundError),
    BadInput("only damaged ones", run(only_damaged), ["no checkpoint is whole", "restore one of"]),
    BadInput("another seed", other_config(seed=7), ["seed is 0", "was started with 7", "resume with --config"]),
    BadInput("other held-out data", other_config(eval_data="world:val"), ["eval_data is None", "with 'world:val'"]),
    BadInput("a configuration cut off", run(lambda p: (p / "config.yaml").write_text("stages: [")), "not readable as"),
]


@table(TO_RESUME)
def test_runs_to_resume(case: BadInput, tmp_path: Path) -> None:
    case.check(tmp_path, lambda folder: folder.resume(CONFIG))


def step_written(place: Path) -> None:
    (place / "log.jsonl").write_text("{}\n")


def a_file(folder: Path) -> RunFolder:
    (folder / "out").write_text("")
    return RunFolder(folder / "out")


TO_START = [
    BadInput("a run with checkpoints", run(id), ["holds a run already (checkpoints)", "--resume"], FileExistsError),
    BadInput("a run with steps", run(step_written, saved=False), ["already (log.jsonl)", "--out"], FileExistsError),
    BadInput("a file in the way", a_file, ["{folder}/out: it cannot be written: Not a dir"], NotADirectoryError),
    BadInput(
        "below a file",
        lambda folder: RunFolder(a_file(folder).path / "x"),
        ["{folder}/out", "Not a"],
        NotADirectoryError,
    ),
]


@table(TO_START)
def test_runs_to_start(case: BadInput, tmp_path: Path) -> None:
    case.check(tmp_path, lambda folder: folder.check_new())


def start(place: Path) -> None:
    RunFolder(place).check_new()


def begin(place: Path) -> None:
    RunFolder(place).start(CONFIG)


def log(place: Path) -> None:
    with StepLog(place / "log.jsonl", 0) as opened:
        opened.write({"step": 1, "text": "x" * 200})


def resume(place: Path) -> None:
    RunFolder(place).resume(CONFIG)


def full(place: Path) -> AbstractContextManager[None]:
    return small_files(100)


FREE = ["File too large", "MB are free on its disk; free some space there, or choose another folder"]
FORBIDDEN = ["Permission denied", "change its permissions, or choose another folder"]
DISKS: dict[str, Any] = {
    "start in a read-only folder": (read_only, start, PermissionError, ["{folder}: it cannot be written", *FORBIDDEN]),
    "resume in a read-only folder": (read_only, resume, PermissionError, ["{folder}: it cannot", *FORBIDDEN]),
    "save in a read-only folder": (
        lambda place: read_only(place / "checkpoints"),
        lambda place: write(place / "checkpoints", 4),
        PermissionError,
        ["step 4 is not saved", *FORBIDDEN, "step-00000003 is whole, and --resume goes on from there"],
    ),
    "a configuration on a full disk": (full, begin, OSError, ["{folder}/config.yaml: it cannot be written", *FREE]),
    "a log on a full disk": (full, log, OSError, ["{folder}/log.jsonl: it cannot be written", *FREE]),
    "a checkpoint on a full disk": (
        full,
        lambda place: write(place / "checkpoints", 4),
        OSError,
        ["step 4 is not saved", "trained.safetensors", *FREE, "step-00000003 is whole"],
    ),
    "a disk without a free byte": (lambda place: small_files(0), start, OSError, ["{folder}: it cannot", *FREE]),
}


@pytest.mark.parametrize("name", DISKS)
def test_disks(name: str, tmp_path: Path) -> None:
    disk, act, error, text = DISKS[name]
    # A run to resume, or the place of one.
    place = tmp_path / "run" if act is not start else tmp_path
    if act is not start:
        run(id)(tmp_path)
    with disk(place):
        BadInput(name, lambda folder: place, [part.replace("{folder}", str(place)) for part in text], error).check(
            tmp_path, act
        )
    assert not list(tmp_path.rglob(".tmp*")), "nothing half-written stays"
    if act is not start:
        assert RunFolder(place).resume(CONFIG).path.name == "step-00000003"


def test_a_checkpoint_of_another_release() -> None:
    with pytest.raises(
        ValueError, match=r"progress cannot be read .*unknown_field.*resume with the release that wrote"
    ):
        Progress.from_dict({**Progress().to_dict(), "unknown_field": 1})
