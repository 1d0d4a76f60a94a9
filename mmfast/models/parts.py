"""Opening the frozen parts of a model from local folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

# Several releases of transformers offer this class at their top only where torchvision is; it needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mmfast.adapt import load_quantized
from mmfast.nn.quantized_state import FORMATS, Format

if TYPE_CHECKING:
    from mmfast.data import Processor

__all__ = [
    "absolute_name",
    "as_config",
    "open_language_model",
    "open_processor",
    "quantized_format",
    "resolve_language_model",
    "text_config_of",
]


def resolve_language_model(name: str | Path) -> Path:
    """The folder that `name` stands for: "world" is the language model shipped with the package.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if name == "world":
        from mmfast import world

        return world.weights("llm")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"language model: the folder {folder} does not exist; a local folder with a causal language model or "
            '"world" is accepted; nothing is downloaded, so fetch the model first'
        )
    return folder


def absolute_name(name: str | Path) -> str:
    """How a base model is written down: "world" as it is, a folder by its absolute path."""
    return "world" if name == "world" else str(Path(name).expanduser().resolve())


def as_config(config: PreTrainedConfig | dict[str, Any] | None, default: str) -> Any:
    """A part's configuration, from its dict where it is one; `default` is the model type of a dict without."""
    if isinstance(config, PreTrainedConfig):
        return config
    return AutoConfig.for_model(**{"model_type": default, **(config or {})})


def text_config_of(folder: Path) -> Any:
    """The configuration of the language model in `folder`, also inside a multimodal one."""
    return AutoConfig.from_pretrained(folder).get_text_config(decoder=True)


def quantized_format(folder: Path, base_dtype: str | None) -> Format | None:
    """The format that the language model's linear layers will have, from its configuration alone; None: dense.

    Args:
        folder: Folder of the language model.
        base_dtype: "nf4", "int8", a dtype for dense ones, or None for what the folder has.

    Raises:
        ValueError: If the folder is quantised already, to something else.
    """
    found: Any = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) or {}
    held = found.get("quant_method")
    if held == "bitsandbytes":
        held = "nf4" if found.get("load_in_4bit") else "int8"
    if held is not None and base_dtype not in (None, held):
        raise ValueError(
            f"language model: base_dtype is {base_dtype!r}, but {folder} is quantised already ({held}); {held} or null "
            "is accepted; to have another, pass the folder of the dense model"
        )
    return next((format for format in FORMATS if format == (base_dtype or held)), None)


def open_language_model(folder: Path, dtype: torch.dtype, base_dtype: str | None = None) -> PreTrainedModel:
    """Loads a causal language model with all its weights, quantised ones as `QuantizedLinear`.

    Args:
        folder: Its folder.
        dtype: Of everything that is not quantised, and so of the computation.
        base_dtype: "nf4" or "int8" quantises the linear layers while they are read, so that the dense model is never
            held; None: as the folder has them.

    Raises:
        ValueError: If weights are missing in the folder, or it is quantised already to something else.
    """
    format = quantized_format(folder, base_dtype)
    if format is not None:
        return load_quantized(folder, dtype, format=format)
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, report = opened
    if report["missing_keys"]:
        raise ValueError(
            f"language model: {folder} lacks the weights {sorted(report['missing_keys'])[:8]}; a folder with a whole "
            "causal language model is accepted; was the download complete?"
        )
    return model


def open_processor(
    tokenizer_folder: Path,
    image_folder: Path,
    template: str,
    tokens_per_image: int,
    kind: type[Processor] | None = None,
    **settings: Any,
) -> Processor:
    """Joins the language model's tokenizer and the encoder's image processor.

    Args:
        tokenizer_folder: Folder of the language model.
        image_folder: Folder of the encoder.
        template: Name of the conversation template.
        tokens_per_image: Features of one medium.
        kind: Class of the processor; None: `mmfast.data.Processor`.
        **settings: Further arguments of that class.
    """
    from mmfast.data import Processor, get_template

    return (kind or Processor)(
        AutoTokenizer.from_pretrained(tokenizer_folder),
        AutoImageProcessor.from_pretrained(image_folder),
        template=get_template(template),
        tokens_per_image=tokens_per_image,
        **settings,
    )
