"""A frozen encoder, a connector and a language model: features take the place of image tokens.

The language model is held as transformers made it: it is fed `inputs_embeds` and nothing in it is rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mmfast.models.stages import LoraSpec, Stage, StagedModel
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


class MultimodalModel(StagedModel, PreTrainedModel):
    """Encoder → connector → language model, with what the training loop and the generation need.

    A system derives from it, names its parts and returns its published stages.

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
        self.post_init()

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

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        name = "activation_checkpointing_disable"
        model = self.language_model
        (getattr(model, name, None) or model.gradient_checkpointing_disable)()

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Embeds the text and puts the images' features, in batch order, where the image tokens are.

        The id of the image token is never looked up, so it may lie beyond the vocabulary.

        Args:
            input_ids: [B, L] int64, with `num_patches` image tokens for each image.
            pixel_values: [n, 3, H, W] float, the images of the whole batch; None or n = 0 for none.

        Returns:
            [B, L, C] in the embedding's dtype.

        Raises:
            ValueError: If the image tokens are not as many as the features.
        """
        is_image = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        has_images = pixel_values is not None and pixel_values.shape[0] > 0
        features = self._features(pixel_values) if has_images else self._no_features(embeds)
        self._check_image_tokens(is_image, 0 if pixel_values is None else pixel_values.shape[0], features)
        if features is None:
            return embeds
        return embeds.masked_scatter(is_image.unsqueeze(-1), features.to(embeds.device, embeds.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        loss_reduction: str = "mean",
        output_logits: bool | None = None,
        **kwargs: Any,
    ) -> MultimodalOutput:
        """Runs the model; with labels the loss is taken without making the logits.

        Args:
            input_ids: [B, L] int64; image tokens mark the places of the features.
            attention_mask: [B, L], 0 at padding, which may be on either side; position ids follow from it.
            pixel_values: [n, 3, H, W] float, the images of the whole batch in its order.
            labels: [B, L] int64, aligned with `input_ids` (the shift is made here); -100 is not supervised.
            inputs_embeds: [B, L, C], instead of `input_ids` and `pixel_values`.
            loss_reduction: "mean" or "sum" over the supervised tokens.
            output_logits: Whether to return logits; by default only without labels.
            **kwargs: Passed to the language model.

        Raises:
            ValueError: If the image tokens are not as many as the features, or not exactly one of `input_ids`
                and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and pixel_values is not None):
            raise ValueError(
                f"{type(self).__name__}: input_ids is {_given(input_ids)}, inputs_embeds {_given(inputs_embeds)}, "
                f"pixel_values {_given(pixel_values)}; accepted are input_ids with or without pixel_values, or "
                "inputs_embeds alone"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed(cast(Tensor, input_ids), pixel_values)
        _add_position_ids(kwargs, attention_mask, inputs_embeds)
        if labels is None:
            output = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
            logits = None if output_logits is False else output.logits
            return MultimodalOutput(logits=logits, past_key_values=output.get("past_key_values"))
        kwargs.setdefault("use_cache", False)
        output = self.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        hidden = output.last_hidden_state
        result = self._loss(hidden, labels, loss_reduction)
        result.logits = self.get_output_embeddings()(hidden) if output_logits else None
        result.past_key_values = output.get("past_key_values")
        return result

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        streamer: Any = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Generates with the language model's own `generate`.

        Args:
            input_ids: [B, L] int64 prompts, padded on the left where their lengths differ.
            attention_mask: [B, L], 0 at padding; None where nothing is padded.
            pixel_values: [n, 3, H, W] float, the images of the whole batch in its order.
            streamer: A streamer of transformers; it gets the new tokens as they come.
            **generation_kwargs: Any option of transformers' `generate`. By default the stop tokens are those
                of the language model's generation config and the tokenizer's end token.

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
        options = self._stop_tokens() | generation_kwargs
        if "generation_config" in generation_kwargs:
            options = generation_kwargs
        return self.language_model.generate(
            inputs_embeds=self.embed(input_ids, pixel_values),
            attention_mask=attention_mask,
            streamer=streamer,
            **options,
        )

    def _features(self, pixel_values: Tensor | None) -> Tensor:
        features = self.encoder(pixel_values)
        weight = next(self.connector.parameters(), features)
        return self.connector(features.to(weight.device, weight.dtype))

    def _no_features(self, embeds: Tensor) -> Tensor | None:
        """An empty slice through the connector while it trains: its gradient is zero then, not absent.

        Without it a batch of text alone has no graph in the stage that trains only the connector, and
        processes that train together would disagree on which parameters have gradients.
        """
        weight = next(self.connector.parameters(), None)
        if weight is None or not (weight.requires_grad and torch.is_grad_enabled()):
            return None
        size = (0, self.encoder.hidden_size)
        return self.connector(torch.zeros(size, device=weight.device, dtype=weight.dtype))

    def _check_image_tokens(self, is_image: Tensor, images: int, features: Tensor | None) -> None:
        tokens = is_image.sum(-1).tolist()
        available = 0 if features is None else features.numel() // features.shape[-1]
        patches = self.encoder.num_patches
        if sum(tokens) != available:
            raise ValueError(
                f"{type(self).__name__}: input_ids has {sum(tokens)} image tokens (id "
                f"{self.config.image_token_id}) but pixel_values gives {available} features ({images} images of "
                f"{patches}); equal numbers are accepted; let the processor encode text and images together"
            )
        broken = [row for row, count in enumerate(tokens) if count % patches]
        if broken:
            raise ValueError(
                f"{type(self).__name__}: row {broken[0]} of input_ids has {tokens[broken[0]]} image tokens but an "
                f"image has {patches}; a multiple is accepted; truncate the text, never an image"
            )

    def _loss(self, hidden: Tensor, labels: Tensor, reduction: str) -> MultimodalOutput:
        # The labels move instead of the hidden states: the last position of a row has no next token.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        weight = self.get_output_embeddings().weight
        result = cast(
            LossAndAccuracy,
            linear_cross_entropy(hidden.flatten(0, 1), weight, targets, reduction=reduction, return_accuracy=True),
        )
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


def _given(value: Tensor | None) -> str:
    return "missing" if value is None else "given"
