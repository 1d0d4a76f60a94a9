"""Every command that README.md and docs/ show is run, page by page, in the order of the page.

A command runs as it stands. What is changed to make it small, or why it is not run but only read, is declared here.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import demo_process
import pytest
from documents import PAGES, ROOT, Command, blocks, commands
from free_ports import free_port
from stand_ins import Q_FORMER

from mmfast.cli import COMMANDS, main
from mmfast.train import load_recipe

# Runs that a page takes as given, because another page or the reader makes them: the recipe, or a stage of it, that
# stands for each.
GIVEN = {
    "docs/data.md": {"runs/mine": "llava-world"},
    "docs/memory.md": {"runs/align": "llava-world/align"},
    "docs/quantization.md": {"runs/align": "llava-world/align"},
    "docs/scaling.md": {"runs/align": "llava-world/align", "shared/runs/align": "llava-world/align"},
    "docs/training.md": {"runs/align": "llava-world/align"},
}
Q_FORMER_OPTIONS = f"--options.num_queries 3 --options.q_former_sizes {json.dumps(Q_FORMER, separators=(',', ':'))}"


@dataclass(frozen=True)
class More:
    """The command runs with these words added.

    Attributes:
        steps: If given, each stage of the command's recipe has so many, of four samples.
    """

    words: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class Launch:
    """The launcher runs with these options after its own: once for each of the machines, all of which this one is."""

    words: str
    machines: int = 1


@dataclass(frozen=True)
class Serve:
    """The command runs until its page is there, which is fetched; then Ctrl-C must end it."""


@dataclass(frozen=True)
class Read:
    """The command does not run."""

    why: str


# By the beginning of the command, without `.venv/bin/`; of several that fit the longest counts.
CHANGES: dict[str, More | Launch | Serve | Read] = {
    "make test": Read("it is what runs this test"),
    "mmfast bench crossover": More("spatio_temporal_pool --rounds 1"),
    "mmfast bench crossover swiglu": More("--rounds 1"),
    "mmfast bench spatio_temporal_pool": More("--rounds 1 --untested"),
    "mmfast chat": More("--max-new-tokens 4"),
    "mmfast demo": Serve(),
    "mmfast estimate llava-1.5-lora --gpu": More("--llm path/to/vicuna-7b --encoder path/to/clip-vit-l-14-336"),
    "mmfast eval runs/video --data world:": More("--max-samples 4"),
    "mmfast quickstart": More("--max-samples 4 --max-steps 1"),
    "mmfast train llama-adapter-v1": More("--options.prompt_layers 3", steps=2),
    "mmfast train llama-adapter-v2": More("--options.prompt_layers 3 --options.visual_width 16", steps=2),
    "mmfast train minigpt-v2-7b": More(steps=2),
    "mmfast train minigpt4-7b": More(Q_FORMER_OPTIONS, steps=2),
    "mmfast train video-chatgpt-world": More(steps=2),
    "pip install": More("--dry-run --no-index --no-build-isolation"),
    "ssh": Read("it needs another machine"),
    "torchrun": Launch("--standalone --nproc-per-node 2"),
    "torchrun --nnodes": Launch("--nnodes 2 --nproc-per-node 1 --local-addr 127.0.0.1", machines=2),
}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_run(
    page: str, scratch: Path, make_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    for name, recipe in GIVEN.get(page, {}).items():
        shutil.copytree(make_run(recipe), scratch / name)
    for block in blocks(page):
        if block.title:
            (scratch / block.title).write_text(block.text)
    monkeypatch.setenv("MMFAST_TRACEBACK", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / "cache"))
    for command in commands(page):
        try:
            _run(command)
        except (Exception, SystemExit) as error:
            printed = "".join(capfd.readouterr())
            pytest.fail(f"{command.place}: {command.text}\n{type(error).__name__}: {error}\n{printed[-2000:]}")


def _run(command: Command) -> None:
    change, words = _change(command), command.words
    program = words[0].removeprefix(".venv/bin/")
    if isinstance(change, More):
        words += change.words.split()
        if change.steps:
            words += ["--stages", _short_stages(words[2], change.steps)]
    if isinstance(change, Serve):
        _serve(words[2:])
    elif isinstance(change, Launch):
        _launch(words, change)
    elif isinstance(change, Read):
        pass
    elif program == "mmfast":
        _mmfast(words[1:])
    elif program == "make":
        _make(command)
    elif program == "pip":
        _pip(words[1:])
    else:
        raise AssertionError("no way to run this command; see _run")


def _change(command: Command) -> More | Launch | Serve | Read | None:
    fitting = [start for start in CHANGES if command.text.removeprefix(".venv/bin/").startswith(start)]
    return CHANGES[max(fitting, key=len)] if fitting else None


def _short_stages(recipe: str, steps: int) -> str:
    stages = load_recipe(recipe).stages
    return json.dumps([asdict(replace(s, max_steps=steps, batch_size=4, micro_batch_size=None)) for s in stages])


def _mmfast(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # `mmfast chat` without --prompt asks the keyboard.
        patch.setattr(sys, "stdin", io.StringIO("what is this?\n/quit\n"))
        assert main(words) == 0


def _serve(words: list[str]) -> None:
    with demo_process.served(*words) as (url, _), urllib.request.urlopen(url, timeout=20) as reply:
        assert b"mmfast" in reply.read()


def _launch(words: list[str], change: Launch) -> None:
    place = words.index("-m")
    command = [re.sub("^/shared/", "shared/", word) for word in words[place:]]  # there all machines see the same
    options = [*words[1:place], *change.words.split()]
    if change.machines > 1:
        options += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(launcher, env=environment) for _ in range(change.machines)]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * change.machines
    finally:
        for process in processes:
            process.kill()


def _make(command: Command) -> None:
    """What a target does after the environment is made."""
    words = ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/.installed", *command.words[1:]]
    shown = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for line in shown.splitlines():
        _run(Command(command.place, line))


def _pip(words: list[str]) -> None:
    """In the checkout, which is what the pages mean by `.`."""
    pip = [sys.executable, "-m", "pip", *words]
    printed = subprocess.run(pip, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "does not provide the extra" not in printed.stdout


def test_the_declarations_are_of_use() -> None:
    assert GIVEN.keys() <= set(PAGES)
    shown = [command for page in PAGES for command in commands(page)]
    used = {id(_change(command)) for command in shown}
    assert [start for start, change in CHANGES.items() if id(change) not in used] == []


def test_no_command_stands_outside_of_a_console_block() -> None:
    """Where it would not be run."""
    words = ("$ ", "mmfast ", "torchrun ", "accelerate ", "make ", "pip ")
    hidden = [
        f"{block.page}:{number}: {line}"
        for page in PAGES
        for block in blocks(page)
        for number, line in enumerate(block.text.splitlines(), block.line)
        if line.startswith(words) and not (block.language == "console" and line.startswith("$ "))
    ]
    assert hidden == []


@functools.cache
def _help(name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed := io.StringIO())
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
    return printed.getvalue()


def _options_in_text() -> Iterator[tuple[str, str, list[str]]]:
    """Place, command and options of every `mmfast ...` in the text of the pages."""
    for page in PAGES:
        text = re.sub(r"^( *)```.*?^\1```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`(mmfast [a-z][^`]*)`", text):
            words = span.split()
            name = " ".join(words[1:3]) if " ".join(words[1:3]) in COMMANDS else words[1]
            yield f"{page}: {span}", name, re.findall(r"--([\w-]+)", span)


def test_options_in_the_text_exist() -> None:
    wrong = [
        place
        for place, name, options in _options_in_text()
        if not any(known.startswith(name) for known in COMMANDS)
        or not all(f"--{option.replace('-', '_')}" in _help(name) for option in options)
    ]
    assert wrong == []
