"""What `mmfast demo` refuses before it serves anything, how it ends, and what the server does not give away."""

from __future__ import annotations

import importlib.util
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_process
import pytest

from mmfast.cli import main
from mmfast.page import server

pytest.importorskip("gradio")


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest)
    )
    assert main(["demo"]) == 1
    assert "pip install mmfast[demo]" in capsys.readouterr().err


def test_without_runs_it_says_how_to_make_one(tmp_path: Path, capsys: Any) -> None:
    assert main(["demo", "--runs", str(tmp_path)]) == 1
    assert "mmfast quickstart" in capsys.readouterr().err
    assert main(["demo", str(tmp_path), str(tmp_path / "other")]) == 1
    assert f"{tmp_path} holds no trained model" in capsys.readouterr().err


def test_a_port_in_use_is_named(runs: Path, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--runs", str(runs), f"--port={port}"]) == 1
    assert f"port {port} of 127.0.0.1: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["port=0", "port=65536", "max_upload_mb=0", "threads=0", "temperature=-1"])
def test_numbers_out_of_range_are_refused(runs: Path, option: str, capsys: Any) -> None:
    assert main(["demo", "--runs", str(runs), f"--{option}"]) == 1
    assert f"{option.partition('=')[0]} is {option.partition('=')[2]}" in capsys.readouterr().err


def test_other_hosts_are_no_option(runs: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--runs", str(runs), "--host", "0.0.0.0"])
    assert "--host" in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, int]]:
    """A server in a process of its own that surroundings ask to do more than it should: address, folder, process."""
    folder = tmp_path_factory.mktemp("temporary")
    asked = {"GRADIO_SHARE": "1", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SERVER_NAME": "0.0.0.0"}
    with demo_process.served("--runs", str(runs), "--max_upload_mb=1", **asked, TMPDIR=str(folder)) as (url, pid):
        yield url, folder, pid
    assert list(folder.glob("mmfast-demo-*")) == [], "uploads must not stay"


def test_it_listens_on_loopback_alone(served: tuple[str, Path, int]) -> None:
    url, _, pid = served
    port = int(url.rpartition(":")[2])
    inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in inodes
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_it_gives_no_files_away(served: tuple[str, Path, int], runs: Path) -> None:
    url, _, _ = served
    for path in ("/etc/passwd", str(runs / "tiny" / "model" / "mmfast.json"), str(Path(__file__).resolve())):
        assert Path(path).is_file()
        for request in (
            f"/gradio_api/file={path}",
            f"/file={path}",
            f"/gradio_api/file={urllib.parse.quote(path, '')}",
        ):
            status, body = get(url + request)
            assert status in (403, 404), (request, status)
            assert Path(path).read_bytes()[:20] not in body


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/monitoring"])
def test_it_has_no_pages_beside(served: tuple[str, Path, int], path: str) -> None:
    assert get(served[0] + path)[0] in (403, 404)


def test_a_foreign_host_name_is_refused(served: tuple[str, Path, int]) -> None:
    url, _, _ = served
    assert get(url)[0] == 200
    assert get(url, Host="example.com")[0] == 400
    assert get(url, Host="localhost")[0] == 200


def test_large_uploads_are_refused_by_the_server(served: tuple[str, Path, int]) -> None:
    def upload(size: int) -> int:
        part = (
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            + bytes(size)
            + b"\r\n--b--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        return get(f"{served[0]}/gradio_api/upload", part, **headers)[0]

    assert upload(1000) == 200
    assert upload((1 << 20) + 1000) == 413
