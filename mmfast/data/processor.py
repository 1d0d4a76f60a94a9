"""The processor: a sample becomes token ids, labels and media; encoded samples become a batch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from mmfast.data.features import FeatureCache, Features
from mmfast.data.images import image_digest, load_image, pad_to_square, resolve_media
from mmfast.data.samples import ImagePart, MediaPart, Sample, content_parts, validate_sample, with_media_first
from mmfast.data.templates import AnyPiece, ControlPiece, MediaPiece, Piece, Template, get_template

IGNORE = -100
"""The label of a position that is not learned."""

# What a character of a segment is: text, or part of a control token, in a prompt or an answer; or a breaker.
_PROMPT, _PROMPT_CONTROL, _ANSWER, _ANSWER_CONTROL, _BREAK = b"p", b"P", b"a", b"A", b"-"
_BREAKER = "\ue000"  # private use: belongs to no special token
_SETTINGS = "mmfast_processor.json"


@dataclass(frozen=True)
class Encoded:
    """One sample, ready for `Processor.collate`.

    Args:
        id: of the sample.
        input_ids: each medium is so many times the image token as it has features.
        labels: as long as `input_ids`; the token itself where supervised, else -100. The model shifts them.
        media: what `Processor.load_medium` made of each medium, in order; for images float32 [3, H, W].
        media_tokens: tokens of each medium, in order.
        cut_tokens: tokens that were cut off at the end, to fit `max_length`.
        bad: errors of the bad samples in whose place this one stands, see `JoinedDataset`.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    media: list[Any]
    media_tokens: list[int]
    cut_tokens: int = 0
    bad: tuple[str, ...] = ()

    @property
    def supervised_tokens(self) -> int:
        """Tokens that enter the loss (the first position of a sequence is predicted from nothing)."""
        return sum(label != IGNORE for label in self.labels[1:])


class Processor:
    """Turns samples into batches for one language model, one image encoder and one conversation template.

    A system whose media are not single images of one size derives from it and overrides `media_kinds`,
    `count_media`, `read_media`, `collate_media` and, for what it is set to, `adjustable`, `settings` and
    `preprocessing`.

    The text between two media is tokenised as one string. A token is supervised if its first character is; the
    character offsets of the tokenizer tell, so the labels do not depend on how a tokenizer splits pieces of text.
    The space before an answer is part of the answer (see `Template`), and a token that begins in a prompt and ends
    in an answer is refused: encoding with `add_generation_prompt` gives exactly the ids that come before the answer
    in training.

    Text never becomes a control token: a literal `</s>` or `<image>` in a question or an answer is tokenised as the
    characters it is made of.

    Args:
        tokenizer: a fast tokenizer of transformers. `image_token` is added to it if absent.
        image_processor: of the image encoder (transformers), called as `image_processor(images=[...],
            return_tensors="pt")`.
        template: the conversation template.
        image_token: the token that stands for one image feature. Its id may be beyond the language model's
            vocabulary: models replace it by image features and never look it up.
        tokens_per_image: image features of one image that reach the language model, at least 1.
        max_length: the most tokens of a sample, those of media included. Text at the end of a sample is cut to
            fit; media never are.
        pad_to_square: pad images to a square of the mean colour first, so that the encoder's centre crop sees all.
        media_first: write a turn's media before its text, wherever the data has them.

    Raises:
        TypeError: a slow tokenizer, which has no character offsets.
        ValueError: `tokens_per_image` or `max_length` below 1; a template that ends answers with the end-of-text
            token, and a tokenizer without one.
    """

    media_kinds: ClassVar[tuple[str, ...]] = ("image",)
    """Types of the parts of a sample that it reads."""
    adjustable: ClassVar[tuple[str, ...]] = ("max_length", "pad_to_square", "media_first")
    """Attributes that may change after it was made; a trained model keeps them."""
    cache: FeatureCache | None = None
    """Where features of media are that take the place of their pixels; see `CachingModel.fill_feature_cache`."""

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        template: Template,
        image_token: str = "<image>",
        tokens_per_image: int = 1,
        max_length: int = 2048,
        pad_to_square: bool = False,
        media_first: bool = False,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"Processor: {type(tokenizer).__name__} is a slow tokenizer; labels are made from the character "
                "offsets of a fast one; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        if tokens_per_image < 1 or max_length < 1:
            raise ValueError(
                f"Processor: tokens_per_image is {tokens_per_image} and max_length is {max_length}; both must be >= 1"
            )
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token = image_token
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self.pad_to_square = pad_to_square
        self.media_first = media_first
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([image_token], special_tokens=True)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.template = template
        self._bos_ids = _begin_ids(tokenizer)
        literals = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._literals = literals | set(tokenizer.all_special_tokens) | {image_token}
        longest_first = sorted(self._literals, key=len, reverse=True)
        alternatives = "|".join(re.escape(literal) for literal in longest_first)
        self._literal_start = re.compile(f"(?=(?:{alternatives}))(.)", re.DOTALL)

    @property
    def template(self) -> Template:
        """The conversation template; assign another one to train or ask in another form.

        Raises:
            ValueError: (assignment) the template ends answers with the end-of-text token and the tokenizer has none.
        """
        return self._template

    @template.setter
    def template(self, template: Template) -> None:
        token, token_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        ids = [] if token is None else self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if template.eos and ids != [token_id]:
            raise ValueError(
                f"Processor: the tokenizer's end-of-text token is {token!r} with ids {ids}; template "
                f"'{template.name}' ends answers with it, as one token; set tokenizer.eos_token"
            )
        self._template = template

    @property
    def pad_token_id(self) -> int:
        """What fills up a batch (masked by the attention mask): the pad, else the unknown, else the end token."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def encode(
        self,
        sample: Sample,
        add_generation_prompt: bool = False,
        media_folder: str | os.PathLike[str] | None = None,
        load_media: bool = True,
    ) -> Encoded:
        """Encodes one sample.

        Args:
            sample: see `mmfast.data.samples`.
            add_generation_prompt: the sample ends with a question and the ids where the answer begins.
            media_folder: where the image paths of the sample start.
            load_media: False leaves `media` empty and decodes nothing (to check or count tokens).

        Raises:
            ValueError: names the sample: malformed, does not suit the template or the tokenizer, has media of
                another kind, a medium cannot be read, its media do not fit in `max_length`, or it is a generation
                prompt that does not fit.
        """
        validate_sample(sample, allow_empty_answers=add_generation_prompt)
        where = f"sample '{sample['id']}'"
        self._check_kinds(sample, where)
        messages = with_media_first(sample["messages"]) if self.media_first else sample["messages"]
        try:
            pieces = self.template.render(messages, add_generation_prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        parts = [piece.part for piece in pieces if isinstance(piece, MediaPiece)]
        media_tokens = [self.count_media(part, media_folder, sample["id"]) for part in parts]
        input_ids, labels, end_of_media = self._tokenize(pieces, media_tokens, where)
        if not input_ids:
            raise ValueError(f"{where}: not one token with template '{self.template.name}'; give it a text or an image")
        cut = max(0, len(input_ids) - self.max_length)
        if cut:
            self._check_cut(len(input_ids), end_of_media, add_generation_prompt, where)
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        media = [self.load_medium(part, media_folder, sample["id"]) for part in parts] if load_media else []
        return Encoded(sample["id"], input_ids, labels, media, media_tokens, cut)

    def count_media(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> int:
        """Tokens that a medium becomes. May read a file's header, and decodes nothing.

        Raises:
            ValueError: as `read_media`, as far as a header tells.
        """
        return self.tokens_per_image

    def read_media(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> Any:
        """A medium as the encoder takes it: float32 [3, H, W] of an image.

        Raises:
            ValueError: as `load_image`.
        """
        image = load_image(cast(ImagePart, part), media_folder, sample_id)
        if self.pad_to_square:
            image = pad_to_square(image, self.image_processor.image_mean)
        pixels: Tensor = self.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)

    def load_medium(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> Any:
        """What `read_media` makes of a medium or, where the cache has them, its `Features`.

        Raises:
            ValueError: as `read_media`.
        """
        key = None if self.cache is None else self.cache_key(part, media_folder, sample_id)
        found = None if self.cache is None or key is None else self.cache.get(key)
        return self.read_media(part, media_folder, sample_id) if found is None else Features(found)

    def cache_key(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> str | None:
        """What tells a medium from others: a file's path, size and time of change; the pixels of one in memory.

        None: its features are not to be cached.

        Raises:
            ValueError: as `read_media`, of a path.
        """
        kind = part["type"]
        source = cast(Any, part)[kind]
        if not isinstance(source, str):
            return self._key_in_memory(part, sample_id)
        path = resolve_media(source, media_folder, sample_id, kind)
        status = path.stat()
        return f"{path}\n{status.st_size}\n{status.st_mtime_ns}"

    def _key_in_memory(self, part: MediaPart, sample_id: str) -> str:
        return image_digest([load_image(cast(ImagePart, part), None, sample_id)])

    def preprocessing(self) -> str:
        """What decides the pixels of a medium beside itself; part of the revision of a cache."""
        return f"pad_to_square {self.pad_to_square}, {self.image_processor.to_json_string()}"

    def pictures(self, medium: Any) -> Tensor:
        """What the encoder sees of a medium, as `read_media` made it: float32 [n, 3, H, W] in [0, 1]; n may be 0."""
        pixels = medium if medium.dim() == 4 else medium[None]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.pixel_statistics())
        return (pixels * std + mean).clamp(0, 1)

    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation of each channel that pixels are normalised by."""
        return self.image_processor.image_mean, self.image_processor.image_std

    def collate_media(self, media: Sequence[Any]) -> dict[str, Tensor]:
        """What `read_media` made of the media of a batch, at least one, in order, as arguments of the model."""
        return {"pixel_values": torch.stack(list(media))}

    def collate_all(self, media: Sequence[Any]) -> dict[str, Tensor]:
        """The media of a whole batch, at least one: those that were read, and `Features`.

        Returns:
            What `collate_media` makes of the former; and, if there are any of the latter, their rows `features`
            [rows, P, D] and `has_features` bool [n], which media these are.
        """
        read = [medium for medium in media if not isinstance(medium, Features)]
        features = [medium.values for medium in media if isinstance(medium, Features)]
        batch = self.collate_media(read) if read else {}
        if features:
            batch["features"] = torch.cat(features)
            batch["has_features"] = torch.tensor([isinstance(medium, Features) for medium in media])
        return batch

    def collate(
        self, encoded: Sequence[Encoded], padding_side: Literal["left", "right"] = "right"
    ) -> dict[str, Tensor]:
        """Pads encoded samples to one length.

        Args:
            encoded: at least one.
            padding_side: "right" to train, "left" to generate.

        Returns:
            `input_ids`, `attention_mask`, `labels`: int64 [B, L]; and, only if there is a medium, what
            `collate_all` makes of all media in order: for images `pixel_values`, float32 [num_images, 3, H, W].

        Raises:
            ValueError: no samples, an unknown side, or a sample whose media do not match its image tokens.
        """
        if not encoded or padding_side not in ("left", "right"):
            raise ValueError(
                f"collate: {len(encoded)} samples, padding_side is {padding_side!r}; expected at least one sample, and "
                "'left' or 'right'"
            )
        for item in encoded:
            tokens = item.input_ids.count(self.image_token_id)
            if tokens != sum(item.media_tokens) or len(item.media) != len(item.media_tokens):
                raise ValueError(
                    f"collate: sample '{item.id}' has {tokens} image tokens and {len(item.media)} media, but its media "
                    f"have {item.media_tokens} tokens; encode it with load_media=True by this processor"
                )
        shape = (len(encoded), max(len(item.input_ids) for item in encoded))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE),
        }
        for row, item in enumerate(encoded):
            length = len(item.input_ids)
            place = slice(0, length) if padding_side == "right" else slice(shape[1] - length, shape[1])
            batch["input_ids"][row, place] = torch.tensor(item.input_ids)
            batch["attention_mask"][row, place] = 1
            batch["labels"][row, place] = torch.tensor(item.labels)
        media = [medium for item in encoded for medium in item.media]
        return batch | (self.collate_all(media) if media else {})

    def pack(self, encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        """Puts encoded samples one after the other into one row, without padding.

        Args:
            encoded: at least one.

        Returns:
            `input_ids` and `labels`, int64 [1, L]; the first label of each sample is -100, for nothing before it
            predicts it. `sample_lengths`, int64 [n], which tells the model where samples begin. And as `collate`,
            media.

        Raises:
            ValueError: as `collate`.
        """
        batch = self.collate(encoded)
        real = batch.pop("attention_mask").bool()
        batch["labels"][:, 0] = IGNORE
        rows = {name: batch[name][real][None] for name in ("input_ids", "labels")}
        return batch | rows | {"sample_lengths": real.sum(1)}

    def settings(self) -> dict[str, Any]:
        """Arguments of the class beside tokenizer and image processor, the template by its name."""
        return {
            "template": self.template.name,
            "image_token": self.image_token,
            "tokens_per_image": self.tokens_per_image,
            "max_length": self.max_length,
            "pad_to_square": self.pad_to_square,
            "media_first": self.media_first,
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer, image processor (`preprocessor_config.json`) and `mmfast_processor.json` to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        (folder / _SETTINGS).write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], template: Template | str | None = None, **overrides: Any
    ) -> Processor:
        """Opens a folder with tokenizer and image processor files, on disk only.

        Args:
            folder: written by `save_pretrained`, or by transformers; in the second case pass what
                `mmfast_processor.json` would have told (`template`, `tokens_per_image`).
            template: instead of the saved one; needed if that is not one of `TEMPLATES`.
            overrides: further arguments of `Processor`, instead of the saved ones.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: no template is known, or none of its name.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"Processor: no folder '{folder}'; expected one with tokenizer files")
        from transformers import AutoTokenizer

        # Several releases of transformers offer this class at their top only where torchvision is; it needs none.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        file = folder / _SETTINGS
        saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        name = saved.pop("template", None)
        chosen = name if template is None else template
        if chosen is None:
            raise ValueError(f"Processor: '{folder}' has no {_SETTINGS}; pass template and tokens_per_image")
        return cls(
            tokenizer=AutoTokenizer.from_pretrained(folder),
            image_processor=AutoImageProcessor.from_pretrained(folder),
            template=get_template(chosen) if isinstance(chosen, str) else chosen,
            **{**saved, **overrides},
        )

    def _check_kinds(self, sample: Sample, where: str) -> None:
        for message in sample["messages"]:
            for part in content_parts(message):
                if part["type"] not in ("text", *self.media_kinds):
                    raise ValueError(
                        f"{where}: it has a part of type {part['type']!r}; this model reads text and "
                        f"{', '.join(self.media_kinds)}; remove the part, or use a system that reads it"
                    )

    def _tokenize(
        self, pieces: Sequence[AnyPiece], media_tokens: Sequence[int], where: str
    ) -> tuple[list[int], list[int], int]:
        """Ids and labels of `pieces`, and the length up to the end of the last medium."""
        counts = iter(media_tokens)
        input_ids = list(self._bos_ids)
        labels = [IGNORE] * len(input_ids)
        end_of_media = 0
        segment: list[Piece | ControlPiece] = []
        for piece in [*pieces, None]:
            if isinstance(piece, Piece | ControlPiece):
                segment.append(piece)
                continue
            ids, supervised = self._tokenize_segment(segment, where)
            input_ids += ids
            labels += [token if learn else IGNORE for token, learn in zip(ids, supervised, strict=True)]
            segment = []
            if isinstance(piece, MediaPiece):
                count = next(counts)
                input_ids += [self.image_token_id] * count
                labels += [IGNORE] * count
                end_of_media = len(input_ids)
        return input_ids, labels, end_of_media

    def _tokenize_segment(self, pieces: Sequence[Piece | ControlPiece], where: str) -> tuple[list[int], list[bool]]:
        """Ids of the text between two media, or seams, and whether each is supervised."""
        text, kinds = self._segment_text(pieces)
        if not text:
            return [], []
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, supervised = [], []
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            # A token may span nothing (a prefix that the tokenizer adds): it belongs to what comes next.
            spanned = kinds[start:end] or kinds[start : start + 1] or kinds[-1:]
            if _BREAK in spanned:
                if spanned.strip(_BREAK):
                    raise ValueError(self._literal_error(text[start:end], where))
                continue
            learned = spanned.startswith((_ANSWER, _ANSWER_CONTROL))
            if not learned and (_ANSWER in spanned or _ANSWER_CONTROL in spanned):
                raise ValueError(
                    f"{where}: the token {text[start:end]!r} joins the end of a prompt to the begin of an answer, so "
                    f"generation would see other tokens than training; template '{self.template.name}' does not suit "
                    "this tokenizer; use a template or a tokenizer that separates them at white space"
                )
            is_control = _PROMPT_CONTROL in spanned or _ANSWER_CONTROL in spanned
            if not is_control and text[start:end].strip() in self._literals:
                raise ValueError(self._literal_error(text[start:end], where))
            ids.append(token)
            supervised.append(learned)
        return ids, supervised

    def _segment_text(self, pieces: Sequence[Piece | ControlPiece]) -> tuple[str, bytes]:
        """The string of a segment and the kind of each of its characters.

        A special token in a text is broken by a private-use character after its first one; `_tokenize_segment`
        leaves out the tokens of that character. (Tokenizers offer no other way to take some occurrences of a special
        token as text and others, in the same string, as control.)
        """
        texts, kinds = [], []
        for piece in pieces:
            if isinstance(piece, ControlPiece):
                token = getattr(self.tokenizer, f"{piece.token}_token") or ""
                texts.append(token)
                kinds.append((_ANSWER_CONTROL if piece.supervised else _PROMPT_CONTROL) * len(token))
                continue
            kind = _ANSWER if piece.supervised else _PROMPT
            position = 0
            for match in self._literal_start.finditer(piece.text):
                run = piece.text[position : match.end()]
                texts.append(run + _BREAKER)
                kinds.append(kind * len(run) + _BREAK)
                position = match.end()
            texts.append(piece.text[position:])
            kinds.append(kind * len(texts[-1]))
        return "".join(texts), b"".join(kinds)

    def _literal_error(self, span: str, where: str) -> str:
        shown = span.replace(_BREAKER, "")
        return (
            f"{where}: {shown!r} in its text cannot be told from a special token by this tokenizer; remove it from "
            "the text"
        )

    def _check_cut(self, length: int, end_of_media: int, is_prompt: bool, where: str) -> None:
        """Whether cutting the end of a sequence to `max_length` would cut what must stay."""
        if end_of_media > self.max_length:
            raise ValueError(
                f"{where}: its {' and '.join(self.media_kinds)}s end at token {end_of_media} but max_length is "
                f"{self.max_length}; only text "
                "after the last of them can be cut; raise max_length, shorten the text before, or use fewer"
            )
        if is_prompt:
            raise ValueError(
                f"{where}: the prompt has {length} tokens but max_length is {self.max_length}; a prompt is not cut; "
                "shorten it or raise max_length"
            )


def _begin_ids(tokenizer: Any) -> list[int]:
    """The begin-of-text token, if the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and with_special[:1] == [bos] else []
