"""Training does not depend on the format that the data lies in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.train import TrainConfig, train

MakeConfig = Callable[..., TrainConfig]


def write_tars(records: list[dict[str, Any]], media: Path, out: Path) -> str:
    """Two tars, the images beside records whose parts have lost their paths."""
    for shard, part in enumerate((records[:12], records[12:])):
        with tarfile.open(out / f"s-{shard}.tar", "w") as tar:
            for record in part:
                files = {}
                for place in record["messages"][0]["content"]:
                    if place["type"] == "image":
                        files["png"] = (media / place.pop("image")).read_bytes()
                for ending, content in {**files, "json": json.dumps(record).encode()}.items():
                    member = tarfile.TarInfo(f"{record['id']}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"tar:{out}/s-{{0..1}}.tar"


def write_rows(records: list[dict[str, Any]], media: Path, out: Path) -> str:
    datasets: Any = pytest.importorskip("datasets")
    text = datasets.Value("string")
    message = {"role": text, "content": [{"type": text, "text": text}]}
    features = datasets.Features({"id": text, "images": [datasets.Image()], "messages": [message]})
    rows: dict[str, list[Any]] = {"id": [], "images": [], "messages": []}
    for record in records:
        question, answer = record["messages"]
        images = [Image.open(media / part.pop("image")) for part in question["content"] if part["type"] == "image"]
        answer["content"] = [{"type": "text", "text": answer["content"]}]
        for part in question["content"]:
            part.setdefault("text", None)
        for key, value in zip(rows, (record["id"], images, record["messages"]), strict=True):
            rows[key].append(value)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(out / "rows")
    datasets.enable_progress_bars()
    return str(out / "rows")


@pytest.mark.parametrize("write", [write_tars, write_rows])
def test_the_same_samples_train_the_same(
    make_config: MakeConfig, data: str, tmp_path: Path, write: Callable[..., str]
) -> None:
    records = json.loads(Path(data).read_text())
    losses = []
    for name in (data, write(records, Path(data).parent, tmp_path)):
        out = tmp_path / f"run-{len(losses)}"
        train(make_config(data=name, out=str(out), num_workers=1, stages=make_config().stages[:1]))
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and len(losses[0]) == 4
