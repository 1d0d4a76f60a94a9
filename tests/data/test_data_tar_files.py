"""WebDataset tars: what is in them, in any order, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.data import TarSamples, expand_braces, load_image
from mmfast.data.samples import StoredMedium, media_of
from mmfast.evaluate.samples import open_samples


def image(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def turns(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes."}]}


def test_pairs_of_an_image_and_a_caption(tmp_path: Path) -> None:
    files = {
        "a/0.png": image("red"),
        "a/0.txt": b"A Red.",
        "a/0.cls": b"7",
        "b/0.txt": b"Two.",
        "b/0.png": image("blue"),
    }
    samples = TarSamples([write_tar(tmp_path / "s.tar", files)])
    assert samples.ids == ["s/a/0", "s/b/0"]
    for index, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        (part, _) = samples[index]["messages"][0]["content"]
        assert isinstance(part, dict)
        assert load_image(part, None, "x").getpixel((0, 0)) == colour  # type: ignore[arg-type]
    assert samples[0]["messages"][1]["content"] == "a red", "as a caption of JSON"


def test_records_name_or_place_their_media(tmp_path: Path) -> None:
    two = {"image": ["x/1.jpg", "x/2.jpg"], "conversations": [
        {"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Both."}]}  # fmt: skip
    placed = turns({"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "it?"})
    files = {
        "0.1.png": image("red"), "0.2.png": image("blue"), "0.json": json.dumps(two).encode(),
        "1.json": json.dumps(placed).encode(), "1.jpg": image("lime"),
        "2.json": json.dumps({"instruction": "Add.", "input": "1 1", "output": "2"}).encode(),
        "3.json": json.dumps({"url": "u"}).encode(), "3.jpg": image("lime"), "3.txt": b"Green",
    }  # fmt: skip
    samples = TarSamples([write_tar(tmp_path / "s.tar", files)])
    names = [[str(medium) for _, medium in media_of(sample)] for sample in samples]
    assert names == [
        [f"{tmp_path}/s.tar:{name}" for name in group] for group in (["0.1.png", "0.2.png"], ["1.jpg"], [], ["3.jpg"])
    ]
    assert [part["type"] for part in samples[1]["messages"][0]["content"]] == ["text", "image", "text"]  # type: ignore[index]
    assert samples[2]["messages"][1]["content"] == "2"


def test_shards_are_read_in_any_order_and_in_other_processes(tmp_path: Path) -> None:
    for shard in range(3):
        files = {f"{n}.{ending}": b"%d-%d" % (shard, n) for n in range(20) for ending in ("txt", "png")}
        write_tar(tmp_path / f"s-{shard:02}.tar", files)
    samples, folder = open_samples(f"{tmp_path}/s-{{00..02}}.tar")
    assert folder is None and len(samples) == 60
    copy = pickle.loads(pickle.dumps(samples))
    order = list(range(60))
    random.Random(0).shuffle(order)
    for index in order:
        for read in (samples, copy):
            (_, medium), caption = next(media_of(read[index])), read[index]["messages"][1]["content"]
            assert isinstance(medium, StoredMedium)
            assert medium.read() == b"%d-%d" % divmod(index, 20)
            assert caption == f"{index // 20}-{index % 20}"


def test_a_changed_tar_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"0.txt": b"one", "0.png": image("red")})
    samples = TarSamples([path])
    write_tar(path, {"x.txt": b"other", "0.txt": b"one", "0.png": image("red")})
    with pytest.raises(RuntimeError, match=r"s.tar: the file has changed since it was opened"):
        samples[0]


def test_expand_braces() -> None:
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{x,y}-{1..2}") == ["x-1", "x-2", "y-1", "y-2"]
    assert expand_braces("plain.tar") == ["plain.tar"]
