"""`python -m mmfast.world`: trains the world's tokenizer, vision encoder and language model again."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from mmfast.world.checks import clip_probe_accuracy, probe_accuracy, text_accuracy
from mmfast.world.datasets import samples
from mmfast.world.digits import CANVAS_SIZE
from mmfast.world.tokenizer import build_tokenizer
from mmfast.world.train_encoder import PIXEL_MEAN, PIXEL_STD, train_encoder
from mmfast.world.train_llm import train_llm

PARTS = ("tokenizer", "encoder", "llm")
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": CANVAS_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": CANVAS_SIZE, "width": CANVAS_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [PIXEL_MEAN] * 3,
    "image_std": [PIXEL_STD] * 3,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what the command line asks for and prints what it can do."""
    options = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    if options.only in (None, "encoder"):
        make_encoder(options.out / "encoder", options.seed, options.max_steps)
    if options.only in (None, "llm"):
        make_llm(options.out / "llm", options.seed, options.max_steps)
    if options.only == "tokenizer":
        make_tokenizer(options.out / "llm", options.seed)
    print(f"done in {time.perf_counter() - start:.0f} s; written to {options.out}")


def make_tokenizer(folder: Path, seed: int) -> None:
    """Writes the tokenizer's files into `folder`."""
    with _published(folder) as draft:
        _save_tokenizer(build_tokenizer(seed), draft)


def make_encoder(folder: Path, seed: int, max_steps: int | None) -> None:
    """Trains the encoder, writes it and its image processor into `folder` and prints the probe's accuracy."""
    model = train_encoder(seed, max_steps)
    with _published(folder) as draft:
        model.save_pretrained(draft)
        _write_json(draft / "preprocessor_config.json", PREPROCESSOR)
    print("encoder, linear probe on test digits:", _percent(probe_accuracy(model)))
    print("encoder, linear probe on test clips, pooled:", _percent(clip_probe_accuracy(model)))


def make_llm(folder: Path, seed: int, max_steps: int | None) -> None:
    """Trains the language model, writes it and its tokenizer into `folder` and prints its accuracy on text."""
    tokenizer = build_tokenizer(seed)
    model = train_llm(tokenizer, seed, max_steps)
    with _published(folder) as draft:
        model.save_pretrained(draft)
        _save_tokenizer(tokenizer, draft)
    for name in ("text-test", "cliptext-test"):
        print(f"llm, exact answers to {name}:", _percent(text_accuracy(model, tokenizer, samples(name))))


def _save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # The name of the class differs between versions of transformers; all of them know this one.
    file = folder / "tokenizer_config.json"
    _write_json(file, json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """An empty folder whose files replace those of `folder` at the end, each at once; after an error none do."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as draft:
        yield Path(draft)
        for file in sorted(Path(draft).iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def _percent(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.2f} %" for name, share in accuracy.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmfast.world", description=__doc__)
    shipped = Path(__file__).parent / "weights"
    parser.add_argument("--only", choices=PARTS, help="make one part; default: all")
    parser.add_argument("--out", type=Path, default=shipped, help="folder to write to; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number; default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads; the rounding of sums depends on them")
    parser.add_argument("--max-steps", type=int, help="cut every training short, to try the script")
    return parser


if __name__ == "__main__":
    main()
