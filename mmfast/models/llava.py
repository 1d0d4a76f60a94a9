"""LLaVA: CLIP's patch features, projected, stand among the text embeddings as if they were words.

Source: Liu et al., "Visual Instruction Tuning" (linear connector) and "Improved Baselines with Visual
Instruction Tuning" (two-layer MLP, LLaVA-1.5); the learning rates are those of the scripts of
https://github.com/haotian-liu/LLaVA (Apache-2.0). High resolution: `mmfast.data.anyres`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mmfast.connectors import build_connector
from mmfast.data import Anyres, AnyresProcessor, Processor
from mmfast.encoders import ClipEncoder
from mmfast.models.architectures import vision_config_named
from mmfast.models.base import MultimodalModel
from mmfast.models.llava_original import connector_kind, read_projector
from mmfast.models.llava_transformers import is_llava_folder, read_llava, write_llava
from mmfast.models.parts import (
    as_config,
    open_language_model,
    open_processor,
    resolve_language_model,
    text_config_of,
)
from mmfast.models.stages import LoraSpec, Stage
from mmfast.models.trained import check_state, find_trained

__all__ = ["Llava", "LlavaConfig"]

# LLaVA-1.5: scripts/v1_5/{pretrain,finetune,finetune_lora}.sh.
_STAGES_V1_5 = {
    "align": Stage("align", "plain", {"connector": 1e-3}),
    "instruct": Stage("instruct", "vicuna_v1", {"connector": 2e-5, "language_model": 2e-5}),
    "instruct_lora": Stage(
        "instruct_lora", "vicuna_v1", {"connector": 2e-5, "lora": 2e-4}, LoraSpec(128, 256, dropout=0.05)
    ),
}
# The first LLaVA, known by its linear connector: scripts/{pretrain,finetune,finetune_lora}.sh.
_STAGES_V1 = {
    "align": Stage("align", "plain", {"connector": 2e-3}),
    "instruct": Stage("instruct", "vicuna_v1", {"connector": 2e-5, "language_model": 2e-5}),
    "instruct_lora": Stage(
        "instruct_lora", "vicuna_v1", {"connector": 2e-5, "lora": 2e-5}, LoraSpec(64, 16, dropout=0.05)
    ),
}


class LlavaConfig(PreTrainedConfig):
    """Configuration of `Llava`.

    Args:
        text_config: Configuration of the language model, or its dict.
        vision_config: Configuration of the CLIP vision tower, or its dict.
        connector: Kind of connector, see `mmfast.connectors.build_connector`.
        vision_feature_layer: Index of the tower's hidden states that become features.
        vision_feature_select_strategy: "default" drops the class token, "full" keeps it.
        image_token_id: Id that marks the place of a feature; it may lie beyond the vocabulary.
        template: Name of the conversation template to chat with.
        image_grid_pinpoints: High resolution: the canvases (height, width) that images are tiled on. None: each
            image is one view.
        patch_merge: How the features of the tiles are merged, the `merge` of `mmfast.data.Anyres`.
        unpad_rounding: Its `rounding`.
    """

    model_type = "mmfast_llava"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: str = "mlp2x_gelu",
        vision_feature_layer: int = -2,
        vision_feature_select_strategy: str = "default",
        image_token_id: int = 32000,
        template: str = "vicuna_v1",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        patch_merge: str = "spatial_unpad",
        unpad_rounding: str = "transformers",
        **kwargs: Any,
    ) -> None:
        self.text_config = as_config(text_config, "llama")
        self.vision_config = as_config(vision_config, "clip_vision_model")
        self.connector = connector
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token_id = image_token_id
        self.template = template
        self.image_grid_pinpoints = image_grid_pinpoints
        self.patch_merge = patch_merge
        self.unpad_rounding = unpad_rounding
        super().__init__(**kwargs)


class Llava(MultimodalModel):
    """LLaVA and LLaVA-1.5; with `image_grid_pinpoints`, LLaVA-1.5-HD and LLaVA-NeXT (v1.6).

    `Llava(config)` has random weights; `from_parts` puts a fresh connector between two pretrained models;
    `from_pretrained` opens a trained one.

    Args:
        config: The configuration.
        encoder: The encoder; None builds one from the configuration. Likewise the two below.
        connector: The connector.
        language_model: The language model.
        processor: Turns samples into batches.
    """

    config_class = LlavaConfig
    system = "llava"
    host_inputs = (*MultimodalModel.host_inputs, "image_sizes")
    original_options = ("vision_feature_layer", "vision_feature_select_strategy")
    settings = (
        "connector",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "template",
        "image_grid_pinpoints",
        "patch_merge",
        "unpad_rounding",
    )
    optional_tensors = ("image_newline",)

    anyres: Anyres | None
    """The rules of high resolution; None where each image is one view."""
    image_newline: nn.Parameter | None
    """[C]: ends each row of the tiles' features; None without high resolution or such rows."""

    def __init__(
        self,
        config: LlavaConfig,
        encoder: ClipEncoder | None = None,
        connector: nn.Module | None = None,
        language_model: PreTrainedModel | None = None,
        processor: Processor | None = None,
    ) -> None:
        anyres = _anyres(config)
        if encoder is None:
            encoder = ClipEncoder.from_config(
                config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy
            )
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        if connector is None:
            connector = build_connector(config.connector, encoder.hidden_size, _width(language_model))
        super().__init__(config, encoder, connector, language_model, processor)
        self.anyres = anyres
        self.media_inputs = ("pixel_values",) if anyres is None else ("pixel_values", "image_sizes")
        newline = None
        if anyres is not None and anyres.merge == "spatial_unpad":
            width = _width(language_model)
            newline = nn.Parameter(torch.randn(width) / width**0.5)
        self.register_parameter("image_newline", newline)

    @classmethod
    def from_parts(
        cls,
        llm: str | Path,
        encoder: str | Path,
        connector: str = "mlp2x_gelu",
        dtype: torch.dtype = torch.float32,
        *,
        base_dtype: str | None = None,
        vision_feature_layer: int = -2,
        vision_feature_select_strategy: str = "default",
        template: str = "vicuna_v1",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        patch_merge: str = "spatial_unpad",
        unpad_rounding: str = "transformers",
    ) -> Llava:
        """Puts a fresh connector between a pretrained language model and a pretrained vision tower.

        Args:
            llm: Folder of a causal language model with its tokenizer, or "world" for the shipped one.
            encoder: Folder of a CLIP model with its image processor, or "world" for the shipped one.
            connector: Kind of connector, see `mmfast.connectors.build_connector`; it is made in float32.
            dtype: Dtype of the two pretrained models.
            base_dtype: Format of the language model's frozen linear layers, see `open_language_model`.
            vision_feature_layer: Index of the tower's hidden states that become features.
            vision_feature_select_strategy: "default" drops the class token, "full" keeps it.
            template: Name of the conversation template to chat with.
            image_grid_pinpoints: Canvases of high resolution, see `LlavaConfig`; None for one view of each image.
            patch_merge: See `LlavaConfig`.
            unpad_rounding: See `LlavaConfig`.

        Raises:
            FileNotFoundError: If a folder does not exist.
            ValueError: If a folder lacks weights, the connector is unknown, or the canvases do not suit the encoder.
        """
        llm_folder, encoder_folder = resolve_language_model(llm), ClipEncoder.resolve(encoder)
        config = LlavaConfig(
            text_config=text_config_of(llm_folder),
            vision_config=vision_config_named(encoder),
            connector=connector,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            template=template,
            image_grid_pinpoints=image_grid_pinpoints,
            patch_merge=patch_merge,
            unpad_rounding=unpad_rounding,
        )
        # From configurations alone, so that nothing large is loaded before a refusal.
        anyres = _anyres(config)
        bridge = build_connector(connector, config.vision_config.hidden_size, config.text_config.hidden_size)
        vision = ClipEncoder.from_pretrained(
            encoder_folder, vision_feature_layer, vision_feature_select_strategy, dtype
        )
        processor = open_processor(llm_folder, encoder_folder, template, vision.num_patches, **_processing(config))
        _check_tiles("Llava.from_parts", processor, anyres)
        language_model = open_language_model(llm_folder, dtype, base_dtype)
        config.text_config, config.vision_config = language_model.config, vision.config
        config.image_token_id = processor.image_token_id
        model = cls(config, vision, bridge, language_model, processor)
        model.name_bases(llm=llm, encoder=encoder)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        llm: str | Path | None = None,
        encoder: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> Llava:
        """Opens a trained model, its `processor` included.

        Args:
            folder: A folder of `save_trained`, a run folder (its `model` is opened), or a folder in
                transformers' layout of `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`.
            llm: The language model to use in place of the one written down, should it have moved.
            encoder: The encoder to use in place of the one written down.
            dtype: Dtype of the two base models; by default the one they were saved or trained in. The
                connector is float32.

        Raises:
            FileNotFoundError: If the folder holds no model, or a base model is not where it was.
            ValueError: If sizes or names do not fit; the message has both sides.
        """
        folder = Path(folder).expanduser()
        trained = find_trained(folder)
        if trained is not None:
            return cls._from_trained(trained, {"llm": llm, "encoder": encoder}, dtype)
        if not is_llava_folder(folder):
            raise FileNotFoundError(
                f"Llava.from_pretrained: {folder} holds no LLaVA model; a folder with mmfast.json, a finished run "
                "folder (with model/mmfast.json) or a folder whose config.json has model_type llava or llava_next is "
                "accepted"
            )
        if llm is not None or encoder is not None:
            raise ValueError(
                f"Llava.from_pretrained: {folder} is in transformers' layout and has its own language model and "
                f"encoder, but llm is {llm!r} and encoder {encoder!r}; None is accepted for both"
            )
        return cls._from_transformers(folder, dtype)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes transformers' LLaVA layout with the processor's files; LoRA is merged in the written copy.

        Args:
            save_directory: The folder to write; `LlavaForConditionalGeneration.from_pretrained` opens it, with high
                resolution `LlavaNextForConditionalGeneration`.
            **kwargs: Passed to transformers' `save_pretrained`, such as `max_shard_size`.

        Raises:
            ValueError: If the connector is not "mlp2x_gelu", the only one that layout has, or high resolution has
                other rules than LLaVA-NeXT's.
        """
        write_llava(self, Path(save_directory), **kwargs)

    @property
    def features_per_medium(self) -> int | None:
        """Tokens of every image; None with high resolution, where they follow from its size."""
        return super().features_per_medium if self.anyres is None else None

    def example_media(self, count: int) -> tuple[dict[str, Tensor], int]:
        """As in `MultimodalModel`; with high resolution images that fill the canvas of the most tokens."""
        if self.anyres is None:
            return super().example_media(count)
        size = max(self.anyres.pinpoints, key=self.anyres.num_tokens)
        side, views = self.encoder.image_size, self.anyres.num_views(size)
        pixels = torch.zeros(count * views, 3, side, side)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size] * count)}, self.anyres.num_tokens(size)

    def media_features(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        features: Tensor | None = None,
        has_features: Tensor | None = None,
    ) -> Tensor:
        """Maps all images of a batch to their features [N, C], in order.

        Args:
            pixel_values: [n, 3, S, S] float; with high resolution all views of all images, see `AnyresProcessor`.
            image_sizes: [images, 2] int64, (height, width) in pixels; with high resolution only.
            features: [m, P, D] of the images that are given by features, or all their views.
            has_features: bool [images], which these are.

        Raises:
            ValueError: If the views are not as many as the sizes say.
        """
        if self.anyres is None:
            return super().media_features(pixel_values, features, has_features)
        sizes = [] if image_sizes is None else image_sizes.tolist()
        views = torch.tensor([self.anyres.num_views(size) for size in sizes], dtype=torch.int64)
        if has_features is not None:
            has_features = has_features.cpu().repeat_interleave(views)
        elif pixel_values is None or pixel_values.dim() != 4 or views.sum() != len(pixel_values):
            shape = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(
                f"Llava: pixel_values has the shape {shape} but image_sizes makes {int(views.sum())} views; "
                "[views, 3, S, S] with the views of all images one after the other is accepted; let the processor "
                "encode the images"
            )
        features = super().media_features(pixel_values, features, has_features)
        if self.image_newline is not None:
            features = torch.cat([features, self.image_newline.to(features.dtype)[None]])
        # Not by indexing: the gradient of an embedding is summed in the same order every time.
        index = self.anyres.feature_index(sizes).to(features.device, non_blocking=True)
        return nn.functional.embedding(index, features)

    @classmethod
    def from_original(
        cls,
        source: str | Path,
        llm: str | Path,
        encoder: str | Path,
        *,
        template: str | None = None,
        dtype: str = "float32",
        vision_feature_layer: int = -2,
        vision_feature_select_strategy: str = "default",
    ) -> tuple[Llava, dict[str, str]]:
        """As `MultimodalModel.from_original`: the projector of a `mm_projector.bin`.

        Args:
            source: The file, or the folder that holds it. LoRA adapters beside it are not read.
            llm: As there, as the next.
            encoder: As there.
            template: None: "plain", for a projector alone is the result of the first stage.
            dtype: As there.
            vision_feature_layer: Hidden states of the encoder that are its features (mm_vision_select_layer).
            vision_feature_select_strategy: "default" drops the class token (patch), "full" keeps it (cls_patch).
        """
        projector, keys = read_projector(Path(source).expanduser())
        state = {f"connector.{key}": tensor for key, tensor in projector.items()}
        llm_folder, encoder_folder = resolve_language_model(llm), ClipEncoder.resolve(encoder)
        widths = vision_config_named(encoder_folder).hidden_size, text_config_of(llm_folder).hidden_size
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        cls.check_shapes(f"{cls.__name__}.from_original", shapes, *widths)
        settings: dict[str, Any] = {
            "connector": connector_kind(projector),
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "template": template or "plain",
        }
        model = cls.skeleton(llm_folder, encoder_folder, **settings)
        model.language_model.to(getattr(torch, dtype))
        model.attach_processor(llm, encoder)
        model.name_bases(llm=llm, encoder=encoder)
        check_state(f"{cls.__name__}.from_original", model.trained_state(), state)
        model.load_state_dict(state, strict=False, assign=True)
        return model, {f"connector.{key}": name for key, name in keys.items()}

    def attach_processor(self, llm: str | Path, encoder: str | Path) -> None:
        """As in `MultimodalModel`; the image processor must suit the canvases of high resolution."""
        super().attach_processor(llm, encoder)
        _check_tiles("Llava", self.processor, self.anyres)

    def processor_settings(self) -> dict[str, Any]:
        """As in `MultimodalModel`."""
        return {**super().processor_settings(), **_processing(cast(LlavaConfig, self.config))}

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of a part by their full names; the newline belongs to the connector.

        Raises:
            ValueError: If there is no such part.
        """
        parameters = super().part_parameters(part)
        if part == "connector" and self.image_newline is not None:
            parameters["image_newline"] = self.image_newline
        return parameters

    def stages(self) -> dict[str, Stage]:
        """The published "align", "instruct" and "instruct_lora", for the connector's generation of LLaVA."""
        return dict(_STAGES_V1 if self.config.connector == "linear" else _STAGES_V1_5)

    @classmethod
    def _rebuild(cls, names: dict[str, Any], dtype: torch.dtype, settings: dict[str, Any]) -> Llava:
        if names["llm"] == names["encoder"] and is_llava_folder(Path(names["llm"])):
            return cls._from_transformers(Path(names["llm"]), dtype)
        return super()._rebuild(names, dtype, settings)

    @classmethod
    def _from_transformers(cls, folder: Path, dtype: torch.dtype | None) -> Llava:
        parts = read_llava(folder, dtype)
        config = LlavaConfig(
            text_config=parts.language_model.config,
            vision_config=parts.encoder.config,
            connector="mlp2x_gelu",
            vision_feature_layer=parts.encoder.layer,
            vision_feature_select_strategy=parts.encoder.select,
            image_token_id=parts.image_token_id,
            image_grid_pinpoints=parts.image_grid_pinpoints,
        )
        # A folder that mmfast wrote has its own settings; one of transformers is taken for LLaVA-1.5.
        template = None if (folder / "mmfast_processor.json").is_file() else "vicuna_v1"
        options = {"tokens_per_image": parts.encoder.num_patches, **_processing(config)}
        processor = options.pop("kind", Processor).from_pretrained(folder, template, **options)
        config.template = processor.template.name
        model = cls(config, parts.encoder, parts.connector, parts.language_model, processor)
        _check_tiles("Llava.from_pretrained", processor, model.anyres)
        if parts.image_newline is not None:
            model.image_newline = nn.Parameter(parts.image_newline)
        model.name_bases(llm=folder, encoder=folder)
        return model.eval()


def _width(language_model: PreTrainedModel) -> int:
    return cast(Any, language_model.get_input_embeddings()).weight.shape[1]


def _anyres(config: LlavaConfig) -> Anyres | None:
    """The rules of high resolution that a configuration asks for.

    Raises:
        ValueError: If the canvases do not suit the encoder, or it keeps its class token.
    """
    if config.image_grid_pinpoints is None:
        return None
    if config.vision_feature_select_strategy not in ("default", "patch"):
        raise ValueError(
            f"Llava: vision_feature_select_strategy is {config.vision_feature_select_strategy!r} with "
            "image_grid_pinpoints; 'default' is accepted, since a class token has no place in the map of the tiles"
        )
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    rules: Any = (config.patch_merge, config.unpad_rounding)
    return Anyres(config.image_grid_pinpoints, side, side // patch, *rules)


def _processing(config: LlavaConfig) -> dict[str, Any]:
    """What the processor has to be told for high resolution, beside its class as `kind`."""
    if config.image_grid_pinpoints is None:
        return {}
    names = ("image_grid_pinpoints", "patch_merge", "unpad_rounding")
    return {"kind": AnyresProcessor, **{name: getattr(config, name) for name in names}}


def _check_tiles(where: str, processor: Any, anyres: Anyres | None) -> None:
    if anyres is not None and processor.anyres != anyres:
        raise ValueError(
            f"{where}: the image processor makes {processor.anyres} but the encoder needs {anyres}; an image "
            "processor that crops to the encoder's image_size is accepted; were the files of two models mixed?"
        )
