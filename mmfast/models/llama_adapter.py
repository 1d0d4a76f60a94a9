"""LLaMA-Adapter, versions 1 and 2: learned prompts inside attention behind gates that start closed; images join there.

No image token stands in the text: an image becomes prompts, which its sample's words attend to.

Source: Zhang et al., "LLaMA-Adapter" (arXiv 2303.16199); Gao et al., "LLaMA-Adapter V2" (arXiv 2304.15010);
learning rates from the scripts of https://github.com/OpenGVLab/LLaMA-Adapter (GPL-3.0; nothing is copied).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mmfast.adapt import add_bias_scale, add_prompts, given_prompts
from mmfast.connectors import GlobalPrompt, VisualQueries
from mmfast.encoders import ClipEncoder, ClipScales, ClipTokens, ProjectedClipTokens
from mmfast.models.architectures import vision_config_named
from mmfast.models.base import MultimodalModel, MultimodalOutput
from mmfast.models.llama_adapter_original import (
    TABLE,
    lora_rank_of,
    read_checkpoint,
    read_original,
    version_of,
    visual_sizes,
    write_original,
)
from mmfast.models.parts import (
    as_config,
    open_language_model,
    resolve_language_model,
    text_config_of,
)
from mmfast.models.stages import LLAMA_LINEARS, LoraSpec, Stage
from mmfast.models.trained import check_state
from mmfast.nn import BiasLoRALinear, BiasScaleLinear, ZeroInitAttention

if TYPE_CHECKING:
    from mmfast.data import Processor

__all__ = ["FORMS", "Form", "LlamaAdapter", "LlamaAdapterConfig"]


@dataclass(frozen=True)
class Form:
    """One of the systems that go by the name LLaMA-Adapter; the other settings are its defaults."""

    encoder: type[Any]
    """What it reads of an image."""
    fusion: Literal["add", "early"]
    """"add": an image's prompts are added to the learned ones; "early": they stand alone, in the first layers."""
    stages: dict[str, Stage]
    """Its training stages."""
    unprompted_layers: int
    """First layers that have no learned prompts."""
    visual_length: int
    """Prompts of an image."""
    visual_width: int
    """Width of the visual branch."""
    linears: tuple[str, ...] = ()
    """Linear layers with a trained bias and scale."""
    scale_on: Literal["output", "input", "none"] = "none"
    """Where that scale acts, see `mmfast.nn.BiasScaleLinear`."""
    past_lora: bool = False
    """Whether prompts pass by LoRA, and a layer with it has a common factor on its gates."""


# alpaca_finetuning_v1/finetuning.sh: base rate 9e-3 · batch 32 / 256. The paper says 9e-3 and batch 64.
_V1_RATE = 9e-3 * 32 / 256
# llama_adapter_v2_multimodal7b/exps/{pretrain,finetune}.sh: base rates 1e-4 and 1e-3, batch 32. The paper says none.
_V2_VISUAL_RATE, _V2_TEXT_RATE = 1e-4 * 32 / 256, 1e-3 * 32 / 256

# llama_adapter_v2_multimodal7b/llama/llama.py: the update is added as it is. No code of that folder trains it;
# imagebind_LLM/llama/llama_adapter.py trains it beside norms and biases.
_V2_LORA = LoraSpec(rank=16, alpha=16)
# What its file does not say, and its code has no other of.
_V2_7B_CODE = {"visual_heads": 16, "channel_order": "bgr", "blank_image": True, "gate_activation": "tanh"}
_V2_7B_PARTS = ("connector", "prompts", "gates", "norms", "bias_scale")


def _stage(name: str, rate: float, *parts: str, lora: LoraSpec | None = None) -> Stage:
    return Stage(name, "alpaca", dict.fromkeys(parts, rate), lora)


FORMS = {
    "v1": Form(
        encoder=ClipScales,
        fusion="add",
        stages={
            "instruct": _stage("instruct", _V1_RATE, "prompts", "gates"),
            "instruct_images": _stage("instruct_images", _V1_RATE, "connector", "prompts", "gates"),
        },
        unprompted_layers=2,
        visual_length=1,
        visual_width=64,
    ),
    "v2": Form(
        encoder=ClipTokens,
        fusion="early",
        stages={
            "joint": Stage(
                "joint",
                "alpaca",
                dict.fromkeys(("connector", "visual_gates"), _V2_VISUAL_RATE)
                | dict.fromkeys(("prompts", "gates", "norms", "bias_scale"), _V2_TEXT_RATE),
                routes={
                    "media": ("connector", "visual_gates"),
                    "text": ("prompts", "gates", "norms", "bias_scale"),
                },
            )
        },
        unprompted_layers=1,
        visual_length=20,
        visual_width=768,
        linears=LLAMA_LINEARS,
        scale_on="output",
    ),
    "v2_multimodal_7b": Form(
        encoder=ProjectedClipTokens,
        fusion="add",
        stages={
            "pretrain": _stage("pretrain", _V2_VISUAL_RATE, "connector", "prompts", "gates"),
            "finetune": _stage("finetune", _V2_TEXT_RATE, "norms", "bias_scale"),
            "finetune_lora": _stage("finetune_lora", _V2_TEXT_RATE, "norms", "bias_scale", "lora", lora=_V2_LORA),
        },
        unprompted_layers=1,
        visual_length=10,
        visual_width=768,
        linears=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        past_lora=True,
    ),
}
"""Version 1; version 2 as its paper describes it; version 2 as the released multimodal 7B is."""


class LlamaAdapterConfig(PreTrainedConfig):
    """Configuration of `LlamaAdapter`. None stands for what the version has.

    Args:
        text_config: Configuration of the language model, or its dict.
        vision_config: Configuration of the CLIP vision tower, or its dict.
        version: A name in `FORMS`.
        prompt_length: Learned prompts of each layer.
        prompt_layers: Layers with learned prompts, the last ones: 30 of 32 in version 1, 31 in version 2.
        gate_activation: "tanh" (the training code) or "identity" (version 1's inference code with the same file).
        scale_on: Of version 2: "output" (the paper), "input" (the 65B code) or "none" (the 7B code).
        scales: Of version 1: layers of the tower whose class tokens are read; four, evenly spread.
        visual_length: Of version 2: prompts of an image.
        visual_layers: Of the version "v2": the first layers, in which words attend to an image's prompts.
        visual_width: Width of the visual branch.
        visual_depth: Of version 2: blocks of the visual branch.
        visual_heads: Of version 2: heads of these blocks.
        channel_order: "rgb", or "bgr", in which the code of the released 7B shows images.
        blank_image: Of the released 7B: whether samples of text alone are shown an image of zeros, as by its code.
        image_token_id: An id that no text has; images take no token.
        template: Name of the conversation template to chat with.

    Raises:
        ValueError: If the version is unknown, or a layer would have both learned and visual prompts.
    """

    model_type = "mmfast_llama_adapter"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        version: str = "v1",
        prompt_length: int = 10,
        prompt_layers: int | None = None,
        gate_activation: str = "tanh",
        scale_on: str | None = None,
        scales: list[int] | None = None,
        visual_length: int | None = None,
        visual_layers: int = 1,
        visual_width: int | None = None,
        visual_depth: int = 8,
        visual_heads: int = 16,
        channel_order: str = "rgb",
        blank_image: bool = False,
        image_token_id: int = 32000,
        template: str = "alpaca",
        **kwargs: Any,
    ) -> None:
        if version not in FORMS:
            raise ValueError(f"LlamaAdapter: version is {version!r}; accepted are {', '.join(FORMS)}")
        self.text_config = as_config(text_config, "llama")
        self.vision_config = as_config(vision_config, "clip_vision_model")
        form, depth = FORMS[version], self.text_config.num_hidden_layers
        self.version = version
        self.prompt_length = prompt_length
        self.prompt_layers = depth - form.unprompted_layers if prompt_layers is None else prompt_layers
        self.gate_activation = gate_activation
        self.scale_on = scale_on or form.scale_on
        self.scales = scales or _spread(self.vision_config.num_hidden_layers)
        self.visual_length = visual_length or (prompt_length if version == "v2_multimodal_7b" else form.visual_length)
        self.visual_layers = visual_layers if form.fusion == "early" else 0
        self.visual_width = visual_width or form.visual_width
        self.visual_depth = visual_depth
        self.visual_heads = visual_heads
        self.channel_order = channel_order
        self.blank_image = blank_image
        self.image_token_id = image_token_id
        self.template = template
        super().__init__(**kwargs)
        if self.visual_layers + self.prompt_layers > depth:
            raise ValueError(
                f"LlamaAdapter: the first {self.visual_layers} layers are to attend to images and the last "
                f"{self.prompt_layers} to learned prompts, but the language model has {depth}; at most that many "
                "together are accepted; lower visual_layers or prompt_layers"
            )
        if blank_image and version != "v2_multimodal_7b":
            raise ValueError(f"LlamaAdapter: blank_image is set; in the version {version} False is accepted")
        if form.fusion == "add" and self.visual_length not in (1, prompt_length):
            raise ValueError(
                f"LlamaAdapter: visual_length is {self.visual_length}, prompt_length {prompt_length}; in the version "
                f"{version} an image's prompts are added to the learned ones, so 1 or as many are accepted"
            )


class LlamaAdapter(MultimodalModel):
    """LLaMA-Adapter V1 and V2.

    `LlamaAdapter(config)` has random weights; `from_parts` puts fresh prompts and a fresh visual branch on pretrained
    models; `from_pretrained` opens a trained one. At the start all gates are closed, and logits are those of the
    language model whatever image is shown.

    Args:
        config: The configuration.
        encoder: The encoder; None builds one from the configuration. Likewise the two below.
        connector: The visual branch: features to prompts [n, P, C].
        language_model: The language model, without adapters; it gets them here.
        processor: Turns samples into batches.
    """

    config_class = LlamaAdapterConfig
    system = "llama_adapter"
    settings = (
        "version",
        "prompt_length",
        "prompt_layers",
        "gate_activation",
        "scale_on",
        "scales",
        "visual_length",
        "visual_layers",
        "visual_width",
        "visual_depth",
        "visual_heads",
        "channel_order",
        "blank_image",
        "template",
    )
    original_options = ("gate_activation", "prompt_length")
    media_inputs = ("pixel_values", "media_rows")
    host_inputs = (*MultimodalModel.host_inputs, "media_rows")
    no_packing = "an image's prompts belong to a row"
    parts = (
        "encoder",
        "connector",
        "prompts",
        "gates",
        "visual_gates",
        "norms",
        "bias_scale",
        "language_model",
        "lora",
    )
    frozen_parts = ("encoder", "language_model")
    # Closed gates let no gradient through to what is behind them.
    zero_at_first: ClassVar[tuple[str, ...]] = ("*.lora_a", "*.prompt", "*.gate_scale", "connector.*")

    def __init__(
        self,
        config: LlamaAdapterConfig,
        encoder: nn.Module | None = None,
        connector: nn.Module | None = None,
        language_model: PreTrainedModel | None = None,
        processor: Processor | None = None,
    ) -> None:
        form = FORMS[config.version]
        if encoder is None:
            encoder = form.encoder.from_config(config.vision_config, *_encoder_options(config))
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        if connector is None:
            connector = _build_connector(config, cast(int, encoder.hidden_size))
        if form.linears:
            add_bias_scale(language_model.get_decoder(), form.linears, cast(Any, config.scale_on))
            for norm in _norms(language_model):
                # What trains is float32; around it the language model computes in its own dtype.
                norm.float().register_forward_hook(_in_dtype_of_input)
        options: Any = {"gate_activation": config.gate_activation, "base_projections": form.past_lora}
        if config.visual_layers:
            add_prompts(language_model, config.visual_length, range(config.visual_layers), learned=False, **options)
        add_prompts(language_model, config.prompt_length, config.prompt_layers, **options)
        super().__init__(config, encoder, connector, language_model, processor)
        self.trained_parts = set()

    @classmethod
    def from_parts(
        cls,
        llm: str | Path,
        encoder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        base_dtype: str | None = None,
        **settings: Any,
    ) -> LlamaAdapter:
        """Puts fresh prompts and a fresh visual branch on a pretrained language model and vision tower.

        Args:
            llm: Folder of a causal language model with its tokenizer, or "world" for the shipped one.
            encoder: Folder of a CLIP model with its image processor, or "world" for the shipped one.
            dtype: Dtype of the two pretrained models; what trains is float32.
            base_dtype: Format of the language model's frozen linear layers, see `open_language_model`.
            **settings: Arguments of `LlamaAdapterConfig`, such as `version`.

        Raises:
            FileNotFoundError: If a folder does not exist.
            TypeError: If there is no such setting.
            ValueError: If a folder lacks weights, or a setting is out of range.
        """
        unknown = [name for name in settings if name not in cls.settings]
        if unknown:
            raise TypeError(
                f"LlamaAdapter.from_parts: there is no setting {', '.join(unknown)}; accepted are "
                f"{', '.join(cls.settings)}"
            )
        llm_folder, encoder_folder = resolve_language_model(llm), ClipEncoder.resolve(encoder)
        language_model = open_language_model(llm_folder, dtype, base_dtype)
        config = LlamaAdapterConfig(language_model.config, vision_config_named(encoder_folder), **settings)
        form = FORMS[config.version]
        tower = form.encoder.from_pretrained(encoder_folder, *_encoder_options(config), dtype=dtype)
        model = cls(config, tower, None, language_model)
        model.attach_processor(llm, encoder)
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
        gate_activation: Literal["tanh", "identity"] | None = None,
        prompt_length: int | None = None,
    ) -> tuple[LlamaAdapter, dict[str, str]]:
        """As `MultimodalModel.from_original`: version 1's file of prompts and gates, or version 2's multimodal 7B.

        Args:
            source: The .pth file, or the folder that holds it.
            llm: As there, as the arguments that follow.
            encoder: As there.
            template: As there.
            dtype: As there.
            gate_activation: None is what the authors' inference code computes of the file: "identity" for version 1
                (its training code has "tanh", so choose that for a file you have trained with it), "tanh" for 2.
            prompt_length: Prompts of each layer. None: 10 in version 1, whose file does not say it; in version 2 those
                of an image.

        Version 2's file may have LoRA beside biases (LORA-BIAS-7B) or not (BIAS-7B). It switches on what the authors'
        code does: `channel_order` "bgr" and `blank_image`.
        """
        state = read_checkpoint(Path(source).expanduser())
        version = version_of(state)
        llm_folder, encoder_folder = resolve_language_model(llm), ClipEncoder.resolve(encoder)
        settings: dict[str, Any] = {"gate_activation": "identity"}
        if version != "v1":
            settings = _V2_7B_CODE | visual_sizes(state)
        if gate_activation is not None:
            settings["gate_activation"] = gate_activation
        if prompt_length is None:
            prompt_length = settings.get("visual_length", 10)
        if prompt_length < 1:
            raise ValueError(f"LlamaAdapter.from_original: prompt_length is {prompt_length}; 1 or more is accepted")
        text = text_config_of(llm_folder)
        config = LlamaAdapterConfig(
            text,
            vision_config_named(encoder_folder),
            version,
            prompt_length,
            min(len(state[TABLE]) // prompt_length, text.num_hidden_layers),
            template=template or "alpaca",
            **settings,
        )
        rank = lora_rank_of(state) if version != "v1" else 0
        found, names = read_original(state, config, rank)
        with torch.device("meta"):
            language_model = AutoModelForCausalLM.from_config(text, dtype=getattr(torch, dtype))
            model = cls(config, None, None, language_model)
            if rank:
                model.add_lora(replace(_V2_LORA, rank=rank, alpha=rank))
        model.attach_processor(llm, encoder)
        model.name_bases(llm=llm, encoder=encoder)
        model.trained_parts |= {"prompts", "gates"} if version == "v1" else set(_V2_7B_PARTS)
        check_state("LlamaAdapter.from_original", model.trained_state(), found)
        model.load_state_dict(found, strict=False, assign=True)
        return model, names

    def processor_settings(self) -> dict[str, Any]:
        """As in `MultimodalModel`; an image takes no place in the text."""
        from mmfast.data.prompt_processor import PromptProcessor

        order = self.config.channel_order
        return {**super().processor_settings(), "tokens_per_image": 1, "kind": PromptProcessor, "channel_order": order}

    def to_original(self, folder: str | Path) -> dict[str, str]:
        """Writes `adapter.pth` in the layout of version 1, or of version 2's multimodal 7B.

        Raises:
            ValueError: If the version has no published layout, or other parts trained than that holds.
        """
        spec, own = self.lora_spec, {name: getattr(self.config, name) for name in _V2_7B_CODE}
        if self.config.version == "v2_multimodal_7b" and own != _V2_7B_CODE:
            raise ValueError(
                f"LlamaAdapter.to_original: the model has {own}; {_V2_7B_CODE} is accepted: the file does not say it, "
                "and the authors' code would compute something else of it"
            )
        if spec is not None and spec.alpha != spec.rank:
            raise ValueError(
                f"LlamaAdapter.to_original: LoRA's alpha is {spec.alpha:g} and its rank {spec.rank}; equal ones are "
                "accepted: the published layout holds updates that are added as they are"
            )
        return write_original(self.trained_state(), self.config, Path(folder), spec.rank if spec else 0)

    def add_lora(self, spec: LoraSpec) -> list[str]:
        """As `MultimodalModel.add_lora`; in the version "v2_multimodal_7b" biases stay and prompts pass by LoRA.

        There a common factor of each layer's gates, `new_gate` in the authors' code, joins the part "gates".

        Raises:
            ValueError: As there; or in version 2 with a scale, whose linear layers have no LoRA beside it.
        """
        names = super().add_lora(spec)
        if FORMS[self.config.version].past_lora:
            for prompts in self.get_decoder().modules():
                if isinstance(prompts, ZeroInitAttention):
                    prompts.add_gate_scale()
        return names

    def stages(self) -> dict[str, Stage]:
        """V1: "instruct" and "instruct_images"; V2: "joint"; the released V2: "pretrain", then "finetune" or
        "finetune_lora"."""
        return dict(FORMS[self.config.version].stages)

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of a part by their full names, each once.

        Raises:
            ValueError: If the part is not one of `parts`.
        """
        if part in ("encoder", "connector", "lora") or part not in self.parts:
            return super().part_parameters(part)
        inside = _parts_inside(self.language_model)
        whole = super().part_parameters("language_model")
        return {name: p for name, p in whole.items() if inside.get(p, "language_model") == part}

    def example_media(self, count: int) -> tuple[dict[str, Tensor], int]:
        """As in `MultimodalModel`; images have no place in the text."""
        return {**super().example_media(count)[0], "media_rows": torch.arange(count)}, 0

    @property
    def features_per_medium(self) -> int:
        """Prompts of an image."""
        return self.config.visual_length

    def visual_prompts(
        self,
        batch_size: int,
        pixel_values: Tensor | None = None,
        media_rows: Tensor | None = None,
        features: Tensor | None = None,
        has_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the images of a batch give to attention, as arguments of `mmfast.adapt.prompts.attend`.

        Args:
            batch_size: B.
            pixel_values: [n, 3, H, W] float; None where there are no images.
            media_rows: [n] int64, the row of the batch that each image belongs to; different rows.
            features: As in `media_features`, of images that have no pixels.
            has_features: bool [n], as there.

        Raises:
            ValueError: If the rows do not belong to the images or the batch.
        """
        of_images = pixel_values if has_features is None else has_features
        rows = [] if media_rows is None else media_rows.tolist()
        images = 0 if of_images is None else len(of_images)
        if len(rows) != images or len(set(rows)) < images or any(not 0 <= row < batch_size for row in rows):
            raise ValueError(
                f"{type(self).__name__}: pixel_values has {images} images and media_rows is {rows}, in a batch of "
                f"{batch_size}; a row of its own for each image is accepted; let the processor collate the batch"
            )
        blank = self.config.blank_image and images < batch_size
        if not images and not blank:
            return {}
        if blank:
            size = self.config.vision_config.image_size
            weight = next(self.encoder.parameters())
            given = weight.new_empty(0, 3, size, size) if pixel_values is None else pixel_values
            pixel_values = torch.cat([given, given.new_zeros(1, *given.shape[1:])])
            has_features = None if has_features is None else torch.cat([has_features, has_features.new_zeros(1)])
        found = self.media_features(pixel_values, features, has_features).unflatten(0, (images + blank, -1))
        # A row without an image has the blank one's prompts, or adds zero, exactly.
        rest = found[images:] if blank else torch.zeros_like(found[:1])
        media_rows = torch.tensor(rows, dtype=torch.long).to(found.device, non_blocking=True)
        prompts = rest.repeat(batch_size, 1, 1).index_copy(0, media_rows, found[:images])
        if FORMS[self.config.version].fusion == "add":
            return {"prompt_bias": prompts}
        prompted = torch.zeros(batch_size, dtype=torch.bool, device=found.device).index_fill(0, media_rows, True)
        return {"sample_prompts": prompts, "prompted": prompted}

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> MultimodalOutput:
        """As `MultimodalModel.forward`, with `pixel_values` [n, 3, H, W] and `media_rows` [n] as media."""
        inputs = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        media = self._take_media(kwargs)
        lengths = kwargs.get("sample_lengths")
        if lengths is not None and inputs is not None and len(lengths) != len(inputs):
            raise ValueError(
                f"{type(self).__name__}: {len(lengths)} samples are in {len(inputs)} rows, but {self.no_packing}; a "
                "row for each sample is accepted; use Processor.collate"
            )
        if inputs is not None:
            kwargs |= self.visual_prompts(len(inputs), **media)
        return super().forward(input_ids, attention_mask, **kwargs)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, streamer: Any = None, **generation_kwargs: Any
    ) -> Any:
        """As `MultimodalModel.generate`, with `pixel_values` [n, 3, H, W] and `media_rows` [n] as media."""
        media = self._take_media(generation_kwargs)
        with given_prompts(self.get_decoder(), **self.visual_prompts(len(input_ids), **media)):
            return super().generate(input_ids, attention_mask, streamer, **generation_kwargs)

    @classmethod
    def check_shapes(cls, where: str, shapes: Any, encoder_size: int, hidden_size: int) -> None:
        """Refuses prompts made for a language model of another width."""
        for name, shape in shapes.items():
            if name.endswith(".prompt") and shape[-1] != hidden_size:
                raise ValueError(
                    f"{where}: these prompts are {shape[-1]} wide, your language model is {hidden_size}; equal widths "
                    "are accepted; pass the language model they were trained with"
                )


def _spread(depth: int) -> list[int]:
    """Four layers, evenly spread up to the last one."""
    return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})


def _encoder_options(config: LlamaAdapterConfig) -> list[Any]:
    return [config.scales] if FORMS[config.version].encoder is ClipScales else []


def _build_connector(config: LlamaAdapterConfig, features: int) -> nn.Module:
    width = config.text_config.hidden_size
    if FORMS[config.version].encoder is ClipScales:
        return GlobalPrompt(features, config.visual_width, width)
    return VisualQueries(
        features, config.visual_width, config.visual_length, config.visual_depth, config.visual_heads, width
    )


def _parts_inside(language_model: nn.Module) -> dict[nn.Parameter, str]:
    """The part of the language model's parameters that are not its frozen weights."""
    found: dict[nn.Parameter, str] = {}
    for module in language_model.modules():
        if isinstance(module, ZeroInitAttention):
            gates = "visual_gates" if module.prompt is None else "gates"
            found |= {p: gates for p in (module.gate, module.gate_scale) if p is not None}
            found |= {} if module.prompt is None else {module.prompt: "prompts"}
        elif isinstance(module, BiasScaleLinear):
            found |= {p: "bias_scale" for p in (module.adapter_bias, module.adapter_scale) if p is not None}
        elif isinstance(module, BiasLoRALinear):
            found[module.adapter_bias] = "bias_scale"
    return found | {p: "norms" for norm in _norms(language_model) for p in norm.parameters(recurse=False)}


def _norms(language_model: nn.Module) -> list[nn.Module]:
    """Of transformers or, optimised, of mmfast."""
    return [module for module in language_model.modules() if type(module).__name__.endswith("Norm")]


def _in_dtype_of_input(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)
