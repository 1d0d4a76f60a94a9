"""Tiny random models: every family the LLaVA code meets, with a tokenizer of one token for each character."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mmfast.models import Llava, LlavaConfig

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
VOCABULARY = len(SPECIALS) + len(string.printable)
IMAGE_TOKEN_ID = VOCABULARY  # the first id beyond the vocabulary
NUM_PATCHES = 4


def text_config(family: str = "llama", tied: bool = False, **changes: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return FAMILIES[family](**{**settings, **changes})


def vision_config(**changes: Any) -> CLIPVisionConfig:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    return CLIPVisionConfig(**{**settings, **changes})


def randomize(model: torch.nn.Module) -> Any:
    """Larger weights than the families' own initialisation, so that differences show; in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def build_llava(family: str = "llama", tied: bool = False, **settings: Any) -> Llava:
    config = LlavaConfig(
        text_config=text_config(family, tied),
        vision_config=vision_config(),
        image_token_id=IMAGE_TOKEN_ID,
        **settings,
    )
    return randomize(Llava(config))


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *string.printable])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def batch(padding_side: str = "right", images: tuple[int, ...] = (1, 2), seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of unequal lengths; row i has images[i] images."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for count in images:
        row = torch.randint(4, VOCABULARY, (3,), generator=generator).tolist()
        for _ in range(count):
            row += [IMAGE_TOKEN_ID] * NUM_PATCHES
            row += torch.randint(4, VOCABULARY, (2,), generator=generator).tolist()
        rows.append(row + torch.randint(4, VOCABULARY, (4,), generator=generator).tolist())
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), 3), torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE_TOKEN_ID), -100)
    labels[:, :3] = -100
    result = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if sum(images):
        result["pixel_values"] = torch.randn(sum(images), 3, 16, 16, generator=generator)
    return result


def rows_of(inputs: dict[str, torch.Tensor], images: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Each row of a batch alone and without its padding."""
    rows, start = [], 0
    for i, count in enumerate(images):
        real = inputs["attention_mask"][i].bool()
        row = {name: inputs[name][i : i + 1, real] for name in ("input_ids", "attention_mask", "labels")}
        if count:
            row["pixel_values"] = inputs["pixel_values"][start : start + count]
        rows.append(row)
        start += count
    return rows


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small lose more to the hand-over between threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tiny:
    """What the tests of this folder build their models from."""

    families = tuple(FAMILIES)
    image_token_id = IMAGE_TOKEN_ID
    num_patches = NUM_PATCHES
    vocabulary = VOCABULARY
    text_config = staticmethod(text_config)
    vision_config = staticmethod(vision_config)
    randomize = staticmethod(randomize)
    llava = staticmethod(build_llava)
    tokenizer = staticmethod(build_tokenizer)
    batch = staticmethod(batch)
    rows_of = staticmethod(rows_of)


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def write_llm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a language model's folder with its tokenizer."""

    def write(family: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"llm-{family}")
        config = text_config(family, tied, **changes)
        randomize(AutoModelForCausalLM.from_config(config)).to(dtype).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def write_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a vision tower's folder with its image processor."""

    def write(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("encoder")
        randomize(CLIPVisionModel(vision_config(**changes))).save_pretrained(folder)
        size = {"height": 16, "width": 16}
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def write_projected_encoder(write_encoder: Callable[..., Path]) -> Callable[[int], Path]:
    """The same with CLIP's projection, to so many channels."""

    def write(projection_dim: int) -> Path:
        folder = write_encoder()
        tower = randomize(CLIPVisionModelWithProjection(vision_config(projection_dim=projection_dim)))
        tower.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def llm(write_llm: Callable[..., Path]) -> Path:
    torch.manual_seed(0)  # the same weights whichever test is the first to ask
    return write_llm()


@pytest.fixture(scope="session")
def encoder(write_encoder: Callable[..., Path]) -> Path:
    torch.manual_seed(1)
    return write_encoder()
