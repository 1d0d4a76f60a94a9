"""Tokenizers of the kinds that language models come with, made in memory, and processors that use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

# Several releases of transformers offer this class at their top only where torchvision is; it needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mmfast.data import Processor, get_template

_TEXT = (
    "USER: What is in the picture? ASSISTANT: A cat on a mat.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "[INST] <<SYS>>\nWhat?\n<</SYS>>\n\n[/INST] 1 2 3",
)


def _metaspace() -> Any:
    """Words with the space before them, single digits and single signs."""
    words, digits = pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([words, digits, pre_tokenizers.Punctuation()])


def _sentencepiece(legacy: bool) -> PreTrainedTokenizerFast:
    """Like Llama's: "▁" marks a space and begins every text, single digits, bytes for unknown characters.

    `legacy` puts "▁" by the normaliser, which also puts one after every special token.
    """
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = _metaspace()
    text = [line.replace("\n", " ") for line in _TEXT]  # a line break is a byte in Llama's vocabulary
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=250, special_tokens=special, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = _metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def _byte_level(begin: bool) -> PreTrainedTokenizerFast:
    """Like GPT-2's and Qwen's: " 3" is one token, nothing is put before a text.

    `begin` is as in Llama 3: a begin-of-text token, and offsets without the white space of a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|begin|>"] if begin else ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*_TEXT, " 3" * 9], trainer)
    if not begin:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    first = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), first])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>")


_KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "sentencepiece": lambda: _sentencepiece(legacy=False),
    "sentencepiece-legacy": lambda: _sentencepiece(legacy=True),
    "byte-level": lambda: _byte_level(begin=False),
    "byte-level-trimmed": lambda: _byte_level(begin=True),
}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """`make_tokenizer(kind)`: a new tokenizer; the kinds are the keys of `_KINDS`."""
    return lambda kind: _KINDS[kind]()


@pytest.fixture(scope="session")
def image_processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CLIP's image processor for 8x8 images, of the class that AutoImageProcessor chooses on this machine."""
    folder = tmp_path_factory.mktemp("image_processor")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_processor(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast], image_processor: Any
) -> Callable[..., Processor]:
    """`make_processor(kind="sentencepiece", template="short", **arguments)`; images are 4 tokens by default."""
    cache: dict[str, PreTrainedTokenizerFast] = {}

    def make(kind: str = "sentencepiece", template: str = "short", **arguments: Any) -> Processor:
        if kind not in cache:
            cache[kind] = make_tokenizer(kind)
        return Processor(cache[kind], image_processor, get_template(template), **{"tokens_per_image": 4, **arguments})

    return make


@pytest.fixture(params=sorted(_KINDS), scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of tokenizer in turn."""
    return str(request.param)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with `red.png` (12x8), `sub/blue.png`, `broken.png` (cut short) and `text.png` (no image)."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (12, 8), "red").save(folder / "red.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "sub" / "blue.png")
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "broken.png")
    data = (folder / "broken.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    return folder
