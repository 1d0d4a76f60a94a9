"""Every command that README.md and docs/ show is run, page by page, in the order of the page.

A command runs as it stands. What is changed to make it small, or why it is not run but only read, is declared here.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from documents import PAGES, ROOT, Command, blocks, commands

from mmfast.cli import COMMANDS, main

# Runs that a page takes as given, because another page, the reader or a command that is not run makes them: the recipe,
# or a stage of it, that stands for each.
GIVEN = {
    "README.md": {"runs/demo": "llava-world"},
    "docs/data.md": {"runs/mine": "llava-world"},
    "docs/index.md": {"runs/demo": "llava-world"},
    "docs/memory.md": {"runs/align": "llava-world/align"},
    "docs/quantization.md": {"runs/align": "llava-world/align"},
    "docs/scaling.md": {"runs/a": "llava-world"},
    "docs/systems/high_resolution.md": {"runs/hd": "llava-hd-world"},
    "docs/systems/index.md": {"runs/b": "minigpt4-world"},
    "docs/systems/minigpt4.md": {"runs/minigpt4": "minigpt4-world"},
    "docs/training.md": {"runs/align": "llava-world/align"},
}


@dataclass(frozen=True)
class More:
    """The command runs with these words added."""

    words: str


@dataclass(frozen=True)
class Read:
    """The command's options are read as the command line reads them; nothing runs."""

    why: str


# By the beginning of the command; of several that fit the longest counts.
CHANGES: dict[str, More | Read] = {
    ".venv/bin/mmfast chat": More("--max-new-tokens 4"),
    ".venv/bin/mmfast demo": Read("serves until Ctrl-C; tests/page/test_server.py"),
    "mmfast bench spatio_temporal_pool": More("--rounds 5 --untested"),
    "mmfast bench crossover": Read("minutes on a quiet machine; tests/benchmarks/test_crossover.py"),
    "mmfast demo": Read("serves until Ctrl-C; tests/page/test_server.py"),
    "mmfast quickstart": Read("a minute; tests/evaluate/test_quickstart.py"),
    "mmfast chat": More("--max-new-tokens 4"),
    "mmfast convert checkpoint_4.pth": Read("files of MiniGPT-4 and BLIP-2; tests/models/test_minigpt4_original.py"),
    "mmfast convert minigpt4-original": Read("files of BLIP-2; tests/models/test_minigpt4_original.py"),
    "mmfast estimate llava-1.5-lora --gpu": More("--llm path/to/vicuna-7b --encoder path/to/clip-vit-l-14-336"),
    "mmfast train llama-adapter-v1-7b": More("--options.prompt_layers 3"),
    "mmfast train llama-adapter-v2-7b": More("--options.prompt_layers 3"),
    "mmfast train llama-adapter": Read("more layers than the small model has; tests/train/test_llama_adapter.py"),
    "mmfast train llava-1.5-hd": Read("more tiles than fit into the small model; tests/train/test_anyres.py"),
    "mmfast train minigpt-v2-7b": Read("files of BLIP-2; tests/train/test_minigpt4.py"),
    "mmfast train minigpt4-7b": Read("files of BLIP-2; tests/train/test_minigpt4.py"),
    "mmfast train video-chatgpt-world": Read("minutes; tests/train/test_video.py trains it"),
}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_run(
    page: str, scratch: Path, make_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    for name, recipe in GIVEN.get(page, {}).items():
        shutil.copytree(make_run(recipe), scratch / name)
        shutil.copy("cat.jpg", scratch / name / "digits.png")  # as the demo leaves one
    for block in blocks(page):
        if block.title:
            (scratch / block.title).write_text(block.text)
    monkeypatch.setenv("MMFAST_TRACEBACK", "1")
    for command in commands(page):
        try:
            _run(command)
        except (Exception, SystemExit) as error:
            printed = "".join(capfd.readouterr())
            pytest.fail(f"{command.place}: {command.text}\n{type(error).__name__}: {error}\n{printed[-2000:]}")


def _run(command: Command) -> None:
    change = _change(command)
    words = command.words
    if isinstance(change, More):
        words += change.words.split()
    if words[0] in ("mmfast", ".venv/bin/mmfast"):
        _mmfast(words[1:], execute=not isinstance(change, Read))
    elif words[0] in ("torchrun", "accelerate"):
        # tests/train/test_processes.py starts several processes; here the options of each are read.
        _mmfast(words[words.index("mmfast") + 1 :], execute=False)
    else:
        _check_other(words)


def _change(command: Command) -> More | Read | None:
    fitting = [start for start in CHANGES if command.text.startswith(start)]
    return CHANGES[max(fitting, key=len)] if fitting else None


def _mmfast(words: list[str], execute: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # `mmfast chat` without --prompt asks the keyboard.
        patch.setattr(sys, "stdin", io.StringIO("what is this?\n/quit\n"))
        if not execute:
            for command in COMMANDS.values():
                module, function = command.target.split(":")
                home = importlib.import_module(module)
                patch.setattr(home, function, _without_doing(getattr(home, function)))
        assert main(words) == 0


def _without_doing(function: Any) -> Any:
    """A function of the same parameters and documentation, which the command line reads."""

    @functools.wraps(function)
    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    return nothing


def _check_other(words: list[str]) -> None:
    """Commands of other programs, which make environments or need other machines: what they name exists."""
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install", what] if what.startswith((".", "mmfast")):
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\w+", what.partition("[")[2])) <= set(extras)
        case ["ssh", *_]:
            pass
        case ["python", script, *_] | [script] | [script, _] if script.endswith((".py", ".sh")):
            assert (ROOT / script).is_file()
        case _:
            raise AssertionError("no way to try this command; see _check_other")


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
