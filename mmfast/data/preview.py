"""An encoded sample for people: its text with what is learned set off from what is read, and its pictures as files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mmfast.data.processor import IGNORE, Encoded, Processor
from mmfast.data.samples import Sample, media_of

__all__ = ["format_sample", "write_pictures"]

_GREY, _END = "\x1b[90m", "\x1b[0m"
# What a terminal would take as commands.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def format_sample(sample: Sample, encoded: Encoded, processor: Processor, plain: bool = True) -> str:
    """A line of counts, then the text as its tokens give it back, with a medium as `<image x576>`.

    Args:
        sample: the sample.
        encoded: what `processor` made of it.
        processor: the processor.
        plain: what is not learned stands in [brackets]; False: it is grey, by the codes of terminals.
    """
    kinds = [kind for kind, _ in media_of(sample)]
    media = "".join(f", {kind} x{n}" for kind, n in zip(kinds, encoded.media_tokens, strict=True))
    cut = f", {encoded.cut_tokens} more cut off" if encoded.cut_tokens else ""
    head = f"{encoded.id}: {len(encoded.input_ids)} tokens, {encoded.supervised_tokens} supervised{media}{cut}"
    begin, end = ("[", "]") if plain else (_GREY, _END)
    pieces: list[tuple[str, bool]] = []
    for text, learned in _pieces(encoded, kinds, processor):
        if pieces and pieces[-1][1] == learned:
            text = pieces.pop()[0] + text
        pieces.append((text, learned))
    return head + "\n" + "".join(text if learned else f"{begin}{text}{end}" for text, learned in pieces)


def _pieces(encoded: Encoded, kinds: list[str], processor: Processor) -> Iterator[tuple[str, bool]]:
    """Text and whether it is learned: runs of tokens of either kind, and media."""
    media = ((kind, count) for kind, count in zip(kinds, encoded.media_tokens, strict=True) if count)
    ids, learned = encoded.input_ids, [label != IGNORE for label in encoded.labels]
    index = begin = 0
    while index < len(ids):
        if ids[index] == processor.image_token_id:
            kind, count = next(media)
            yield f"<{kind} x{count}>", False
            index = begin = index + count
            continue
        end = index + 1
        while end < len(ids) and learned[end] == learned[index] and ids[end] != processor.image_token_id:
            end += 1
        # By difference: alone, the first token of a run may lose the space before it.
        before, whole = (processor.tokenizer.decode(ids[begin:stop]) for stop in (index, end))
        yield _CONTROL.sub(lambda match: repr(match[0])[1:-1], whole[len(before) :]), learned[index]
        index = end


def write_pictures(encoded: Encoded, processor: Processor, folder: Path, stem: str) -> list[Path]:
    """Writes what the encoder sees of a sample's media as PNG files, `<stem>-<medium>[-<view or frame>].png`.

    Args:
        encoded: encoded with its media.
        processor: what encoded it.
        folder: made if there is something to write.
        stem: begins the files' names.

    Returns:
        The files.
    """
    from PIL import Image

    paths = []
    for number, medium in enumerate(encoded.media):
        pictures = processor.pictures(medium)
        for view, picture in enumerate(pictures):
            folder.mkdir(parents=True, exist_ok=True)
            suffix = f"-{view}" if len(pictures) > 1 else ""
            path = folder / f"{stem}-{number}{suffix}.png"
            Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
            paths.append(path)
    return paths
