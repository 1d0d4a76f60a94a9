"""`mmfast demo` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from free_ports import free_port


@contextmanager
def served(*words: str, **environment: str) -> Iterator[tuple[str, int]]:
    """Runs `mmfast demo` with these words: its address and process, until Ctrl-C, which must end it cleanly."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfast", "demo", *words, f"--port={port}"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        # A background process of a script may have been told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        url = f"http://127.0.0.1:{port}"
        assert url in process.stdout.readline()
        yield url, process.pid
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0, "Ctrl-C must end it cleanly"
        assert time.monotonic() - started < 15
        assert process.stdout.read().strip() == "stopped"
    finally:
        process.kill()
