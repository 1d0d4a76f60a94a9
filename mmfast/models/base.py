"""A frozen encoder, a connector and a language model: features take the place of media tokens.

The language model is held as transformers made it: it is fed `inputs_embeds` and nothing in it is rewritten.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mmfast.adapt import dequantize
from mmfast.adapt.optimize.last_layer import labelled_rows
from mmfast.adapt.packing import sample_rows
from mmfast.encoders import FrozenEncoder
from mmfast.models.architectures import text_config_named, vision_config_named
from mmfast.models.feature_cache import FEATURE_INPUTS, CachingModel
from mmfast.models.parts import absolute_name, open_processor, resolve_language_model, text_config_of
from mmfast.models.stages import LoraSpec, Stage
from mmfast.models.trained import find_trained, read_description, read_shapes, read_state
from mmfast.ops import linear_cross_entropy
from mmfast.ops.linear_cross_entropy import LossAndAccuracy

if TYPE_CHECKING:
    from mmfast.data import Processor

__all__ = ["LoraSpec", "MultimodalModel", "MultimodalOutput", "Stage"]

IGNORE_INDEX = -100
# Settings under which a model's logits are more than hidden @ weight.T, with the value that does nothing.
_LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


@dataclass
class MultimodalOutput(ModelOutput):
    """What `MultimodalModel.forward` returns; every field is None where it does not apply."""

    loss: Tensor | None = None
    """[] float: cross-entropy over the supervised tokens, mean or sum; with labels only."""
    logits: Tensor | None = None
    """[B, L, V]: without labels, or on request."""
    correct_tokens: Tensor | None = None
    """[] int64: supervised tokens whose largest logit is the label; with labels only."""
    supervised_tokens: Tensor | None = None
    """[] int64: number of supervised tokens; with labels only."""
    past_key_values: Any = None
    """The language model's cache, where one was asked for."""


class MultimodalModel(CachingModel, PreTrainedModel):
    """Encoder → connector → language model, with what the training loop and the generation need.

    A system derives from it, says what it is called and how it is described (the class attributes), builds itself
    in `from_parts` and returns its published `stages`. One whose features are not those of single images through the
    connector overrides `media_features`; one of which other parts than the encoder are frozen, `frozen_features` and
    `cached_parts`.

    Args:
        config: Configuration with `image_token_id` and `text_config`.
        encoder: Frozen; pixels [n, 3, H, W] to features [n, P, D]; has `hidden_size` and `num_patches`.
        connector: Features [n, P, D] to embeddings [n, P, C]; it computes in its own dtype.
        language_model: A causal language model of transformers whose logits are a plain linear map of its
            hidden states.
        processor: Turns samples into batches; needed by nothing here but the stop tokens of `generate`.

    Raises:
        ValueError: If the language model's logits are more than a linear map of its hidden states.
    """

    system: ClassVar[str]
    """Name of the system in `SYSTEMS`."""
    bases: ClassVar[tuple[str, ...]] = ("llm", "encoder")
    """Names of the pretrained parts, which are arguments of `from_parts`."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Attributes of the configuration that are arguments of `from_parts` too; with `bases` they say it all."""
    original_options: ClassVar[tuple[str, ...]] = ()
    """Further arguments of `from_original`: what a published checkpoint does not tell."""
    media_inputs: tuple[str, ...] = ("pixel_values",)
    """Arguments of `forward`, `embed` and `generate` that hold media; they take `FEATURE_INPUTS` in their place."""
    host_inputs: ClassVar[tuple[str, ...]] = ("sample_lengths", "media_tokens", "has_features")
    """Arguments of `forward` whose values the host reads: on the CPU it need not wait for them."""
    no_packing: ClassVar[str | None] = None
    """Why samples cannot share a row; None: they can."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    main_input_name = "input_ids"

    def __init__(
        self,
        config: Any,
        encoder: nn.Module,
        connector: nn.Module,
        language_model: PreTrainedModel,
        processor: Processor | None = None,
    ) -> None:
        super().__init__(config)
        _check_head(language_model)
        self.encoder = encoder
        self.connector = connector
        self.language_model = language_model
        self.processor = processor
        self.lora_spec = None
        self.trained_parts = {"connector"}
        self.base_names = dict.fromkeys(self.bases, "")
        self.post_init()

    @classmethod
    def from_parts(cls, llm: str | Path, encoder: str | Path, *args: Any, **settings: Any) -> Self:
        """Puts fresh parts between a pretrained language model and a pretrained encoder.

        Takes `dtype`, `base_dtype` (see `open_language_model`) and, by their names, what `settings` and further
        `bases` list.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how it is built")

    def name_bases(self, **names: str | Path) -> None:
        """Writes down where the `bases` are, for `describe`; "" is one that the model does without."""
        self.base_names = {base: absolute_name(name) if name else "" for base, name in names.items()}

    @classmethod
    def skeleton(cls, llm: str | Path, encoder: str | Path, **settings: Any) -> Self:
        """The model on the meta device, without weights, to count and to plan.

        Args:
            llm: As in `from_parts`, or a name in `architectures`, such as "lmsys/vicuna-7b-v1.5".
            encoder: Likewise, such as "openai/clip-vit-large-patch14".
            **settings: As in `from_parts`.

        Raises:
            FileNotFoundError: If a name is neither a folder nor known.
        """
        parts = {"text_config": text_config_named(llm), "vision_config": vision_config_named(encoder)}
        config: Any = cls.config_class
        with torch.device("meta"):
            return cast(Any, cls)(config(**parts, **settings))

    def attach_processor(self, llm: str | Path, encoder: str | Path) -> None:
        """Opens the `processor` that samples go through, of the pretrained parts in two folders; loads no weights.

        Args:
            llm: Folder of the language model with its tokenizer, or "world".
            encoder: Folder of the encoder with its image processor, or "world".

        Raises:
            FileNotFoundError: If a folder does not exist.
        """
        folders = resolve_language_model(llm), FrozenEncoder.resolve(encoder)
        processor = open_processor(*folders, **self.processor_settings())
        self.processor, self.config.image_token_id = processor, processor.image_token_id

    def processor_settings(self) -> dict[str, Any]:
        """Arguments of `open_processor` beside the folders."""
        return {"template": self.config.template, "tokens_per_image": self.encoder.num_patches}

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        llm: str | Path | None = None,
        encoder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **others: str | Path,
    ) -> Self:
        """Opens a trained model, its `processor` included, in eval mode.

        Args:
            folder: A folder of `save_trained`, or a run folder (its `model` is opened).
            llm: The language model to use in place of the one written down, should it have moved.
            encoder: The encoder to use in place of the one written down.
            dtype: Dtype of the pretrained parts; by default the one they were trained in.
            **others: Further `bases` to use in place of those written down.

        Raises:
            FileNotFoundError: If the folder holds no model, or a pretrained part is not where it was.
            ValueError: If it is a model of another system, or sizes or names do not fit; the message has both sides.
        """
        folder = Path(folder).expanduser()
        trained = find_trained(folder)
        if trained is None:
            raise FileNotFoundError(
                f"{cls.__name__}.from_pretrained: {folder} holds no trained model; a folder with mmfast.json or a "
                "finished run folder (with model/mmfast.json) is accepted"
            )
        return cls._from_trained(trained, {"llm": llm, "encoder": encoder, **others}, dtype)

    @classmethod
    def from_original(
        cls,
        source: str | Path,
        llm: str | Path,
        encoder: str | Path,
        *,
        template: str | None = None,
        dtype: str = "float32",
    ) -> tuple[Self, dict[str, str]]:
        """The trained parts of a checkpoint in the layout that the system's authors published.

        Only what the checkpoint holds has values; the pretrained parts may be on the meta device, so `save_trained`
        and then `from_pretrained` give the model to run.

        Args:
            source: The file, or the folder that holds it.
            llm: Folder of the language model that it was trained with, or "world".
            encoder: Folder of the encoder that it was trained with, or "world".
            template: Conversation template to chat with; None: the system's.
            dtype: Dtype in which the pretrained parts are to be opened.

        Returns:
            The model, and the name in the checkpoint of each tensor by its name here.

        Raises:
            FileNotFoundError: If a file or folder does not exist.
            ValueError: If it is a checkpoint of another system or size, or tensors are missing or unexpected.
        """
        raise NotImplementedError(f"{cls.__name__} has no published layout that could be read")

    def to_original(self, folder: str | Path) -> dict[str, str]:
        """Writes the trained parts into `folder` as the system's authors published theirs.

        Returns:
            The name in the checkpoint of each tensor by its name here.

        Raises:
            ValueError: If that layout cannot hold what was trained.
        """
        raise NotImplementedError(f"{type(self).__name__} has no published layout that could be written")

    def describe(self) -> dict[str, Any]:
        """The parts and settings that `from_pretrained` needs beside the trained tensors."""
        description = {
            "system": self.system,
            **self.base_names,
            **{name: getattr(self.config, name) for name in self.settings},
            "dtype": str(self.get_input_embeddings().weight.dtype).removeprefix("torch."),
            "base_dtype": self.base_dtype,
        }
        if self.processor is not None:
            description["template"] = self.processor.template.name
            adjusted = {name: getattr(self.processor, name) for name in self.processor.adjustable}
            description["processor"] = adjusted
        return description

    @classmethod
    def _from_trained(cls, folder: Path, moved: dict[str, str | Path | None], dtype: torch.dtype | None) -> Self:
        where = f"{cls.__name__}.from_pretrained"
        description = read_description(folder)
        if description["system"] != cls.system:
            raise ValueError(
                f"{where}: {folder} holds a model of the system {description['system']!r}; {cls.system!r} is accepted; "
                "mmfast.models.open_model opens every system"
            )
        names = {base: moved.get(base) or description[base] for base in cls.bases}
        for base, name in names.items():
            if name not in ("", "world") and not Path(name).expanduser().exists():
                raise FileNotFoundError(
                    f"{where}: {folder} was trained on the {base} {name!r}, which is not there; a local folder or "
                    f'"world" is accepted; pass its new place: {where}({str(folder)!r}, {base}=...)'
                )
        # From headers and configurations alone, so that nothing large is loaded before the refusal.
        widths = (
            vision_config_named(names["encoder"]).hidden_size,
            text_config_of(resolve_language_model(names["llm"])).hidden_size,
        )
        cls.check_shapes(where, read_shapes(folder), *widths)
        # A run of an earlier release lacks the settings that are newer than it.
        chosen = {name: description[name] for name in ("base_dtype", *cls.settings) if name in description}
        model = cls._rebuild(names, dtype or getattr(torch, description["dtype"]), chosen)
        for name, value in description.get("processor", {}).items():
            setattr(model.processor, name, value)
        if description["lora"] is not None:
            lora = description["lora"]
            model.add_lora(LoraSpec(**{**lora, "targets": tuple(lora["targets"])}))
        model.trained_parts = set(description["trained"])
        if "language_model" in model.trained_parts:
            # A LoRA that was merged, which has made a dense model of a quantised one.
            dequantize(model.language_model, model.get_input_embeddings().weight.dtype)
        model.load_trained_state(read_state(folder))
        return model.eval()

    @classmethod
    def _rebuild(cls, names: dict[str, Any], dtype: torch.dtype, settings: dict[str, Any]) -> Self:
        """The model on its pretrained parts, before what was trained is loaded."""
        return cls.from_parts(**names, dtype=dtype, **settings)

    def init_weights(self) -> None:
        """Does nothing: each part comes with its weights."""

    def get_input_embeddings(self) -> Any:
        """The language model's input embedding."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The language model's output projection."""
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> Any:
        """The language model without its output projection."""
        return self.language_model.get_decoder()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recomputes the language model's layers in backward; never in the re-entrant form.

        That form sees no gradient through arguments that a layer takes by keyword.
        """
        options = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        # transformers renamed the method; the old name warns where the new one exists.
        name = "activation_checkpointing_enable"
        model = self.language_model
        (getattr(model, name, None) or model.gradient_checkpointing_enable)(options, **kwargs)
        # The same form needs embeddings with a gradient, which transformers sees to; here they would only make every
        # layer below what trains keep its input and be run backward.
        model.disable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        name = "activation_checkpointing_disable"
        model = self.language_model
        (getattr(model, name, None) or model.gradient_checkpointing_disable)()

    def media_features(
        self, pixel_values: Tensor | None = None, features: Tensor | None = None, has_features: Tensor | None = None
    ) -> Tensor:
        """Maps all media of a batch, at least one, to [N, C]: their features in order, the connector's included.

        Its parameters are `media_inputs` and `FEATURE_INPUTS`.

        Args:
            pixel_values: [n, 3, H, W] float, which give n · P rows.
            features: [m, P, D], what `frozen_features` made of m further media.
            has_features: bool [n + m], which media these are.
        """
        found = self._all_features(features, has_features, pixel_values=pixel_values)
        weight = next(self.connector.parameters(), found)
        return self.connector(found.to(weight.device, weight.dtype)).flatten(0, -2)

    @property
    def features_per_medium(self) -> int | None:
        """Rows of `media_features` that every medium becomes; None where they differ."""
        return self.encoder.num_patches

    def example_media(self, count: int) -> tuple[dict[str, Tensor], int]:
        """Media inputs of `count` media, of the largest size that there is, and each one's image tokens in the text."""
        side = self.encoder.image_size
        return {"pixel_values": torch.zeros(count, 3, side, side)}, self.features_per_medium or 0

    def example_inputs(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """A batch to plan with: one medium in each sample, then text, all of it supervised.

        Raises:
            ValueError: If a medium's tokens leave no room for text.
        """
        media, tokens = self.example_media(batch_size)
        if length < tokens + 2:
            raise ValueError(
                f"{type(self).__name__}: a sample of {length} tokens has no room for a medium of {tokens} and text; "
                f"{tokens + 2} or more are accepted; raise max_length"
            )
        ids = torch.zeros(batch_size, length, dtype=torch.int64)
        ids[:, :tokens] = self.config.image_token_id
        labels = ids.masked_fill(ids == self.config.image_token_id, IGNORE_INDEX)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **media}

    def embed(self, input_ids: Tensor, media_tokens: Tensor | None = None, **media: Tensor | None) -> Tensor:
        """Embeds the text and puts the media's features, in batch order, where the image tokens are.

        The id of the image token is never looked up, so it may lie beyond the vocabulary.

        Args:
            input_ids: [B, L] int64, with as many image tokens for each medium as it has features.
            media_tokens: int64, numbers that add up to the image tokens in `input_ids`; None: they are counted, for
                which the host waits for the device.
            **media: The `media_inputs` for the whole batch, such as `pixel_values` [n, 3, H, W] float; none, None or
                n = 0 where there are no media.

        Returns:
            [B, L, C] in the embedding's dtype.

        Raises:
            ValueError: If the image tokens are not as many as the features.
        """
        is_media = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_media, 0))
        given = {name: value for name, value in media.items() if value is not None and len(value)}
        features = self.media_features(**given) if given else None
        self._check_media_tokens(is_media, media_tokens, 0 if features is None else len(features))
        if features is None:
            return embeds
        return embeds.masked_scatter(is_media.unsqueeze(-1), features.to(embeds.device, embeds.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        loss_reduction: str = "mean",
        output_logits: bool | None = None,
        sample_lengths: Tensor | None = None,
        media_tokens: Tensor | None = None,
        label_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> MultimodalOutput:
        """Runs the model; with labels the loss is taken without making the logits.

        Args:
            input_ids: [B, L] int64; image tokens mark the places of the features.
            attention_mask: [B, L], 0 at padding, which may be on either side; position ids follow from it.
            labels: [B, L] int64, aligned with `input_ids` (the shift is made here); -100 is not supervised.
            inputs_embeds: [B, L, C], instead of `input_ids` and media.
            loss_reduction: "mean" or "sum" over the supervised tokens.
            output_logits: Whether to return logits; by default only without labels.
            sample_lengths: [n] int64, instead of a mask: the tokens of each row before its padding; or, of the samples
                that share the only row (`Processor.pack`), which then attend to themselves alone.
            media_tokens: As in `embed`.
            label_rows: [n] int64, the indices in [B · L] of the positions before a supervised label; None: they are
                sought, for which the host waits for the device.
            **kwargs: The `media_inputs` for the whole batch in its order, such as `pixel_values` [n, 3, H, W] float;
                the rest is passed to the language model.

        Raises:
            ValueError: If the image tokens are not as many as the features, not exactly one of `input_ids` and
                `inputs_embeds` is given, or the rows are not those that `sample_lengths` tells of.
        """
        media = self._take_media(kwargs)
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and media):
            raise ValueError(
                f"{type(self).__name__}: input_ids is {_given(input_ids)}, inputs_embeds {_given(inputs_embeds)}, "
                f"{', '.join(self.media_inputs)} {'given' if media else 'missing'}; accepted are input_ids with or "
                "without media, or inputs_embeds alone"
            )
        text_alone = inputs_embeds is None and not any(len(value) for value in media.values())
        tied = self._tied_to_trained if text_alone else _untied
        if inputs_embeds is None:
            inputs_embeds = self.embed(cast(Tensor, input_ids), media_tokens, **media)
        if sample_lengths is None:
            _add_position_ids(kwargs, attention_mask, inputs_embeds)
        else:
            kwargs |= sample_rows(self.get_decoder(), sample_lengths.tolist(), inputs_embeds, attention_mask)
            attention_mask = kwargs.pop("attention_mask")
        if labels is None:
            output = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
            logits = None if output_logits is False else tied(output.logits)
            return MultimodalOutput(logits=logits, past_key_values=output.get("past_key_values"))
        kwargs.setdefault("use_cache", False)
        # The labels move instead of the hidden states: the last position of a row has no next token.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        labelled = targets != IGNORE_INDEX if label_rows is None else label_rows
        decoder = self.get_decoder()
        with nullcontext() if output_logits else labelled_rows(decoder, labelled, kwargs) as rows:
            output = decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        hidden = output.last_hidden_state
        states = hidden.flatten(0, -2)
        if rows is None and label_rows is not None:
            states, rows = states.index_select(0, label_rows), label_rows
        result = self._loss(states, targets, rows, loss_reduction)
        result.loss = tied(cast(Tensor, result.loss))
        result.logits = self.get_output_embeddings()(hidden) if output_logits else None
        result.past_key_values = output.get("past_key_values")
        return result

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Generates with the language model's own `generate`.

        Args:
            input_ids: [B, L] int64 prompts, padded on the left where their lengths differ.
            attention_mask: [B, L], 0 at padding; None where nothing is padded.
            streamer: A streamer of transformers; it gets the new tokens as they come.
            **generation_kwargs: The `media_inputs` for the whole batch in its order, and any option of transformers'
                `generate`. By default the stop tokens are those of the language model's generation config and the
                tokenizer's end token.

        Returns:
            [B, new] int64: the new tokens only, padded on the right after a sequence's end.

        Raises:
            ValueError: If a prompt is padded on the right, or the image tokens are not as many as the features.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        padded = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
        if padded:
            raise ValueError(
                f"{type(self).__name__}.generate: the prompts of rows {padded} end in padding, from which nothing can "
                'go on; padding on the left is accepted; collate with padding_side="left"'
            )
        media = self._take_media(generation_kwargs)
        options = self._stop_tokens() | generation_kwargs
        if "generation_config" in generation_kwargs:
            options = generation_kwargs
        return self.language_model.generate(
            inputs_embeds=self.embed(input_ids, **media),
            attention_mask=attention_mask,
            streamer=streamer,
            **options,
        )

    def _take_media(self, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Takes the media out of `kwargs`."""
        media = {name: kwargs.pop(name, None) for name in (*self.media_inputs, *FEATURE_INPUTS)}
        return {name: value for name, value in media.items() if value is not None}

    def _tied_to_trained(self, result: Tensor) -> Tensor:
        """The same values, of which what trains outside the language model has a gradient: zero, but not absent.

        Without it a batch of text alone has no graph in the stage that trains only the connector, and
        processes that train together would disagree on which parameters have gradients. It is the end that is tied,
        not the embeddings, so that nothing below what trains is kept.
        """
        if torch.is_grad_enabled():
            for name, parameter in self.named_parameters():
                if parameter.requires_grad and not name.startswith("language_model."):
                    result = result + parameter.flatten()[:0].sum().to(result)
        return result

    def _check_media_tokens(self, is_media: Tensor, known: Tensor | None, available: int) -> None:
        tokens = (is_media.sum(-1) if known is None else known).tolist()
        if sum(tokens) != available:
            raise ValueError(
                f"{type(self).__name__}: input_ids has {sum(tokens)} image tokens (id {self.config.image_token_id}) "
                f"but {', '.join(self.media_inputs)} gives {available} features; equal numbers are accepted; let the "
                "processor encode text and media together"
            )
        each = self.features_per_medium
        broken = [row for row, count in enumerate(tokens) if each and count % each]
        if broken:
            raise ValueError(
                f"{type(self).__name__}: row {broken[0]} of input_ids has {tokens[broken[0]]} image tokens but an "
                f"image has {each}; a multiple is accepted; truncate the text, never an image"
            )

    def _loss(self, hidden: Tensor, targets: Tensor, rows: Tensor | None, reduction: str) -> MultimodalOutput:
        """Of hidden states [B · L, C] and targets [B · L]; or, with the indices `rows` [n], of [n, C] at those."""
        options: dict[str, Any] = {"reduction": reduction, "return_accuracy": True}
        if rows is not None:
            targets, options["ignore_index"] = targets[rows], None
        weight = self.get_output_embeddings().weight
        result = cast(LossAndAccuracy, linear_cross_entropy(hidden, weight, targets, **options))
        return MultimodalOutput(result.loss, correct_tokens=result.correct, supervised_tokens=result.supervised)

    def _stop_tokens(self) -> dict[str, Any]:
        if self.processor is None:
            return {}
        tokenizer = self.processor.tokenizer
        configured = self.language_model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
        ends.discard(None)
        pad = self.processor.pad_token_id
        if pad >= self.get_input_embeddings().weight.shape[0]:
            # A finished row is fed its padding, so the padding must have an embedding.
            pad = tokenizer.eos_token_id
        return {"eos_token_id": sorted(ends) or None, "pad_token_id": pad}


def _check_head(language_model: PreTrainedModel) -> None:
    head: Any = language_model.get_output_embeddings()
    changes = {key: getattr(language_model.config, key, default) for key, default in _LOGIT_CHANGES.items()}
    active = {key: value for key, value in changes.items() if value not in (None, _LOGIT_CHANGES[key])}
    if head is None or getattr(head, "bias", None) is not None or active:
        found = f"it has {active}" if active else f"its output projection is {head}"
        raise ValueError(
            f"MultimodalModel: the logits of {type(language_model).__name__} are not hidden @ weight.T: {found}; "
            "language models with a plain linear output and no bias (Llama, Mistral, Qwen2) are accepted"
        )


def _add_position_ids(kwargs: dict[str, Any], attention_mask: Tensor | None, inputs_embeds: Tensor) -> None:
    """Counts positions from each row's first real token, so that padding on the left changes nothing."""
    if attention_mask is None or attention_mask.dim() != 2 or "position_ids" in kwargs:
        return
    positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    kwargs["position_ids"] = positions[:, -inputs_embeds.shape[1] :]


def _untied(result: Tensor) -> Tensor:
    return result


def _given(value: Tensor | None) -> str:
    return "missing" if value is None else "given"
