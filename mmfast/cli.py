"""The command line: `mmfast COMMAND`. Each command is a documented function; its options are its parameters."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command's one-line help and the function behind it ("module:function"), imported when it is used."""

    help: str
    target: str


COMMANDS = {
    "quickstart": Command(
        "train, evaluate and question a small LLaVA on the embedded world", "mmfast.quickstart:quickstart"
    ),
    "train": Command("train a system from a recipe or a config file, or resume a run", "mmfast.train:train"),
    "estimate": Command("count what a recipe trains, and plan its memory", "mmfast.train.estimate:estimate"),
    "compare": Command("train every system on the embedded world and print one table", "mmfast.compare:compare"),
    "data check": Command(
        "read every sample and medium of a data set, count, and name what is wrong", "mmfast.train.data_commands:check"
    ),
    "data preview": Command(
        "show a few samples as the model sees them, and what it learns of them", "mmfast.train.data_commands:preview"
    ),
    "eval": Command("answer an evaluation set with a trained run and score it", "mmfast.evaluate:evaluate_run"),
    "chat": Command("talk to a trained run about images, in the terminal", "mmfast.generate:chat"),
    "demo": Command("talk to trained runs about images or videos, on a page in the browser", "mmfast.page.server:demo"),
    "convert": Command("turn a published checkpoint into a run folder", "mmfast.models.convert:convert"),
    "quantize": Command(
        "write a model's folder in 4 or 8 bits, tensor by tensor", "mmfast.adapt.quantized_checkpoint:quantize_command"
    ),
    "export": Command("write a run in another library's layout", "mmfast.models.export:export"),
    "bench": Command(
        "time ops against eager PyTorch and their peers, and print a table", "mmfast.benchmarks.suite:bench"
    ),
    "bench plot": Command(
        "draw what was measured, and write its tables into the documents", "mmfast.benchmarks.plot:plot"
    ),
    "bench crossover": Command(
        "measure from which size each op's kernels are faster, and write the table that ops read",
        "mmfast.benchmarks.crossover:crossover",
    ),
    "env": Command("what is installed here, and which backends can run", "mmfast.environment:show"),
}

# Set before transformers is imported: no network unless asked, our own progress bars only.
_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 after an error, 2 for a bad command line, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        from mmfast import __version__

        print(f"mmfast {__version__}")
        return 0
    # The name of a command in a group has two words; a group may also be a command itself.
    is_group = words[0] not in COMMANDS and any(name.startswith(f"{words[0]} ") for name in COMMANDS)
    if is_group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(_overview(words[0]))
        return 0
    size = 2 if is_group or " ".join(words[:2]) in COMMANDS else 1
    name, rest = " ".join(words[:size]), words[size:]
    if name not in COMMANDS:
        print(f"mmfast: there is no command {name!r}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        print("mmfast: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`mmfast ... | head`); nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, NotImplementedError) as error:
        if os.environ.get("MMFAST_TRACEBACK"):
            raise
        print(f"mmfast {name}: {error}\n(MMFAST_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def _overview(group: str = "") -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: mmfast COMMAND [options]     (mmfast COMMAND --help tells its options)", ""]
    lines += [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items() if name.startswith(group)]
    return "\n".join(lines)


def _run(name: str, words: list[str]) -> int:
    module, function = COMMANDS[name].target.split(":")
    target = getattr(importlib.import_module(module), function)
    words = [_with_underscores(word) for word in words]
    if name == "train":
        _train(target, words)
    else:
        values = _parse(name, target, words)
        any_number = values.pop(_any_number(target), ())
        target(*any_number, **values)
    return 0


def _any_number(target: Callable[..., Any]) -> str:
    """The name of `target`'s parameter that takes any number of words, "" if it has none."""
    parameters = inspect.signature(target).parameters.values()
    return next((entry.name for entry in parameters if entry.kind is entry.VAR_POSITIONAL), "")


def _with_underscores(word: str) -> str:
    """`--max-steps=3` as `--max_steps=3`: both spellings of an option are taken."""
    if not word.startswith("--"):
        return word
    option, separator, value = word.partition("=")
    return "--" + option[2:].replace("-", "_") + separator + value


def _parser(name: str, description: str) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=f"mmfast {name}", description=description)


def _parse(name: str, target: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    """Reads `words` as the parameters of `target`: required ones and `*words` are positional, booleans flags, the rest
    options."""
    from docstring_parser import parse

    described = {entry.arg_name: entry.description for entry in parse(target.__doc__ or "").params}
    parameters = list(inspect.signature(target).parameters.values())
    flags = [entry.name for entry in parameters if entry.default is False]
    lists = {f"--{entry.name}" for entry in parameters if "list[" in str(entry.annotation)}
    # jsonargparse appends with `--image+`; to say `--image a --image b` is what people try.
    words = [_appending(word, lists) for word in words]
    group = "".join(f"; `mmfast {other}`: {COMMANDS[other].help}" for other in COMMANDS if other.startswith(f"{name} "))
    parser = _parser(name, COMMANDS[name].help + group)
    # The base models are options in every command, also where they are required.
    bases = [entry for entry in parameters if entry.name in ("llm", "encoder")]
    parser.add_function_arguments(target, as_positional=True, skip={*flags, *(entry.name for entry in bases)})
    if any_number := _any_number(target):
        parser.add_argument(any_number, type=str, nargs="*", default=[], help=described.get(any_number))
    for entry in bases:
        required = entry.default is entry.empty
        default = None if required else entry.default
        parser.add_argument(
            f"--{entry.name}", type=str, required=required, default=default, help=described.get(entry.name)
        )
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=described.get(flag))
    return vars(parser.instantiate(parser.parse_args(words)))


def _appending(word: str, lists: set[str]) -> str:
    option, separator, value = word.partition("=")
    return f"{option}+{separator}{value}" if option in lists else word


def _train(train: Callable[..., Any], words: list[str]) -> None:
    """`mmfast train [RECIPE] [--config FILE] [--resume] [--option value ...]`, later ones over earlier ones."""
    from mmfast.train import TrainConfig, load_recipe, recipe_names

    parser = _parser(
        "train",
        "Trains a system: `mmfast train RECIPE --out runs/a [options]`, or goes on with a run: "
        "`mmfast train --config runs/a/config.yaml --resume`. "
        f"Recipes: {', '.join(recipe_names())}. --print_config writes the whole configuration as YAML.",
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    parser.add_argument("--resume", action="store_true", help="go on exactly where the run in --out stopped")
    parser.add_class_arguments(TrainConfig)
    if words and not words[0].startswith("-"):
        parser.set_defaults(asdict(load_recipe(words.pop(0))))
    values = vars(parser.instantiate(parser.parse_args(words)))
    del values["config"]
    resume = values.pop("resume")
    train(TrainConfig(**values), resume=resume)
