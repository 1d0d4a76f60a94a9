"""What is in a data set, and what is wrong with it: all is encoded and decoded as in training."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mmfast.data.budget import allowed_bad
from mmfast.data.processor import Processor
from mmfast.data.samples import MediaPart, Sample, StoredMedium, content_parts

__all__ = ["check_data", "format_report"]

_SHOWN = 10
_BINS = 12
_BAR = 40


@dataclass(frozen=True)
class _Finding:
    """What one sample holds; `problems` are (fault, message)."""

    id: str
    problems: list[tuple[str, str]]
    tokens: int = 0
    supervised_tokens: int = 0
    cut_tokens: int = 0
    media: tuple[str, ...] = ()
    digest: bytes = b""


def check_data(
    samples: Sequence[Sample],
    processor: Processor,
    media_folder: str | os.PathLike[str] | None = None,
    max_bad: int | str = 0,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Reads every sample as training would, and counts.

    A sample is bad if training could not use it: malformed, with an id that an earlier one has, with a medium that is
    missing, unreadable, too large or outside the media folder, unusable for the processor (a kind of medium that it
    does not read, media beyond `max_length`), or with nothing to learn. Cut and repeated samples are counted, and good.

    Args:
        samples: to check, opened with `strict=False`; they are read one by one and not kept.
        processor: of the training.
        media_folder: where media paths start.
        max_bad: how many may be bad, see `allowed_bad`.
        num_workers: processes that read; 0: this one. None: one for each processor core.

    Returns:
        `{"samples", "tokens", "supervised_tokens", "media": {kind: n}, "lengths": {"shortest", "mean", "median", "p95",
        "longest", "histogram": [{"from", "to", "samples"}]}, "truncated": {"samples", "tokens", "ids"}, "repeated":
        {"samples", "ids": [[first, later]]}, "bad": {"samples", "allowed", "by_fault": {fault: n}, "list": [{"id",
        "fault", "error"}]}}`. Lengths are those before cutting. "samples" of "bad" is the number of samples, and its
        list has an entry for each thing that is wrong.

    Raises:
        ValueError: `max_bad` is neither a number nor a share.
    """
    from tqdm import tqdm

    allowed = allowed_bad(max_bad, len(samples))
    loader: DataLoader[_Finding] = DataLoader(
        _Findings(samples, processor, media_folder),
        batch_size=16,
        num_workers=_cores() if num_workers is None else num_workers,
        collate_fn=list,
        worker_init_fn=_leave_ctrl_c_to_the_parent,
    )
    counts = _Counts()
    with tqdm(total=len(samples), desc="checking samples", unit="sample", disable=None) as bar:
        for batch in loader:
            for finding in batch:
                counts.add(finding)
            bar.update(len(batch))
    return counts.report(allowed)


class _Findings(Dataset[_Finding]):
    def __init__(self, samples: Sequence[Sample], processor: Processor, media_folder: Any) -> None:
        self.samples, self.processor, self.media_folder = samples, processor, media_folder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> _Finding:
        try:
            sample = self.samples[index]
        except ValueError as error:
            ids = getattr(self.samples, "ids", None)
            return _Finding(ids[index] if ids else f"#{index}", [_problem(error)])
        problems: list[tuple[str, str]] = []
        try:
            encoded = self.processor.encode(sample, media_folder=self.media_folder, load_media=False)
        except ValueError as error:
            encoded = None
            problems.append(_problem(error))
        parts = [part for message in sample["messages"] for part in content_parts(message)]
        media: list[MediaPart] = [part for part in parts if part["type"] != "text"]
        for part in media:
            if part["type"] in self.processor.media_kinds:
                try:
                    self.processor.read_media(part, self.media_folder, sample["id"])
                except ValueError as error:
                    problems.append(_problem(error))
        kinds, digest = tuple(part["type"] for part in media), _digest(parts)
        if encoded is None:
            # What the header of a file told already is told again by its content.
            return _Finding(sample["id"], list(dict.fromkeys(problems)), media=kinds, digest=digest)
        learned = encoded.supervised_tokens
        if not learned:
            text = f"sample '{sample['id']}': no supervised token within max_length={self.processor.max_length}"
            problems.append(("unsupervised", text))
        return _Finding(sample["id"], problems, len(encoded.input_ids), learned, encoded.cut_tokens, kinds, digest)


def _problem(error: ValueError) -> tuple[str, str]:
    return getattr(error, "fault", "unusable"), str(error)


def _digest(parts: Sequence[Any]) -> bytes:
    """The same for the same texts and media, media in files by their paths."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part[part["type"]]
        for item in content if isinstance(content, list | tuple) else [content]:
            if isinstance(item, StoredMedium):
                data = item.read()
            elif isinstance(item, str):
                data = item.encode(errors="surrogatepass")
            else:
                data = repr((item.mode, item.size)).encode() + item.tobytes()
            digest.update(f"{part['type']} {len(data)} ".encode() + data)
    return digest.digest()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass
class _Counts:
    """Sums over findings; of samples, only what is named later is kept."""

    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    media: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    cut_tokens: int = 0
    truncated: list[str] = field(default_factory=list)
    repeated: list[list[str]] = field(default_factory=list)
    first: dict[bytes, str] = field(default_factory=dict)
    bad: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)

    def add(self, finding: _Finding) -> None:
        self.samples += 1
        self.tokens += finding.tokens
        self.supervised_tokens += finding.supervised_tokens
        self.media.update(finding.media)
        self.cut_tokens += finding.cut_tokens
        if finding.tokens:
            self.lengths[finding.tokens + finding.cut_tokens] += 1
        if finding.cut_tokens:
            self.truncated.append(finding.id)
        if finding.digest:
            first = self.first.setdefault(finding.digest, finding.id)
            if first != finding.id:
                self.repeated.append([first, finding.id])
        self.bad += bool(finding.problems)
        self.problems += [{"id": finding.id, "fault": fault, "error": text} for fault, text in finding.problems]

    def report(self, allowed: int) -> dict[str, Any]:
        faults = Counter(problem["fault"] for problem in self.problems)
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "media": dict(self.media),
            "lengths": _lengths(self.lengths),
            "truncated": {"samples": len(self.truncated), "tokens": self.cut_tokens, "ids": self.truncated},
            "repeated": {"samples": len(self.repeated), "ids": self.repeated},
            "bad": {"samples": self.bad, "allowed": allowed, "by_fault": dict(faults), "list": self.problems},
        }


def _lengths(lengths: Counter[int]) -> dict[str, Any]:
    if not lengths:
        return {}
    longest, total = max(lengths), lengths.total()
    width = math.ceil((longest + 1) / _BINS)
    bins = Counter({begin: 0 for begin in range(0, longest + 1, width)})
    for length, count in lengths.items():
        bins[length // width * width] += count
    return {
        "shortest": min(lengths),
        "mean": round(sum(length * count for length, count in lengths.items()) / total, 1),
        "median": _quantile(lengths, 0.5),
        "p95": _quantile(lengths, 0.95),
        "longest": longest,
        "histogram": [{"from": begin, "to": begin + width - 1, "samples": bins[begin]} for begin in sorted(bins)],
    }


def _quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the samples do not exceed."""
    wanted, seen = share * lengths.total(), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            break
    return length


def format_report(report: dict[str, Any]) -> str:
    """The result of `check_data` for people; of long lists the beginning."""
    samples, bad, cut, repeated = report["samples"], report["bad"], report["truncated"], report["repeated"]
    media = ", ".join(f"{count:,} {kind}s" for kind, count in sorted(report["media"].items())) or "no media"
    lines = [
        f"{samples:,} samples, {media}",
        f"{report['tokens']:,} tokens, {report['supervised_tokens']:,} of them supervised",
    ]
    if report["lengths"]:
        lines += ["", *_histogram(report["lengths"])]
    if cut["samples"]:
        lines += ["", f"{cut['samples']:,} samples are cut, {cut['tokens']:,} tokens in all: {_some(cut['ids'])}"]
    if repeated["samples"]:
        pairs = [f"{later} as {first}" for first, later in repeated["ids"]]
        lines += ["", f"{repeated['samples']:,} samples have the content of an earlier one: {_some(pairs)}"]
    for fault, count in sorted(bad["by_fault"].items()):
        found = [problem["error"] for problem in bad["list"] if problem["fault"] == fault]
        lines += ["", f"{fault}: {count:,}", *(f"  {error}" for error in found[:_SHOWN])]
        lines += [f"  and {count - _SHOWN:,} more"] if count > _SHOWN else []
    lines += ["", f"{bad['samples']:,} of {samples:,} samples are bad; {bad['allowed']:,} may be"]
    return "\n".join(lines)


def _histogram(lengths: dict[str, Any]) -> list[str]:
    bins = lengths["histogram"]
    most = max(entry["samples"] for entry in bins)
    width = len(str(bins[-1]["to"]))
    head = (
        f"tokens per sample: {lengths['shortest']} to {lengths['longest']}, mean {lengths['mean']}, "
        f"median {lengths['median']}, 95% up to {lengths['p95']}"
    )
    rows = [
        f"  {entry['from']:>{width}}-{entry['to']:<{width}} {'#' * math.ceil(_BAR * entry['samples'] / most):<{_BAR}} "
        f"{entry['samples']:,}"
        for entry in bins
    ]
    return [head, *rows]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
