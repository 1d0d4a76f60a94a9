"""`mmfast demo`: serves the page on this machine, to this machine alone."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from mmfast.page.runs import find_runs, named_runs

__all__ = ["demo"]

HOST = "127.0.0.1"
"""The only address it is served at."""


def demo(
    *run: str,
    runs: str = "runs",
    llm: str | None = None,
    encoder: str | None = None,
    port: int = 7860,
    max_upload_mb: int = 25,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    threads: int | None = None,
) -> None:
    """Serves a chat page at 127.0.0.1, where the browsers of this machine reach it and no other; Ctrl-C ends it.

    `mmfast demo runs/a runs/b` offers these runs, `mmfast demo` every one below --runs. The page asks nothing of any
    other host, and uploads are deleted after a day and at the end.

    Args:
        run: Run folders, or folders with a saved model, to choose from. None: all below `runs`.
        runs: The folder to look for runs in.
        llm: Folder of the language model, where it has moved since the training.
        encoder: Folder of the encoder, where it has moved since the training.
        port: Where the page is: http://127.0.0.1:PORT.
        max_upload_mb: Largest file that may be sent, in MiB.
        max_new_tokens: Longest answer, in tokens; the page has a slider that starts there.
        temperature: 0 answers greedily; the page has a slider that starts there.
        threads: Threads of a model on the CPU. None: torch's choice.

    Raises:
        ImportError: If gradio is missing.
        FileNotFoundError: If there is no run, or one that is named holds no model.
        OSError: If the port is in use.
        ValueError: If a number is outside its range.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("demo: gradio, which makes the page, is not installed; pip install mmfast[demo]")
    for name, value in {"max_upload_mb": max_upload_mb, "max_new_tokens": max_new_tokens, "threads": threads}.items():
        if value is not None and value < 1:
            raise ValueError(f"demo: {name} is {value}; 1 or more is accepted")
    from mmfast.generate.decoding import decoding_options

    decoding_options(temperature)

    def list_runs() -> list[Any]:
        return named_runs(run) if run else find_runs(Path(runs).expanduser())

    if not list_runs():
        raise FileNotFoundError(
            f"demo: there is no trained model below {runs}; a run folder, or a folder that holds some, is accepted; "
            "make one in a minute: mmfast quickstart"
        )
    _check_port(port)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="mmfast-demo-") as folder:
        blocks = launch(list_runs, llm, encoder, port, max_upload_mb, max_new_tokens, temperature, Path(folder))
        # Being told to end is as good as Ctrl-C: uploads must not stay.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"the page: http://{HOST}:{port}   (this machine only; Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nstopped")
        finally:
            blocks.close(verbose=False)


def launch(
    list_runs: Any,
    llm: str | None,
    encoder: str | None,
    port: int,
    max_upload_mb: int,
    max_new_tokens: int,
    temperature: float,
    folder: Path,
) -> Any:
    """Starts the server in threads; returns gradio's blocks, whose `close` ends it. Files are kept in `folder`."""
    # What the surroundings ask of gradio (to share the page, to serve further files, to report its use) is not done.
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder)}

    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from mmfast.page.app import CSS, JS, THEME, Page
    from mmfast.page.chat import ModelSlot

    page = Page(list_runs, ModelSlot(llm, encoder), folder, temperature, max_new_tokens)
    blocks = page.build()
    blocks.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=max_upload_mb << 20,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=THEME,
        css=CSS,
        js=JS,
        # A page of another host whose name was turned to this address is refused.
        app_kwargs={
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
    )
    return blocks


def _check_port(port: int) -> None:
    if not 0 < port < 1 << 16:
        raise ValueError(f"demo: port is {port}; 1 to 65535 is accepted")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise OSError(
                f"demo: port {port} of {HOST}: {error.strerror}; a free port is accepted; choose another --port"
            ) from error
