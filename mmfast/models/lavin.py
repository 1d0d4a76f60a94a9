"""LaVIN: mixture-of-modality adapters before every attention of CLIP and of the language model.

A modality token stands before each sequence: no other token attends to it, it attends to itself alone, and its state
weights the experts of the language model's adapters. So that state depends on the weights and the modality only, and
the token is not put into the sequences at all: both modalities run beside them, as two sequences of one token, in the
same graph. Text keeps its positions, which rotary embeddings see as differences only.

Source: Luo et al., "Cheap and Quick: Efficient Vision-Language Instruction Tuning for Large Language Models"
(arXiv 2305.15023); https://github.com/luogen1996/LaVIN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mmfast.adapt.mixture import EXPERT_WEIGHTS, add_mixtures, route_as_told, route_by_first_sample, route_by_token
from mmfast.adapt.packing import sample_rows
from mmfast.data import Processor, load_image
from mmfast.data import pad_to_square as padded_to_square
from mmfast.encoders import ClipEncoder
from mmfast.models.architectures import vision_config_named
from mmfast.models.base import MultimodalModel, MultimodalOutput
from mmfast.models.lavin_original import read_original, write_original
from mmfast.models.parts import (
    as_config,
    open_language_model,
    open_processor,
    resolve_language_model,
    text_config_of,
)
from mmfast.models.stages import Stage
from mmfast.nn import MixtureAdapter
from mmfast.nn.adapted_linear import MergeDrift

if TYPE_CHECKING:
    from mmfast.data.samples import MediaPart

__all__ = ["Lavin", "LavinConfig", "LavinProcessor"]

MODALITIES = ("text", "image")
_TRAINED = ("vision_adapters", "connector", "modality", "adapters")
_VISION_ROUTES = {"token": route_by_token, "first_image": route_by_first_sample}
_FOLDED = ("q_proj", "k_proj", "v_proj")
# Of the CLS token: scripts/*.sh, n_prompt.
_SCALES = 6
# LaVIN normalises so, although CLIP was trained with other values: util/datasets.py.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class LavinConfig(PreTrainedConfig):
    """Configuration of `Lavin`.

    Args:
        text_config: Configuration of the language model, or its dict.
        vision_config: Configuration of the CLIP vision tower, or its dict.
        vision_blocks: Blocks, counted from 1, whose output's class token becomes a visual token. None: six at equal
            distances (4, 8, ..., 24 of ViT-L), or all where there are fewer.
        vision_routing: What weights the experts in the encoder. "token": each token of an image itself. "first_image":
            as the published code does, where every token has the weights of the token in its place in the batch's first
            image, so an image's features depend on its batch; for single images both are the same.
        temperature: Divides the routers' logits; published with 10 (7B) and 5 (13B).
        bottleneck_size: Rank of the adapters.
        connector_size: Width between the connector's two layers.
        dropout: Probability of dropping an element of an adapter's bottleneck while training.
        image_token_id: Id that marks the place of a feature; it may lie beyond the vocabulary.
        template: Name of the conversation template to chat with.

    Raises:
        ValueError: If a block does not exist, or the routing is unknown.
    """

    model_type = "mmfast_lavin"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_blocks: Sequence[int] | None = None,
        vision_routing: str = "token",
        temperature: float = 10.0,
        bottleneck_size: int = 8,
        connector_size: int = 128,
        dropout: float = 0.1,
        image_token_id: int = 32000,
        template: str = "lavin",
        **kwargs: Any,
    ) -> None:
        self.text_config = as_config(text_config, "llama")
        self.vision_config = as_config(vision_config, "clip_vision_model")
        depth = self.vision_config.num_hidden_layers
        self.vision_blocks = equidistant(depth) if vision_blocks is None else list(vision_blocks)
        unknown = [block for block in self.vision_blocks if not isinstance(block, int) or not 1 <= block <= depth]
        if unknown or not self.vision_blocks:
            raise ValueError(
                f"Lavin: vision_blocks is {self.vision_blocks}; whole numbers from 1 to {depth}, the encoder's depth, "
                "are accepted, at least one"
            )
        if vision_routing not in _VISION_ROUTES:
            raise ValueError(
                f"Lavin: vision_routing is {vision_routing!r}; {' and '.join(map(repr, _VISION_ROUTES))} are accepted"
            )
        self.vision_routing = vision_routing
        self.temperature = temperature
        self.bottleneck_size = bottleneck_size
        self.connector_size = connector_size
        self.dropout = dropout
        self.image_token_id = image_token_id
        self.template = template
        super().__init__(**kwargs)


class LavinProcessor(Processor):
    """A processor whose images are squeezed into a square, by Pillow's bicubic filter, and normalised as ImageNet's.

    Source: LaVIN, util/datasets.py:48.

    Args:
        *args: As in `Processor`.
        image_size: Side of the square, in pixels.
        **kwargs: As in `Processor`.
    """

    def __init__(self, *args: Any, image_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image_size = image_size

    def read_media(self, part: MediaPart, media_folder: Any, sample_id: str) -> Tensor:
        """float32 [3, image_size, image_size] of an image.

        Raises:
            ValueError: As `load_image`.
        """
        import numpy as np
        from PIL.Image import Resampling

        image = load_image(cast(Any, part), media_folder, sample_id)
        if self.pad_to_square:
            image = padded_to_square(image, _IMAGENET_MEAN)
        image = image.resize((self.image_size, self.image_size), Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.pixel_statistics())
        return (pixels - mean) / std

    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Those of ImageNet."""
        return _IMAGENET_MEAN, _IMAGENET_STD

    def settings(self) -> dict[str, Any]:
        """As `Processor.settings`."""
        return {**super().settings(), "image_size": self.image_size}


class Lavin(MultimodalModel):
    """LaVIN on any CLIP tower and any language model of Llama's form.

    `Lavin(config)` has random weights; `from_parts` puts fresh adapters on two pretrained models; `from_pretrained`
    opens a trained one. The adapters act through hooks; `detach()` gives the two models back as they were.

    Args:
        config: The configuration.
        encoder: The encoder, which runs to the last of the configuration's blocks; None builds one.
        language_model: The language model, likewise.
        processor: Turns samples into batches.

    Attributes:
        vision_adapters: One `MixtureAdapter` for each block of the encoder that runs.
        connector: Linear, SiLU, Linear: class tokens [n, scales, D] to embeddings [n, scales, C].
        modality: Embedding [2, C] of the modality token: 0 is text alone, 1 has an image.
        adapters: One `MixtureAdapter` for each layer of the language model.
    """

    config_class = LavinConfig
    system = "lavin"
    no_feature_cache = "adapters train inside its encoder"
    parts = ("encoder", "vision_adapters", "connector", "modality", "adapters", "language_model", "lora")
    # What stands before the up-projections, which begin at zero, and the modality token that routes.
    zero_at_first = ("*.lora_a", "*.down_weight", "*.down_bias", "*.router_weight", "*.router_bias", "modality.weight")
    no_sharding = "the routers' gradients enter its layers elsewhere than at their outputs, where FSDP waits for them"
    settings = (
        "vision_blocks",
        "vision_routing",
        "temperature",
        "bottleneck_size",
        "connector_size",
        "dropout",
        "template",
    )

    _vision_hooks: list[RemovableHandle] | None = None
    _hooks: list[RemovableHandle] | None = None
    # A folded modality, with the projections that were there before: (attention, name, projection).
    _folded: tuple[str, list[tuple[Any, str, nn.Module]]] | None = None
    # The expert weights of both modalities, and the state of the parameters that they are of.
    _kept: tuple[Tensor, tuple[object, ...]] | None = None

    def __init__(
        self,
        config: LavinConfig,
        encoder: ClipEncoder | None = None,
        language_model: PreTrainedModel | None = None,
        processor: Processor | None = None,
    ) -> None:
        if encoder is None:
            encoder = ClipEncoder.from_config(config.vision_config, max(config.vision_blocks), select="full")
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        width: int = cast(Any, language_model.get_input_embeddings()).weight.shape[1]
        connector = _build_connector(encoder.hidden_size, config.connector_size, width)
        super().__init__(config, encoder, connector, language_model, processor)

        def adapters(count: int, size: int) -> nn.ModuleList:
            rank, dropout, temperature = config.bottleneck_size, config.dropout, config.temperature
            return nn.ModuleList(
                MixtureAdapter(size, rank, dropout=dropout, temperature=temperature) for _ in range(count)
            )

        self.vision_adapters = adapters(len(encoder.layers), encoder.hidden_size)
        self.modality = nn.Embedding(len(MODALITIES), width)
        self.adapters = adapters(len(self.get_decoder().layers), width)
        self.trained_parts = set(_TRAINED)
        self.attach()

    @classmethod
    def from_parts(
        cls,
        llm: str | Path,
        encoder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        base_dtype: str | None = None,
        template: str = "lavin",
        **settings: Any,
    ) -> Lavin:
        """Puts fresh adapters on a pretrained language model and a pretrained vision tower.

        Args:
            llm: Folder of a causal language model with its tokenizer, such as one in 4 bits that `mmfast quantize`
                wrote, or "world" for the shipped one.
            encoder: Folder of a CLIP model with its image processor, or "world" for the shipped one.
            dtype: Dtype of the two pretrained models; what trains is made in float32.
            base_dtype: Format of the language model's frozen linear layers, see `open_language_model`.
            template: Name of the conversation template to chat with.
            **settings: Arguments of `LavinConfig`, from `vision_blocks` to `dropout`.

        Raises:
            FileNotFoundError: If a folder does not exist.
            TypeError: If there is no such setting.
            ValueError: If a folder lacks weights, or a setting is out of range.
        """
        if unknown := sorted(settings.keys() - set(cls.settings)):
            raise TypeError(f"Lavin.from_parts: there is no setting {unknown}; {', '.join(cls.settings)} are accepted")
        llm_folder, encoder_folder = resolve_language_model(llm), ClipEncoder.resolve(encoder)
        # From the folders' configurations, so that nothing large is loaded before a refusal.
        parts = {"text_config": text_config_of(llm_folder), "vision_config": vision_config_named(encoder_folder)}
        config = LavinConfig(**parts, template=template, **settings)
        processor = open_processor(llm_folder, encoder_folder, **_processing(config))
        config.image_token_id = processor.image_token_id
        vision = ClipEncoder.from_pretrained(encoder_folder, max(config.vision_blocks), select="full", dtype=dtype)
        model = cls(config, vision, open_language_model(llm_folder, dtype, base_dtype), processor)
        model.name_bases(llm=llm, encoder=encoder)
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
    ) -> tuple[Lavin, dict[str, str]]:
        """The adapters of a `checkpoint-<epoch>.pth`, routed in the encoder as the published code does it.

        The temperature is the one in the checkpoint's arguments or, where it has none, the published one of its size.
        See `MultimodalModel.from_original` for the arguments, the result and the errors.
        """
        llm_folder, encoder_folder = resolve_language_model(llm), ClipEncoder.resolve(encoder)
        state, names, settings = read_original(Path(source).expanduser())
        model = cls.skeleton(llm_folder, encoder_folder, vision_routing="first_image", **settings)
        for part in _TRAINED:
            getattr(model, part).to_empty(device="cpu")
        model.load_trained_state(state)
        cast(Any, model.language_model).to(getattr(torch, dtype))
        model.config.template = template or model.config.template
        model.attach_processor(llm, encoder)
        model.name_bases(llm=llm, encoder=encoder)
        return model, names

    def processor_settings(self) -> dict[str, Any]:
        """As in `MultimodalModel`."""
        return _processing(cast(LavinConfig, self.config))

    def to_original(self, folder: str | Path) -> dict[str, str]:
        """Writes the adapters as `checkpoint-0.pth` of the published code.

        Raises:
            ValueError: If other parts were trained too, or class tokens of other blocks than the published ones.
        """
        return write_original(self, Path(folder))

    def stages(self) -> dict[str, Stage]:
        """The published "instruct", for which images and text alone are mixed; 9e-3 · 32 / 256 of scripts/*.sh."""
        return {"instruct": Stage("instruct", "lavin", dict.fromkeys(_TRAINED, 1.125e-3))}

    # ---- running

    @property
    def features_per_medium(self) -> int:
        """Visual tokens of an image."""
        return len(self.config.vision_blocks)

    def media_features(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """Maps images [n, 3, S, S] to [n · scales, C], with gradients for the adapters in the encoder."""
        tower = self.encoder.tower
        weight = next(tower.parameters())
        pixel_values = pixel_values.to(weight.device, weight.dtype)
        states = tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states
        tokens = torch.stack([states[block][:, 0] for block in self.config.vision_blocks], 1)
        weight = next(self.connector.parameters())
        return self.connector(tokens.to(weight.device, weight.dtype)).flatten(0, 1)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, *args: Any, modality: Tensor | None = None, **kwargs: Any
    ) -> MultimodalOutput:
        """As `MultimodalModel.forward`.

        Args:
            input_ids: As there.
            *args: As there.
            modality: [B] int64, 1 where a sample has an image, of a packed row [n]. By default it is told from
                `input_ids`; with `inputs_embeds` it must be given.
            **kwargs: As there.

        Raises:
            ValueError: As there; or nothing tells the modality, or the model is folded for the other one.
        """
        lengths = kwargs.get("sample_lengths")
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if lengths is not None and tokens is not None and len(lengths) == len(tokens):
            lengths = None  # each sample has a row
        if modality is None and input_ids is not None:
            modality = self._modality_of(input_ids, lengths)
        if modality is None and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Lavin: inputs_embeds are given without modality; [B] int64, 1 where a sample has an image, is accepted"
            )
        if modality is not None:
            kwargs |= self._routing(modality, lengths)
        return super().forward(input_ids, *args, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `MultimodalModel.generate`; the experts' weights are those of the prompts throughout."""
        routing = self._routing(self._modality_of(input_ids))
        # transformers' generate refuses arguments of the model that it does not know.
        hook = self.language_model.register_forward_pre_hook(partial(_with_routing, routing), with_kwargs=True)
        try:
            return super().generate(input_ids, *args, **kwargs)
        finally:
            hook.remove()

    def expert_weights(self) -> Tensor:
        """[layers, 2, K]: the weights of the language model's experts for text and for images.

        While training or with gradients they are made anew, from the modality tokens' states; else kept as long as no
        parameter changes. Dropout acts on the two modality tokens, not on one for each sample.

        Raises:
            RuntimeError: If the model is detached or folded.
        """
        if self._hooks is None:
            raise RuntimeError(
                "Lavin.expert_weights: the language model's adapters are off; call attach(), or unfold() after fold()"
            )
        if self.training or torch.is_grad_enabled():
            return self._route_modalities()
        state = self._parameter_state()
        if self._kept is None or self._kept[1] != state:
            self._kept = self._route_modalities(), state
        return self._kept[0]

    def train(self, mode: bool = True) -> Lavin:
        """As `nn.Module.train`; training unfolds the adapters."""
        if mode:
            self.unfold()
            self._kept = None
        return super().train(mode)

    # ---- attaching, detaching, folding

    def attach(self) -> None:
        """Puts the adapters before the attentions again, after `detach()`."""
        if self._vision_hooks is None:
            attentions = [cast(Any, layer).self_attn for layer in self.encoder.layers]
            route = _VISION_ROUTES[self.config.vision_routing]
            self._vision_hooks = add_mixtures(attentions, cast(Any, self.vision_adapters), route)
        if self._hooks is None and self._folded is None:
            self._hooks = add_mixtures(self._attentions(), cast(Any, self.adapters), route_as_told)

    def detach(self) -> None:
        """Takes the adapters off both models, which then compute what they did before."""
        self.unfold()
        for hook in chain(self._vision_hooks or (), self._hooks or ()):
            hook.remove()
        self._vision_hooks = self._hooks = None

    @torch.no_grad()
    def fold(self, modality: Literal["text", "image"]) -> dict[str, MergeDrift]:
        """Folds the language model's adapters, for samples of one modality, into its projections, until `unfold()`.

        The language model then costs what it did without adapters. The original projections are kept beside the folded
        ones, and `train()` puts them back. The encoder's adapters, whose weights differ by token, stay.

        Returns:
            For each projection, by its full name, how far rounding took its weight from the exact one.

        Raises:
            RuntimeError: If the model is training, or detached.
            TypeError: If a projection is quantised or has LoRA. The model is as it was then.
            ValueError: If there is no such modality.
        """
        if modality not in MODALITIES:
            raise ValueError(f"Lavin.fold: modality is {modality!r}; {' and '.join(MODALITIES)} are accepted")
        if self.training or (self._hooks is None and self._folded is None):
            state = "training" if self.training else "detached"
            raise RuntimeError(f"Lavin.fold: the model is {state}; an attached one in eval() is accepted")
        self.unfold()
        experts = self.expert_weights()[:, MODALITIES.index(modality)]
        names = {module: name for name, module in self.named_modules()}
        folded, drifts = [], {}
        for attention, adapter, weights in zip(self._attentions(), self.adapters, experts, strict=True):
            for name in _FOLDED:
                linear, drift = cast(Any, adapter).fold_into(getattr(attention, name), weights)
                drifts[f"{names[attention]}.{name}"] = drift
                folded.append((attention, name, linear))
        for hook in self._hooks or ():
            hook.remove()
        self._hooks = None
        self._folded = modality, [(attention, name, getattr(attention, name)) for attention, name, _ in folded]
        for attention, name, linear in folded:
            setattr(attention, name, linear)
        return drifts

    def unfold(self) -> None:
        """Puts back the projections that `fold` replaced, if it did."""
        if self._folded is None:
            return
        for attention, name, linear in self._folded[1]:
            setattr(attention, name, linear)
        self._folded = None
        self.attach()

    def trained_state(self) -> dict[str, Tensor]:
        """As `StagedModel.trained_state`.

        Raises:
            RuntimeError: If the model is folded, where the language model's own weights are not in their places.
        """
        if self._folded is not None:
            raise RuntimeError("Lavin.trained_state: the model is folded; an unfolded one is accepted; call unfold()")
        return super().trained_state()

    def _attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.get_decoder().layers]

    def _modality_of(self, input_ids: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        """[B] int64: 1 where a row, or [n] where a sample of a packed row, has an image."""
        is_media = input_ids == self.config.image_token_id
        if sample_lengths is None:
            return is_media.any(-1).long()
        return torch.stack([sample.any() for sample in is_media[0].split(sample_lengths.tolist())]).long()

    def _routing(self, modality: Tensor, sample_lengths: Tensor | None = None) -> dict[str, Tensor]:
        """What the language model has to be told for samples of these modalities, [B] or [n] of a packed row."""
        if self._folded is not None:
            others = (modality != MODALITIES.index(self._folded[0])).nonzero().flatten().tolist()
            if others:
                raise ValueError(
                    f"Lavin: the model is folded for samples of the modality {self._folded[0]!r}, but rows {others} "
                    "are of the other; one modality is accepted; call unfold(), or fold() for the other"
                )
        if self._hooks is None:
            return {}
        experts = self.expert_weights()
        if sample_lengths is None:
            return {EXPERT_WEIGHTS: experts[:, modality.to(experts.device)]}
        length = sum(sample_lengths.tolist())
        tokens = modality.repeat_interleave(sample_lengths.to(modality.device, non_blocking=True), output_size=length)
        return {EXPERT_WEIGHTS: experts[:, tokens[None].to(experts.device)]}

    def _route_modalities(self) -> Tensor:
        """Runs the two modality tokens, each as a sequence of its own, and keeps what the routers say."""
        embedding = self.get_input_embeddings().weight
        experts: dict[int, Tensor] = {}
        tokens = self.modality.weight.to(embedding.device, embedding.dtype).unsqueeze(1)
        decoder = self.get_decoder()
        decoder(inputs_embeds=tokens, **sample_rows(decoder, [1, 1], tokens), **{EXPERT_WEIGHTS: experts})
        return torch.stack([experts[index] for index in range(len(self.adapters))])

    def _parameter_state(self) -> tuple[object, ...]:
        """Changes with every change of a weight that `expert_weights` depends on."""
        modules = (self.modality, self.adapters, self.language_model)
        tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
        return tuple((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)


def equidistant(depth: int) -> list[int]:
    """The blocks, counted from 1, of a tower of this depth whose class tokens LaVIN takes."""
    count = min(_SCALES, depth)
    return [depth * scale // count for scale in range(1, count + 1)]


def _build_connector(in_features: int, hidden_size: int, out_features: int) -> nn.Sequential:
    """LaVIN's AdapterMLP (lavin/model.py:198-220)."""
    connector = nn.Sequential(nn.Linear(in_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, out_features))
    for layer in (connector[0], connector[2]):
        nn.init.xavier_uniform_(cast(Tensor, layer.weight))
        nn.init.zeros_(cast(Tensor, layer.bias))
    return connector


def _processing(config: LavinConfig) -> dict[str, Any]:
    sizes = {"tokens_per_image": len(config.vision_blocks), "image_size": config.vision_config.image_size}
    return {"template": config.template, "kind": LavinProcessor, **sizes}


def _with_routing(routing: dict[str, Tensor], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, **routing}
