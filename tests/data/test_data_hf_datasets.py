"""Folders of Hugging Face `datasets`, in all the ways in which they lie on a disk."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.data import HfSamples, load_image
from mmfast.data.samples import StoredMedium, media_of
from mmfast.evaluate.samples import open_samples

datasets: Any = pytest.importorskip("datasets")

COLOURS = ("red", "lime", "blue")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows() -> Any:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [Image.new("RGB", (6, 4), colour) for colour in COLOURS]
    return datasets.Dataset.from_dict({"image": images, "text": list(COLOURS)}, features=features)


def colours(samples: Any) -> list[tuple[int, ...]]:
    parts = [sample["messages"][0]["content"][0] for sample in samples]
    return [load_image(part, None, "x").getpixel((0, 0)) for part in parts]  # type: ignore[misc]


EXPECTED = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_every_layout_on_the_disk(tmp_path: Path) -> None:
    rows().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows(), test=rows().select([2])).save_to_disk(tmp_path / "two")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for part in range(3):
        rows().select([part]).to_parquet(tmp_path / "hub" / "data" / f"train-0000{part}-of-00003.parquet")
    rows().select([1]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    for name in ("one", "hf:{}/one", "hf:{}/two:train", "hf:{}/hub:train"):
        samples, folder = open_samples(name.format(tmp_path) if "{}" in name else str(tmp_path / name))
        assert folder is not None and Path(folder).is_dir()
        assert colours(samples) == EXPECTED
        assert [sample["messages"][1]["content"] for sample in samples] == list(COLOURS)
    assert colours(HfSamples(tmp_path / "two", "test")) == EXPECTED[2:]
    for folder, split in (("two", None), ("hub", None), ("hub", "val")):
        with pytest.raises(ValueError, match=rf"{folder}: the split is {split!r}; one of test, train is accepted"):
            HfSamples(tmp_path / folder, split)


def test_rows_are_read_where_they_are_and_in_other_processes(tmp_path: Path) -> None:
    rows().select([2, 0, 1]).save_to_disk(tmp_path / "rows")
    samples = HfSamples(tmp_path / "rows")
    for read in (samples, pickle.loads(pickle.dumps(samples))):
        assert colours([read[1], read[-1], read[0]]) == EXPECTED
        assert [str(medium) for _, medium in media_of(read[2])] == [f"{tmp_path / 'rows'}[2].image"]
        assert all(isinstance(medium, StoredMedium) for _, medium in media_of(read[2]))


def test_messages_with_their_images_in_a_column(tmp_path: Path) -> None:
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": [part]}
    features = datasets.Features({"id": datasets.Value("string"), "images": [datasets.Image()], "messages": [message]})
    place = {"type": "image", "text": None}
    turns = [
        {"role": "user", "content": [place, {"type": "text", "text": "or"}, place]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    images = [Image.new("RGB", (6, 4), colour) for colour in COLOURS[:2]]
    table = {"id": ["x", "x", "y"], "images": [images, images, images[:1]], "messages": [turns, turns, turns]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "rows")
    samples = HfSamples(tmp_path / "rows")
    assert samples.ids == ["x", "x#2", "y"]
    content: Any = samples[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text", "image"]
    assert [load_image(content[n], None, "x").getpixel((0, 0)) for n in (0, 2)] == EXPECTED[:2]
    assert samples[0]["messages"][1]["content"] == [{"type": "text", "text": "Yes."}]
    with pytest.raises(ValueError, match=r"sample 'y': its messages have more image parts than there are images"):
        samples[2]


def test_paths_stay_in_the_folder(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "in.png")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for name, path in (("inside", "in.png"), ("outside", "/etc/passwd"), ("above", "../in.png")):
        (tmp_path / name).mkdir()
        # save_to_disk would put the file's bytes into the table.
        with datasets.arrow_writer.ArrowWriter(features=features, path=str(tmp_path / name / "train.arrow")) as writer:
            writer.write({"image": {"path": path, "bytes": None}, "text": "x"})
            writer.finalize()
    inside = HfSamples(tmp_path / "inside", media_folder=tmp_path)
    assert list(media_of(inside[0])) == [("image", "in.png")]
    for name in ("outside", "above"):
        with pytest.raises(ValueError, match=r"image path .* leaves the media folder"):
            HfSamples(tmp_path / name)[0]


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no data set; a folder of save_to_disk"):
        HfSamples(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(os.urandom(100))
    with pytest.raises(ValueError, match=r"broken: datasets cannot read it"):
        HfSamples(tmp_path / "broken")
    (tmp_path / "dict").mkdir()
    for splits in ('["../empty"]', '[".."]', '["/tmp"]', "[3]", "3"):
        (tmp_path / "dict" / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
        with pytest.raises(ValueError, match=r"a list of names of folders beside it is accepted"):
            HfSamples(tmp_path / "dict")
    with pytest.raises(FileNotFoundError, match=r"data: 'hf:.*nothing' cannot be opened: .*accepted are"):
        open_samples(f"hf:{tmp_path}/nothing")
