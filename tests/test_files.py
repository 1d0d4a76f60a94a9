"""Files and folders that are replaced whole, and what is said when they cannot be."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from disks import at_change, dies_at_change, read_only, small_files

from mmfast.files import (
    explained_writing,
    remove_leftovers,
    replace_atomically,
    replace_folder,
    write_atomically,
    write_json,
)


def write_pair(folder: Path, value: str) -> None:
    for name in ("a", "b"):
        (folder / name).write_text(value)


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


def test_a_folder_is_replaced_whole_whenever_the_process_dies(tmp_path: Path) -> None:
    for number in range(100):
        place = tmp_path / str(number) / "best"
        place.parent.mkdir()
        replace_folder(place, lambda folder: write_pair(folder, "old"))
        again = lambda place=place: replace_folder(place, lambda folder: write_pair(folder, "new"))  # noqa: E731
        if not dies_at_change(number, again):
            break
        remove_leftovers(place.parent)
        assert content(place) in ({"old"}, {"new"})
        assert [path.name for path in place.parent.iterdir()] == ["best"]
        replace_folder(place, lambda folder: write_pair(folder, "newer"))
        assert content(place) == {"newer"}
    assert 5 < number < 99, "it died at every change"


def test_a_folder_stays_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    place = tmp_path / "best"
    replace_folder(place, lambda folder: write_pair(folder, "old"))
    with at_change(10**9, id) as changes:
        replace_folder(place, lambda folder: write_pair(folder, "old"))
    second_rename = [index for index, name in enumerate(changes) if name == "rename"][1]

    def stop() -> None:
        raise KeyboardInterrupt

    with at_change(second_rename, stop), pytest.raises(KeyboardInterrupt):
        replace_folder(place, lambda folder: write_pair(folder, "new"))
    assert content(place) == {"old"}
    assert list(tmp_path.iterdir()) == [place]


def test_leftovers_of_every_kind_go(tmp_path: Path) -> None:
    (tmp_path / ".tmp-model.json").write_text("{")
    (tmp_path / ".tmpAbCdEf").write_text("of safetensors")
    (tmp_path / ".tmp-best").mkdir()
    (tmp_path / "kept").write_text("")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, 1)
    with (
        small_files(10),
        pytest.raises(OSError, match=rf"^{path}: it cannot be written: File too large; [\d.,]+ MB are"),
    ):
        write_atomically(path, "x" * 100)
    with read_only(tmp_path), pytest.raises(PermissionError, match=rf"^{path}: .*: Permission denied; a folder that"):
        write_json(path, 2)
    with pytest.raises(NotADirectoryError, match=r"state\.json/x: .*: Not a directory; a folder on a disk that works"):
        write_json(path / "x", 2)
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "elsewhere" / "missing"
    with pytest.raises(FileNotFoundError, match="No such file") as info:
        replace_atomically(tmp_path / "copy", lambda path: path.write_bytes(source.read_bytes()))
    assert info.value.filename == str(source), "it is what was read, not what was written"
    explained = OSError("said already")
    with pytest.raises(OSError, match=r"^said already$"), explained_writing(tmp_path):
        raise explained
    with pytest.raises(ValueError, match=r"^no refusal$"), explained_writing(tmp_path):
        raise ValueError("no refusal")
    with pytest.raises(OSError, match="cannot be written") as info, explained_writing(tmp_path):
        raise OSError(errno.EIO, "Input/output error")
    assert info.value.errno == errno.EIO
