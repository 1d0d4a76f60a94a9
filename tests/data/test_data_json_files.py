"""JSON files that are indexed: the same samples as of a file that is read whole, in little memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mmfast.data import BadSampleError, JsonSamples, json_files


def records(count: int, words: int = 9) -> list[dict[str, Any]]:
    draw = random.Random(0)
    alphabet = ["a", "ß", "漢", "🐈", "\u2028", '"', "\\", "}", "]", ",", "\n", "[{"]
    texts = [" ".join(draw.choice(alphabet) for _ in range(draw.randrange(1, words))) for _ in range(count)]
    turns = [
        [{"role": "user", "content": f"q {text}"}, {"role": "assistant", "content": f"a {text}"}] for text in texts
    ]
    return [{"id": f"s{index}", "messages": messages} for index, messages in enumerate(turns)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", ["list", "indented", "annotations", "lines", "escaped", "bom"])
def test_every_piece_of_a_file_gives_the_same_samples(
    form: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = records(40)
    text = {
        "list": json.dumps(expected, ensure_ascii=False),
        "indented": f"\n\n  {json.dumps(expected, ensure_ascii=False, indent=3)} \n\t",
        "annotations": json.dumps({"annotations": expected}, ensure_ascii=False),
        "lines": "\r\n".join(json.dumps(record, ensure_ascii=False) for record in expected) + "\n\n",
        "escaped": json.dumps(expected),
        "bom": "\ufeff" + json.dumps(expected, ensure_ascii=False),
    }[form]
    (tmp_path / "d.json").write_bytes(text.encode())
    monkeypatch.setattr(json_files, "_CHUNK", chunk)
    samples = JsonSamples(tmp_path / "d.json")
    assert samples[:] == expected
    order = list(range(40))
    random.Random(1).shuffle(order)
    assert [samples[index] for index in order] == [expected[index] for index in order]
    assert samples[-1] == expected[-1]
    with pytest.raises(IndexError):
        samples[40]


def test_a_large_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", 1 << 14)
    (tmp_path / "d.json").write_text(json.dumps(records(3000, 900)))
    size = (tmp_path / "d.json").stat().st_size
    tracemalloc.start()
    samples = JsonSamples(tmp_path / "d.json")
    for index in range(0, 3000, 100):
        samples[index]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 10e6 > 10 * peak


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(records(3)))
    samples = JsonSamples(tmp_path / "d.json")
    (tmp_path / "d.json").write_text(json.dumps(records(4)))
    with pytest.raises(RuntimeError, match=r"d.json: the file has changed since it was opened"):
        samples[0]


def test_without_strictness_the_others_are_as_before(tmp_path: Path) -> None:
    good = records(4)
    lines = [json.dumps(record) for record in good]
    (tmp_path / "d.jsonl").write_text("\n".join([lines[0], "{", lines[1], lines[0], '{"id": 7}', lines[2], lines[3]]))
    samples = JsonSamples(tmp_path / "d.jsonl", strict=False)
    assert samples.ids == ["s0", "d-1", "s1", "s0#2", "7", "s2", "s3"]
    assert [samples[index] for index in (0, 2, 5, 6)] == good
    for index, fault, text in (
        (1, "malformed", "d.jsonl:2: broken"),
        (3, "duplicate id", "'s0'"),
        (4, "malformed", "'7'"),
    ):
        with pytest.raises(BadSampleError, match=text) as info:
            samples[index]
        assert info.value.fault == fault
