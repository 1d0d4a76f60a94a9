"""MiniGPT-4: a frozen Q-Former reads the image, and one linear map takes its queries to the language model.

The second variant, of MiniGPT-v2 and of MiniGPT-4 on LLaMA-2, has no Q-Former: four neighbouring patches become one
token, and the linear map is four times as wide.

Source: Zhu et al., "MiniGPT-4" (arXiv 2304.10592); Chen et al., "MiniGPT-v2" (arXiv 2310.09478); the learning rates are
those of https://github.com/Vision-CAIR/MiniGPT-4 `train_configs/` (BSD-3-Clause).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mmfast.connectors import VisualQFormer, merge_patches, read_q_former
from mmfast.connectors.q_former import MERGED_PATCHES
from mmfast.encoders import ClipEncoder, EvaEncoder, FrozenEncoder
from mmfast.models.architectures import text_config_named, vision_config_named
from mmfast.models.base import MultimodalModel
from mmfast.models.minigpt4_original import read_original, write_original
from mmfast.models.parts import (
    as_config,
    open_language_model,
    resolve_language_model,
)
from mmfast.models.stages import LoraSpec, Stage
from mmfast.models.trained import check_state

if TYPE_CHECKING:
    from mmfast.data import Processor

__all__ = ["MiniGPT4", "MiniGPT4Config"]

_TEMPLATES = {"q_former": "minigpt4_chat", "four_patches": "minigpt4_llama_2"}
_HEAD_SIZE = 64
_IMAGE_SIZE_V2 = 448
_LORA_ALPHA = 16.0
# MiniGPT-4: train_configs/minigpt4_stage1_pretrain.yaml, minigpt4_stage2_finetune.yaml. The first stage is what BLIP-2
# did before (its second stage: captions, through the frozen language model), for where no BLIP-2 can be loaded; its
# learning rate is that of LAVIS, lavis/projects/blip2/train/pretrain_stage2.yaml.
_STAGES_Q_FORMER = {
    "q_former": Stage("q_former", "plain", {"q_former": 1e-4, "connector": 1e-4}),
    "pretrain": Stage("pretrain", "plain", {"connector": 1e-4}),
    "finetune": Stage("finetune", "minigpt4", {"connector": 3e-5}),
}
# MiniGPT-4: train_configs/minigpt4_llama2_stage{1,2}_*.yaml; MiniGPT-v2: train_configs/minigptv2_finetune.yaml.
_STAGES_FOUR_PATCHES = {
    "pretrain": Stage("pretrain", "plain", {"connector": 1e-4}),
    "finetune": Stage("finetune", "minigpt4_llama_2", {"connector": 3e-5}),
    "finetune_lora": Stage(
        "finetune_lora",
        "minigpt_v2",
        {"connector": 1e-5, "lora": 1e-5},
        LoraSpec(64, _LORA_ALPHA, dropout=0.05, targets=("q_proj", "v_proj")),
    ),
}


class MiniGPT4Config(PreTrainedConfig):
    """Configuration of `MiniGPT4`.

    Args:
        text_config: Configuration of the language model, or its dict.
        vision_config: Configuration of the vision tower of BLIP-2 or CLIP, or its dict.
        connector: "q_former", or "four_patches" for the variant without one.
        num_queries: Tokens that one image becomes, with a Q-Former.
        q_former_sizes: Sizes of the Q-Former other than BLIP-2's, by the names of `mmfast.nn.QFormer`.
        image_size: Side of the images, where it is not the vision tower's; MiniGPT-v2 has 448.
        image_token_id: Id that marks the place of a feature; it may lie beyond the vocabulary.
        template: Name of the conversation template to chat with.

    Raises:
        ValueError: If the connector is unknown.
    """

    model_type = "mmfast_minigpt4"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: str = "q_former",
        num_queries: int = 32,
        q_former_sizes: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        image_token_id: int = 32000,
        template: str = "minigpt4_chat",
        **kwargs: Any,
    ) -> None:
        if connector not in _TEMPLATES:
            raise ValueError(f"MiniGPT4: connector is {connector!r}; accepted are {', '.join(_TEMPLATES)}")
        self.text_config = as_config(text_config, "llama")
        self.vision_config = as_config(vision_config, "blip_2_vision_model")
        if image_size is not None:
            self.vision_config.image_size = image_size
        self.connector = connector
        self.num_queries = num_queries
        self.q_former_sizes = dict(q_former_sizes or {})
        self.image_size = image_size
        self.image_token_id = image_token_id
        self.template = template
        super().__init__(**kwargs)


class MiniGPT4(MultimodalModel):
    """MiniGPT-4 and, with the connector "four_patches", MiniGPT-v2.

    `MiniGPT4(config)` has random weights; `from_parts` puts a fresh linear map between pretrained models;
    `from_pretrained` opens a trained one.

    The encoder is EVA ViT-g of a BLIP-2 model or, as in BLIP-2's ViT-L variant, a CLIP tower up to its last layer but
    one, with its class token. The Q-Former stays in eval mode, without dropout, in every stage that does not train it.

    Args:
        config: The configuration.
        encoder: The encoder; None builds one from the configuration. Likewise the three below.
        q_former: The Q-Former; always None with the connector "four_patches".
        connector: The linear map to the language model's embeddings.
        language_model: The language model.
        processor: Turns samples into batches.
    """

    config_class = MiniGPT4Config
    system = "minigpt4"
    bases = ("llm", "encoder", "q_former")
    original_options = ("q_former",)
    settings = ("connector", "num_queries", "q_former_sizes", "image_size", "template")
    parts = ("encoder", "q_former", "connector", "language_model", "lora")
    frozen_parts = ("encoder", "language_model")

    def __init__(
        self,
        config: MiniGPT4Config,
        encoder: FrozenEncoder | None = None,
        q_former: VisualQFormer | None = None,
        connector: nn.Module | None = None,
        language_model: PreTrainedModel | None = None,
        processor: Processor | None = None,
    ) -> None:
        if encoder is None:
            encoder = _encoder_from_config(config.vision_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        if q_former is None and config.connector == "q_former":
            q_former = VisualQFormer(encoder.hidden_size, config.num_queries, **config.q_former_sizes)
        if connector is None:
            width = MERGED_PATCHES * encoder.hidden_size if q_former is None else q_former.hidden_size
            connector = nn.Linear(width, cast(Any, language_model.get_input_embeddings()).weight.shape[1])
        super().__init__(config, encoder, connector, language_model, processor)
        self.q_former = q_former
        if q_former is not None:
            # One that is not written down by a name of its own is kept with what trained.
            self.trained_parts.add("q_former")

    @classmethod
    def from_parts(
        cls,
        llm: str | Path,
        encoder: str | Path,
        connector: str = "q_former",
        dtype: torch.dtype = torch.float32,
        *,
        base_dtype: str | None = None,
        q_former: str | Path = "",
        num_queries: int = 32,
        q_former_sizes: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        template: str = "minigpt4_chat",
    ) -> MiniGPT4:
        """Puts a fresh linear map between a pretrained language model and a pretrained encoder with its Q-Former.

        Args:
            llm: Folder of a causal language model with its tokenizer, or "world" for the shipped one.
            encoder: Folder of a BLIP-2 or CLIP model with its image processor, or "world" for the shipped one.
            connector: "q_former", or "four_patches" for the variant without one; it is made in float32.
            dtype: Dtype of the pretrained models.
            base_dtype: Format of the language model's frozen linear layers, see `open_language_model`.
            q_former: Pretrained Q-Former: a file of BLIP-2 in LAVIS's layout, such as blip2_pretrained_flant5xxl.pth,
                or a folder of a BLIP-2 model of transformers. "" is a fresh one, for the stage "q_former" to train.
            num_queries: Tokens that one image becomes, with a Q-Former.
            q_former_sizes: Sizes of the Q-Former other than BLIP-2's.
            image_size: Side of the images, where it is not the encoder's.
            template: Name of the conversation template to chat with.

        Raises:
            FileNotFoundError: If a folder or file does not exist.
            ValueError: If weights are missing or of other sizes, or the connector is unknown.
        """
        llm_folder, encoder_folder = resolve_language_model(llm), FrozenEncoder.resolve(encoder)
        config = MiniGPT4Config(
            text_config=text_config_named(llm_folder),
            vision_config=vision_config_named(encoder_folder),
            connector=connector,
            num_queries=num_queries,
            q_former_sizes=q_former_sizes,
            image_size=image_size,
            template=template,
        )
        queries = _open_q_former(config, q_former, dtype)
        vision = _open_encoder(encoder_folder, config, dtype)
        language_model = open_language_model(llm_folder, dtype, base_dtype)
        model = cls(config, vision, queries, language_model=language_model)
        model._name_parts(llm, encoder, q_former)
        return model

    @classmethod
    def from_original(
        cls,
        source: str | Path,
        llm: str | Path,
        encoder: str | Path,
        *,
        template: str | None = None,
        dtype: str = "float32",
        q_former: str | Path = "",
        **settings: Any,
    ) -> tuple[MiniGPT4, dict[str, str]]:
        """As in `MultimodalModel`: the trained parts of a `checkpoint_<epoch>.pth`.

        With LoRA in it, it is one of MiniGPT-v2: its LoRA has alpha 16 and dropout 0.05, and with EVA its images have
        448 pixels.

        Args:
            source: The file, or the folder with it.
            llm: Folder of the language model that it was trained with, or "world".
            encoder: Folder of the encoder that it was trained with, or "world".
            template: Name of the conversation template to chat with; None: that of the checkpoint's system.
            dtype: Dtype in which the pretrained parts are to be opened.
            q_former: The pretrained Q-Former, as in `from_parts`, where the checkpoint was trained on one.
            **settings: Settings of `from_parts` that it shall have in place of those that the checkpoint tells.
        """
        where = f"{cls.__name__}.from_original"
        state, names = read_original(source)
        vision, text = vision_config_named(encoder), text_config_named(llm)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        cls.check_shapes(where, shapes, vision.hidden_size, text.hidden_size)
        adapted = [name for name in state if name.endswith(".lora_a")]
        own = _without_prefix(state, "q_former.")
        queries = read_q_former(q_former)[0] if q_former and not own else own
        chosen = _q_former_settings(where, queries) if queries else _four_patches(where, state, vision.hidden_size)
        if adapted and vision.model_type == "blip_2_vision_model":
            chosen["image_size"] = _IMAGE_SIZE_V2
        chosen["template"] = template or ("minigpt_v2" if adapted else _TEMPLATES[chosen["connector"]])
        model = cls.skeleton(llm, encoder, **{**chosen, **settings})
        model.language_model.to(getattr(torch, dtype))
        model._name_parts(llm, encoder, q_former)
        if own:
            model.trained_parts.add("q_former")
        if adapted:
            targets = tuple(sorted({name.split(".")[-2] for name in adapted}))
            model.add_lora(LoraSpec(state[adapted[0]].shape[0], _LORA_ALPHA, dropout=0.05, targets=targets))
        check_state(where, model.trained_state(), state)
        model.load_state_dict(state, strict=False, assign=True)
        return model.eval(), names

    def to_original(self, folder: str | Path) -> dict[str, str]:
        """As in `MultimodalModel`: writes `checkpoint_0.pth`, see `write_original`."""
        return write_original(self, Path(folder).expanduser())

    @classmethod
    def skeleton(cls, llm: str | Path, encoder: str | Path, **settings: Any) -> MiniGPT4:
        """As in `MultimodalModel`; a pretrained Q-Former is counted as part of the model, its file is not opened."""
        settings.pop("q_former", None)
        return super().skeleton(llm, encoder, **settings)

    def _name_parts(self, llm: str | Path, encoder: str | Path, q_former: str | Path) -> None:
        """Opens the processor of pretrained parts, and writes down what they are."""
        self.attach_processor(llm, encoder)
        self.name_bases(llm=llm, encoder=encoder, q_former=q_former)
        if q_former:
            self.trained_parts.discard("q_former")

    def attach_processor(self, llm: str | Path, encoder: str | Path) -> None:
        """As in `MultimodalModel`."""
        super().attach_processor(llm, encoder)
        size = self.config.image_size
        if size is not None:
            cast(Any, self.processor).image_processor.size = {"height": size, "width": size}

    def processor_settings(self) -> dict[str, Any]:
        """As in `MultimodalModel`."""
        return {"template": self.config.template, "tokens_per_image": self.features_per_medium}

    @property
    def features_per_medium(self) -> int:
        """Tokens that one image becomes."""
        if self.q_former is not None:
            return self.q_former.num_queries
        return (self.encoder.num_patches - 1) // MERGED_PATCHES

    def media_features(
        self, pixel_values: Tensor | None = None, features: Tensor | None = None, has_features: Tensor | None = None
    ) -> Tensor:
        """Maps pixels [n, 3, S, S] to [n · tokens, C], the tokens of one image after those of the other.

        See `MultimodalModel.media_features` for the arguments.
        """
        tokens = self._all_features(features, has_features, pixel_values=pixel_values)
        if self.q_former is None:
            tokens = merge_patches(tokens)
        elif "q_former" not in self.cached_parts:
            tokens = self.q_former(tokens)
        weight = cast(nn.Linear, self.connector).weight
        return self.connector(tokens.to(weight.device, weight.dtype)).flatten(0, 1)

    @property
    def cached_parts(self) -> tuple[str, ...]:
        """The encoder and, unless it trains, the Q-Former."""
        frozen = self.q_former is not None and not self.q_former.query_tokens.requires_grad
        return ("encoder", "q_former") if frozen else ("encoder",)

    def frozen_features(self, pixel_values: Tensor) -> Tensor:
        """Maps pixels [n, 3, S, S] to the encoder's features or, unless it trains, the Q-Former's tokens."""
        features = self.encoder(pixel_values)
        if self.q_former is None:
            return features
        features = features.to(self.q_former.query_tokens.device)
        return self.q_former(features) if "q_former" in self.cached_parts else features

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """As in `StagedModel`; the variant without a Q-Former has no parameters of one."""
        if part == "q_former" and self.q_former is None:
            return {}
        return super().part_parameters(part)

    def train(self, mode: bool = True) -> MiniGPT4:
        """Keeps a frozen Q-Former in eval mode, so that it drops nothing out."""
        super().train(mode)
        if self.q_former is not None:
            self.q_former.train(mode and self.q_former.query_tokens.requires_grad)
        return self

    def stages(self) -> dict[str, Stage]:
        """The published "pretrain", "finetune" and, without a Q-Former, "finetune_lora"; with one, "q_former" too."""
        return dict(_STAGES_FOUR_PATCHES if self.q_former is None else _STAGES_Q_FORMER)

    @classmethod
    def check_shapes(
        cls, where: str, shapes: Mapping[str, tuple[int, ...]], encoder_size: int, hidden_size: int
    ) -> None:
        """Refuses a linear map to another language model, or a Q-Former that read another encoder."""
        for part, name, width in (
            ("language model", "connector.bias", hidden_size),
            ("encoder", "q_former.ln_vision.bias", encoder_size),
        ):
            trained = shapes.get(name, (width,))[0]
            if trained != width:
                raise ValueError(
                    f"{where}: what was trained is for the {part} of width {trained}, yours has {width}; equal widths "
                    f"are accepted; pass the {part} it was trained with"
                )


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _four_patches(where: str, state: Mapping[str, Tensor], encoder_size: int) -> dict[str, Any]:
    """The settings of a linear map without a Q-Former, if it is as wide as four patches."""
    width, merged = state["connector.weight"].shape[1], MERGED_PATCHES * encoder_size
    if width != merged:
        raise ValueError(
            f"{where}: llama_proj reads tokens {width} wide; {merged}, of four patches of this encoder, is accepted, "
            "or the width of a pretrained Q-Former; pass that as q_former, such as blip2_pretrained_flant5xxl.pth"
        )
    return {"connector": "four_patches"}


def _q_former_settings(where: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors of a Q-Former tell of its sizes; its heads are 64 wide, as everywhere in BERT."""
    prefix = "q_former.encoder.layer."
    missing = {"query_tokens", f"{prefix}0.intermediate_query.dense.bias"} - state.keys()
    if missing:
        raise ValueError(
            f"{where}: the Q-Former lacks {', '.join(sorted(missing))}; a whole one is accepted; was the file cut?"
        )
    depth = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))
    crossing = [i for i in range(depth) if f"{prefix}{i}.crossattention.output.dense.bias" in state]
    _, queries, width = state["query_tokens"].shape
    sizes = {
        "hidden_size": width,
        "num_layers": depth,
        "num_heads": max(1, width // _HEAD_SIZE),
        "intermediate_size": state[f"{prefix}0.intermediate_query.dense.bias"].shape[0],
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else depth,
    }
    return {"connector": "q_former", "num_queries": queries, "q_former_sizes": sizes}


def _open_encoder(folder: Path, config: MiniGPT4Config, dtype: torch.dtype) -> FrozenEncoder:
    size = config.image_size
    if config.vision_config.model_type == "blip_2_vision_model":
        return EvaEncoder.from_pretrained(folder, dtype, size)
    encoder = ClipEncoder.from_pretrained(folder, select="full", dtype=dtype)
    if size not in (None, encoder.image_size):
        raise ValueError(
            f"MiniGPT4: image_size is {size}, but the encoder in {folder} is a CLIP tower for images of "
            f"{encoder.image_size}; that size is accepted; positions are interpolated for BLIP-2's encoder only"
        )
    return encoder


def _encoder_from_config(config: Any) -> FrozenEncoder:
    if config.model_type == "blip_2_vision_model":
        return EvaEncoder.from_config(config)
    return ClipEncoder.from_config(config, select="full")


def _open_q_former(config: MiniGPT4Config, path: str | Path, dtype: torch.dtype) -> VisualQFormer | None:
    if config.connector != "q_former":
        if path:
            raise ValueError(
                f"MiniGPT4: connector is {config.connector!r}, which has no Q-Former, but q_former is {path}; "
                "connector='q_former', or no path, is accepted"
            )
        return None
    q_former = VisualQFormer(config.vision_config.hidden_size, config.num_queries, **config.q_former_sizes)
    if path:
        state, _ = read_q_former(path)
        check_state(f"MiniGPT4: the Q-Former in {path}", q_former.state_dict(), state)
        q_former.load_state_dict(state)
        q_former.to(dtype).requires_grad_(False)
    return q_former.eval()
