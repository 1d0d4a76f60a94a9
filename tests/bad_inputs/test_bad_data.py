"""Bad data sets: what `--data` refuses, and how it says so."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import BadInput, check_text, table

from mmfast.cli import main
from mmfast.data import BadSampleError, StoredMedium
from mmfast.data.records import RecordReader, VideoFiles
from mmfast.evaluate.samples import FORMATS, open_samples

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
GOOD = json.dumps({"id": "a", "messages": TURNS})
Maker = Callable[[Path], str]


def file(name: str, content: bytes | str, data: str = "{path}") -> Maker:
    """Writes a file; the data set is called `data`, in which "{path}" stands for its path."""

    def make(folder: Path) -> str:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return data.replace("{path}", str(folder / name))

    return make


def record(**fields: Any) -> Maker:
    return file("d.json", json.dumps([{"id": "one", "messages": TURNS, **fields}]))


def turns(*turns: tuple[str, Any]) -> Maker:
    return record(messages=[{"role": role, "content": content} for role, content in turns])


def user(*parts: Any) -> Maker:
    return turns(("user", list(parts)), ("assistant", "That."))


def tar(*members: tarfile.TarInfo | tuple[str, bytes], cut: int = 0) -> Maker:
    def make(folder: Path) -> str:
        with tarfile.open(folder / "s.tar", "w") as archive:
            for member in members:
                if isinstance(member, tuple):
                    info = tarfile.TarInfo(member[0])
                    info.size = len(member[1])
                    archive.addfile(info, io.BytesIO(member[1]))
                else:
                    archive.addfile(member)
        if cut:
            content = (folder / "s.tar").read_bytes()
            (folder / "s.tar").write_bytes(content[:cut])
        return str(folder / "s.tar")

    return make


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def folder_of(**files: str) -> Maker:
    def make(folder: Path) -> str:
        for name, content in files.items():
            (folder / name).write_text(content)
        return f"hf:{folder}"

    return make


def called_json(folder: Path) -> str:
    (folder / "d.json").mkdir()
    return str(folder / "d.json")


ACCEPTED = ["accepted are", "alpaca:<file>.json", "scienceqa:", "hf:", "tar:", "world:<split>"]
PROBLEM = {"question": "Q", "choices": ["x", "y"], "answer": 0, "split": "train"}

NAMES = [
    BadInput("no such file", lambda folder: "/no/d.json", ["data: '/no/d.json'", *ACCEPTED], FileNotFoundError),
    BadInput(
        "no such path", lambda folder: "/no/d.xyz", ["data: '/no/d.xyz': there is no", *ACCEPTED], FileNotFoundError
    ),
    BadInput("no such format", lambda folder: "parquet:d", ["data: 'parquet:d'", *ACCEPTED], FileNotFoundError),
    BadInput("an unknown ending", file("d.csv", "a,b"), ["d.csv': its format is not known", *ACCEPTED]),
    BadInput("an empty folder", str, ["its format is not known", *ACCEPTED]),
    BadInput("a folder called .json", called_json, ["d.json", "Is a dir"], OSError),
    BadInput(
        "no ScienceQA",
        lambda folder: "scienceqa:/no/p.json:test",
        ["'scienceqa:/no/p.json:test'", "/no/p.json", *ACCEPTED],
        OSError,
    ),
    BadInput("ScienceQA without a split", lambda folder: "scienceqa:p.json", ["names no split", "<split>"]),
    BadInput(
        "no such split",
        file("p.json", json.dumps({"1": PROBLEM}), "scienceqa:{path}:dev"),
        "no split 'dev'; accepted are train",
    ),
    BadInput("no such world", lambda folder: "world:dogs", "there is no data set 'dogs'; accepted are"),
    BadInput(
        "no such tar",
        lambda folder: f"{folder}/s-{{0..1}}.tar",
        ["cannot be opened", "s-0.tar", *ACCEPTED],
        FileNotFoundError,
    ),
    BadInput("a range that falls", lambda folder: "tar:s-{9..1}.tar", "{9..1} in 's-{9..1}.tar' counts"),
    BadInput("a range without end", lambda folder: "tar:s-{0..999999999}.tar", "1 to 100000 are accepted"),
    BadInput(
        "no such data set",
        lambda folder: "hf:/no/rows:train",
        ["data: 'hf:/no/rows:train'", *ACCEPTED],
        FileNotFoundError,
    ),
]

FILES = [
    BadInput("nothing", file("d.json", b""), "d.json: no samples"),
    BadInput("an empty list", file("d.json", "[]"), "d.json: no samples"),
    BadInput("a cut list", file("d.json", f"[{GOOD},"), "d.json:1: broken JSON"),
    BadInput("a list without its end", file("d.json", f"[{GOOD}"), "d.json: broken JSON: '' where its list ends"),
    BadInput("two lists", file("d.json", f"[{GOOD}][{GOOD}]"), "d.json: broken JSON"),
    BadInput("a cut line", file("d.jsonl", f"{GOOD}\n{GOOD[:-4]}"), "d.jsonl:2: broken JSON"),
    BadInput("a list with lines", file("d.jsonl", f"[{GOOD}\n{GOOD}]"), "d.jsonl: broken JSON"),
    BadInput("zeros, as after a crash", file("d.jsonl", GOOD.encode() + b"\n" + bytes(64)), "d.jsonl:2: broken JSON"),
    BadInput("another encoding", file("d.jsonl", GOOD.encode("utf-16")), "d.jsonl:1: not UTF-8"),
    BadInput("a compressed file", file("d.json", gzip.compress(GOOD.encode())), "d.json:1: not UTF-8"),
    BadInput("deep nesting", file("d.json", "[" * 100_000), "d.json:1: nested too deeply"),
    BadInput("deep nesting in a line", file("d.jsonl", '{"a": ' * 100_000), "d.jsonl:1: nested too deeply"),
    BadInput("a number", file("d.json", "[3]"), "d.json: a record is 3; expected an object"),
    BadInput(
        "an id twice", file("d.jsonl", f"{GOOD}\n{GOOD}"), "d.jsonl:2: sample 'a': an earlier sample has the same"
    ),
    BadInput("no turns", record(messages=[]), "'one': messages is []"),
    BadInput("turns that are a text", record(messages="hi"), "'one': messages is 'hi'"),
    BadInput("an unknown role", turns(("bot", "x")), "'one': messages[0].role is 'bot'"),
    BadInput("an answer first", turns(("assistant", "x")), "'one': messages[0] is a turn of 'assistant'"),
    BadInput("two questions", turns(("user", "x"), ("user", "y")), "'one': messages[1] is a turn of 'user'"),
    BadInput("a system alone", turns(("system", "x")), "'one': only a system turn"),
    BadInput(
        "an empty answer", turns(("user", "x"), ("assistant", " ")), "'one': messages[1].content: the answer is empty"
    ),
    BadInput("an unknown part", user({"type": "audio", "audio": "a.wav"}), "'one': messages[0].content[0] is"),
    BadInput("an image without a path", user({"type": "image"}), "'one': messages[0].content[0].image is None"),
    BadInput(
        "an image in an answer",
        turns(("user", "x"), ("assistant", [{"type": "image", "image": "a"}])),
        "move it to a user turn",
    ),
    BadInput(
        "a path above",
        user({"type": "image", "image": "../a.png"}),
        "'one': image path '../a.png' leaves the media folder",
    ),
    BadInput(
        "half a character",
        turns(("user", "a \ud83d?"), ("assistant", "x")),
        "content[0].text has half a character at 2",
    ),
    BadInput("no Alpaca", file("d.json", f"[{GOOD}]", "alpaca:{path}"), ["sample 'a'", "a record of alpaca's form"]),
    BadInput(
        "Alpaca without an output", file("d.json", '[{"instruction": "x"}]'), "'d-0': output is None; expected a text"
    ),
    BadInput(
        "ScienceQA without choices",
        file("p.json", json.dumps({"7": {**PROBLEM, "choices": 3}}), "scienceqa:{path}:train"),
        "problem '7': choices is 3",
    ),
]

TARS = [
    BadInput("no tar", file("s.tar", b"<html>Not found</html>" * 99), "s.tar: ReadError"),
    BadInput("an empty tar", tar(), "holds no samples"),
    BadInput("a compressed tar", file("s.tar", gzip.compress(bytes(10240))), ["s.tar: ReadError", "not compressed"]),
    BadInput("a tar cut in a file", tar(("0.txt", b"x" * 5000), ("0.jpg", b"y" * 50_000), cut=20_000), "s.tar"),
    BadInput("a link", tar(special("0.jpg", tarfile.SYMTYPE, "/etc/passwd")), "s.tar: '0.jpg' is no plain file"),
    BadInput(
        "a hard link", tar(("a.txt", b"x"), special("0.jpg", tarfile.LNKTYPE, "a.txt")), "'0.jpg' is no plain file"
    ),
    BadInput("a device", tar(special("0.jpg", tarfile.CHRTYPE)), "s.tar: '0.jpg' is no plain file"),
    BadInput("a name above", tar(("../0.jpg", b"x")), "s.tar: the name '../0.jpg' leads out of the tar"),
    BadInput("an absolute name", tar(("/etc/0.jpg", b"x")), "s.tar: the name '/etc/0.jpg' leads out of the tar"),
    BadInput("a name twice", tar(("0.txt", b"x"), ("0.txt", b"y")), "s.tar: it has two files '0.txt'"),
    BadInput("no text", tar(("0.jpg", b"x")), "s.tar: sample 's/0': it has neither a .json nor a .txt"),
    BadInput("broken JSON", tar(("0.json", b"{"), ("0.jpg", b"x")), "s.tar:0.json: broken JSON"),
    BadInput(
        "a list", tar(("0.json", b"[]"), ("0.jpg", b"x")), "s.tar:0.json: it holds a list; one object is accepted"
    ),
    BadInput("another encoding", tar(("0.txt", b"\xff\xfe"), ("0.jpg", b"x")), "s.tar:0.txt: not UTF-8"),
    BadInput(
        "fewer images than it names",
        tar(("0.json", b'{"image": ["a", "b"], "conversations": []}'), ("0.jpg", b"x")),
        "s.tar: sample 's/0': it names 2 images, but 1 are stored with it",
    ),
    BadInput(
        "an image without a part",
        tar(("0.json", GOOD.encode()), ("0.jpg", b"x")),
        "1 of the images stored with it have no part",
    ),
]


def read_all(data: str) -> None:
    samples, _ = open_samples(data)
    for index in range(len(samples)):
        samples[index]


@table(NAMES)
def test_bad_name(case: BadInput, tmp_path: Path) -> None:
    case.check(tmp_path, read_all)


@table(FILES)
def test_bad_file(case: BadInput, tmp_path: Path) -> None:
    case.check(tmp_path, read_all)


@table(TARS)
def test_bad_tar(case: BadInput, tmp_path: Path) -> None:
    case.check(tmp_path, read_all)


@table([case for case in FILES if "'one'" in case.text or case.name in ("a cut line", "a number", "an id twice")])
def test_without_strictness_a_bad_record_raises_when_it_is_read(case: BadInput, tmp_path: Path) -> None:
    """The same error, as late as training with a budget and `data check` want it."""
    samples, _ = open_samples(case.make(tmp_path), strict=False)
    with pytest.raises(BadSampleError) as info:
        samples[len(samples) - 1]
    check_text(str(info.value), case.text, tmp_path)


FORMS: list[dict[str, Any]] = [
    {"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}, TURNS[1]]},
    {"id": "a", "image": ["x", "y"], "conversations": [
        {"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}]},
    {"id": "a", "video": "x", "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}]},
    {"instruction": "x", "input": "y", "output": "z", "image": "a"},
    {"image": "a", "caption": "b"},
    {"q": "x", "a": "y", "video_id": "z"},
]  # fmt: skip
ODD = [None, 3, -0.5, True, "", "x", [], {}, [[]], {"type": []}, [{"type": {}}], "<image>", "\0", "a" * 300, "../x"]


def replaced(value: Any, draw: random.Random) -> Any:
    """`value` with something odd in one place of it."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.2:
        return draw.choice(ODD)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    copy[key] = replaced(value[key], draw)  # type: ignore[index]
    return copy


def test_whatever_is_in_a_record_the_error_is_one_of_the_sample() -> None:
    """No TypeError, KeyError or the like, which would end a run with a budget, or `data check`."""
    draw = random.Random(0)
    reader = RecordReader("d", VideoFiles(Path("/no")))
    media = {"image": [StoredMedium("i", bytes)], "video": [StoredMedium("v", bytes)]}
    refused: list[str] = []
    for _ in range(3000):
        record = replaced(draw.choice(FORMS), draw)
        stored = draw.choice([media, {"image": [], "video": []}])
        try:
            if isinstance(record, dict) and draw.random() < 0.5:
                reader.stored(record, stored, "name", 0, "d.tar", "/no")
            else:
                reader.sample(record, 0, "d.json")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 1500
    assert all(error.startswith(("d.tar: ", "d.json: ")) for error in refused)


@pytest.mark.parametrize("command", [["eval", "run", "--data"], ["data", "check"], ["data", "preview"]])
@pytest.mark.parametrize("data", ["/no/d.json", "scienceqa:/no/p.json:test", "foo:bar", "hf:/no/rows"])
def test_commands_name_the_argument_and_what_is_accepted(
    command: list[str], data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmfast.evaluate.accuracy._open", lambda *_: None)  # the run is not what is bad
    assert main([*command, data]) == 1
    said = capsys.readouterr().err
    check_text(said, [f"data: {data!r}", *(known.form for known in FORMATS.values())], Path())
    assert "Errno" not in said
