"""A trained run becomes one self-contained folder for other tools, checked by opening it again."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmfast.adapt import dequantize
from mmfast.connectors import build_connector
from mmfast.data import Sample
from mmfast.models import open_model
from mmfast.models.base import MultimodalModel
from mmfast.models.llava import Llava, LlavaConfig
from mmfast.models.llava_original import PROJECTOR_FILE, read_newline, read_projector, write_original

__all__ = ["export"]


def export(
    run: str,
    out: str,
    to: Literal["hf", "original"] = "hf",
    llm: str | None = None,
    encoder: str | None = None,
    overwrite: bool = False,
) -> float:
    """Writes a trained model as a folder that other tools open, with LoRA merged in and without quantisation.

    The folder appears complete or not at all. Before it does, it is opened again and compared with the trained
    model: a LLaVA on a fixed prompt with an image, other systems by what was trained. The largest difference of any
    logit, or of any value, is printed.

    Args:
        run: A run folder, or a folder with a saved model.
        out: Folder to write.
        to: hf is the layout of transformers' LlavaForConditionalGeneration (with high resolution
            LlavaNextForConditionalGeneration), which vLLM and others read. original is that of the system's authors:
            for LLaVA the repository's (llava_llama), with mm_projector.bin, which names the encoder and does not hold
            it; for other systems what was trained.
        llm: Folder of the language model, where it has moved since the training.
        encoder: Folder of the encoder, where it has moved since the training.
        overwrite: Whether a folder that is already there may be replaced.

    Returns:
        The largest difference.

    Raises:
        FileNotFoundError: If the run or one of its base models does not exist.
        FileExistsError: If `out` is there already and not empty, or holds what is to be exported.
        ValueError: If the layout cannot hold the model, or the logits are not finite.
    """
    if to not in ("hf", "original"):
        raise ValueError(f"export: to is {to!r}; 'hf' and 'original' are accepted")
    target = Path(out).expanduser().resolve()
    _check_target(target, [run, llm, encoder], overwrite)
    model = open_model(run, llm=llm, encoder=encoder)
    _check_target(target, list(model.base_names.values()), overwrite)
    if not isinstance(model, Llava) and to == "hf":
        raise ValueError(f"export: transformers has no layout for the system {model.system}; to 'original' is accepted")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename at the end stays on one file system.
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        write = _write_llava if isinstance(model, Llava) else _write_trained
        drift, report = write(cast(Any, model), temporary, to)
        temporary.chmod(0o755)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"written to {out}")
    print(report)
    return drift


def _write_llava(model: Llava, folder: Path, to: str) -> tuple[float, str]:
    """Writes a LLaVA, opens it again and compares logits."""
    batch = _probe(model)
    before = _logits(model, batch)
    dequantize(model, model.get_input_embeddings().weight.dtype)
    if to == "hf":
        model.save_pretrained(folder)
        del model
        after = _logits(Llava.from_pretrained(folder), batch)
    else:
        write_original(model, folder)
        after = _logits(_open_original(model, folder), batch)
    drift, largest = _drift(before, after), before.abs().max().item()
    return drift, (
        f"largest difference of a logit, exported against trained: {drift:.3g} (largest logit {largest:.3g})"
    )


def _write_trained(model: MultimodalModel, folder: Path, to: str) -> tuple[float, str]:
    """Writes what was trained in the authors' layout, reads it again and compares the tensors."""
    model.to_original(folder)
    names = model.base_names
    others = {base: names[base] for base in model.bases if base not in ("llm", "encoder")}
    read, _ = type(model).from_original(folder, names["llm"], names["encoder"], **others)
    state = read.trained_state()
    drift = max((tensor - state[name]).abs().max().item() for name, tensor in model.trained_state().items())
    return drift, f"largest difference of a value, exported against trained: {drift:.3g}"


def _check_target(target: Path, sources: list[str | None], overwrite: bool) -> None:
    for source in sources:
        if source not in (None, "", "world") and Path(str(source)).expanduser().resolve().is_relative_to(target):
            raise FileExistsError(f"export: {target} holds {source}, which is exported; choose another folder")
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise FileExistsError(
            f"export: {target} exists and is not empty; choose another folder or set overwrite, which replaces it"
        )


def _probe(model: Llava) -> dict[str, Tensor]:
    """One question on one image, the same for every model."""
    from PIL import Image

    image = Image.linear_gradient("L").convert("RGB")
    sample: Sample = {
        "id": "probe",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is in the image?"}],
            }
        ],
    }
    processor: Any = model.processor
    batch = processor.collate([processor.encode(sample, add_generation_prompt=True)])
    return {key: value for key, value in batch.items() if key != "labels"}


@torch.no_grad()
def _logits(model: Llava, batch: dict[str, Tensor]) -> Tensor:
    logits = model.eval()(**batch).logits
    return logits.float()


def _drift(before: Tensor, after: Tensor) -> float:
    # The written vocabulary may have grown by rows that belong to no token of the language model.
    drift = (before - after[..., : before.shape[-1]]).abs().max().item()
    if not math.isfinite(drift):
        raise ValueError(
            f"export: a logit of the probe is not finite (difference {drift}); a model with finite weights is "
            "accepted; nothing was written"
        )
    return drift


def _open_original(model: Llava, folder: Path) -> Llava:
    """The model on what was written; the encoder is not part of the layout."""
    config: Any = copy.deepcopy(model.language_model.config)
    dtype = model.get_input_embeddings().weight.dtype
    language_model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    state, _ = read_projector(folder / PROJECTOR_FILE)
    width = model.get_input_embeddings().weight.shape[1]
    connector = build_connector(model.config.connector, model.encoder.hidden_size, width)
    connector.load_state_dict(state)
    opened = Llava(cast(LlavaConfig, model.config), model.encoder, connector, language_model, model.processor)
    if opened.image_newline is not None:
        opened.image_newline.data = read_newline(folder).float()
    return opened


def _move(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old.")) / target.name
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old.parent)
