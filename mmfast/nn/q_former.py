"""The Q-Former of BLIP-2 and InstructBLIP: queries that read an image, and an instruction if there is one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops.resampler_attention import resampler_attention

INITIALIZER_RANGE = 0.02  # BERT's


class _Projections(nn.Module):
    """Attention but its output's projection: of rows [B or 1, R, D] to states [B, K, C]."""

    def __init__(self, hidden_size: int, states_size: int, num_heads: int, dropout: float, cross: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.cross = num_heads, dropout, cross
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(states_size, hidden_size)
        self.value = nn.Linear(states_size, hidden_size)

    def forward(self, rows: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (self._heads(x) for x in (self.query(rows), self.key(states), self.value(states)))
        query = query.expand(key.size(0), -1, -1, -1)
        dropout = self.dropout if self.training else 0.0
        # PyTorch's backward of so few rows in 16 bits is slow on a CPU.
        if dropout == 0 and (self.cross or rows.is_cpu):
            attended = resampler_attention(query, key, value, media_mask=mask)
        else:
            if mask is not None:
                mask = mask[:, None, None].expand(-1, 1, query.size(2), -1)
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return attended.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class _Output(nn.Module):
    """A branch's last projection, its dropout, and the norm of the sum with what the branch began with."""

    def __init__(self, size: int, hidden_size: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class _Attention(nn.Module):
    def __init__(self, attention: _Projections, output: _Output) -> None:
        super().__init__()
        self.attention, self.output = attention, output

    def forward(self, rows: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.output(self.attention(rows, states, mask), rows)
        return out


class _Layer(nn.Module):
    """One layer, under transformers' names."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        encoder_hidden_size: int | None,
        text: bool,
        dropout: float,
        attention_dropout: float,
        eps: float,
    ) -> None:
        super().__init__()

        def attention(states_size: int, cross: bool) -> _Attention:
            projections = _Projections(hidden_size, states_size, num_heads, attention_dropout, cross)
            return _Attention(projections, _Output(hidden_size, hidden_size, dropout, eps))

        def intermediate() -> nn.Sequential:
            return nn.Sequential(OrderedDict(dense=nn.Linear(hidden_size, intermediate_size), activation=nn.GELU()))

        self.attention = attention(hidden_size, False)
        self.crossattention = None if encoder_hidden_size is None else attention(encoder_hidden_size, True)
        self.intermediate = intermediate() if text else None
        self.output = _Output(intermediate_size, hidden_size, dropout, eps) if text else None
        self.intermediate_query = intermediate()
        self.output_query = _Output(intermediate_size, hidden_size, dropout, eps)

    def forward(
        self,
        rows: Tensor,
        states: Tensor,
        mask: Tensor | None,
        encoder_states: Tensor,
        encoder_mask: Tensor | None,
        n_queries: int,
    ) -> Tensor:
        """rows: of states [B or 1, n_queries + L, D], those that are wanted -> as many rows."""
        rows = self.attention(rows, states, mask)
        queries, text = rows[:, :n_queries], rows[:, n_queries:]
        if self.crossattention is not None:
            queries = self.crossattention(queries, encoder_states, encoder_mask)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if text.size(1) == 0 or self.intermediate is None or self.output is None:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text)], 1)


class QFormer(nn.Module):
    """BLIP-2's Q-Former, or with a vocabulary InstructBLIP's: a drop-in for transformers', under its names.

        h = LN([queries; words + positions])
        for each layer:  h ← LN(h + SelfAttention(h))                              queries and text see each other
                         h_q ← LN(h_q + CrossAttention(h_q, encoder_states))       queries, in every k-th layer from 0
                         h_q ← LN(h_q + FFN_query(h_q));  h_t ← LN(h_t + FFN(h_t))

    Only the rows of the queries come out, which is all that BLIP-2 and InstructBLIP use. So the last layer makes no
    rows of text, and its text FFN gets no gradient (transformers gives zeros); it is kept for the checkpoint's sake.
    Queries that all samples share are one copy until they have seen the image. Masks are never made dense.

    In training with attention dropout attention is PyTorch's, which drops out; else it is `resampler_attention`, the
    self-attention on a CPU alone.

    Args:
        hidden_size: D, of queries and result.
        num_layers, num_heads: as BERT's; num_heads divides D.
        encoder_hidden_size: C, of what the queries look at.
        intermediate_size: width of the feed-forwards.
        cross_attention_frequency: k; layers 0, k, 2k, … look at the encoder's states.
        vocab_size: None: queries alone, with no weights for text.
        max_positions: most tokens of text.
        dropout: after the embeddings' norm and each branch, in training.
        layer_norm_eps: of all norms.
        attention_dropout: of attention's weights; default: `dropout`.
        pad_token_id: the word whose embedding starts at 0 and gets no gradient; None: no such word.

    Raises:
        ValueError: a size is wrong.

    Source: Li et al., "BLIP-2" (arXiv 2301.12597), section 3.1; Dai et al., "InstructBLIP" (arXiv 2305.06500), section
    2.3; salesforce/LAVIS, lavis/models/blip2_models/Qformer.py:51-484; transformers 5.23,
    models/instructblip/modeling_instructblip.py.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        encoder_hidden_size: int = 1408,
        intermediate_size: int = 3072,
        cross_attention_frequency: int = 2,
        vocab_size: int | None = None,
        max_positions: int = 512,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-12,
        attention_dropout: float | None = None,
        pad_token_id: int | None = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "encoder_hidden_size": encoder_hidden_size,
            "intermediate_size": intermediate_size,
            "cross_attention_frequency": cross_attention_frequency,
            "vocab_size": vocab_size,
            "max_positions": max_positions,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"QFormer: {name} is {size}; expected at least 1")
        if hidden_size % num_heads:
            raise ValueError(f"QFormer: hidden_size is {hidden_size}; expected a multiple of num_heads = {num_heads}")
        self.hidden_size, self.encoder_hidden_size, self.max_positions = hidden_size, encoder_hidden_size, max_positions
        self.num_heads = num_heads
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        norm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.layernorm = norm if vocab_size is None else None
        self.embeddings = None
        if vocab_size is not None:
            words = nn.Embedding(vocab_size, hidden_size, pad_token_id)
            positions = nn.Embedding(max_positions, hidden_size)
            parts = {"word_embeddings": words, "position_embeddings": positions, "layernorm": norm}
            self.embeddings = nn.ModuleDict(parts)
        self.dropout = nn.Dropout(dropout)
        layers = (
            _Layer(
                hidden_size,
                num_heads,
                intermediate_size,
                encoder_hidden_size if i % cross_attention_frequency == 0 else None,
                vocab_size is not None,
                dropout,
                attention_dropout,
                layer_norm_eps,
            )
            for i in range(num_layers)
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.apply(_initialize)

    @classmethod
    def from_transformers(cls, model: nn.Module, embeddings: nn.Module | None = None) -> Self:
        """A Q-Former with a copy of the weights of transformers', and with its outputs.

        Args:
            model: `Blip2QFormerModel` or `InstructBlipQFormerModel`. Frozen weights stay frozen.
            embeddings: of BLIP-2's text, which are outside its `Blip2QFormerModel` (`Blip2ForImageTextRetrieval
                .embeddings`). Without them a BLIP-2's weights for text, if it has any, are left out.

        Raises:
            TypeError: `model` is another class.
            ValueError: its activation is not GELU, or there are embeddings that it cannot use.
        """
        where, kind = "QFormer.from_transformers", type(model).__name__
        if kind not in ("Blip2QFormerModel", "InstructBlipQFormerModel"):
            raise TypeError(f"{where}: model is {kind}; expected Blip2QFormerModel or InstructBlipQFormerModel")
        config: Any = model.config
        if config.hidden_act != "gelu":
            raise ValueError(f"{where}: hidden_act is {config.hidden_act}; expected gelu")
        instruct = kind == "InstructBlipQFormerModel"
        if embeddings is not None and (instruct or not config.use_qformer_text_input):
            why = "has its own" if instruct else "has no weights for text"
            raise ValueError(f"{where}: embeddings are given, but the {kind} {why}; leave them out")
        with torch.device("meta"):
            q_former = cls(
                config.hidden_size,
                config.num_hidden_layers,
                config.num_attention_heads,
                config.encoder_hidden_size,
                config.intermediate_size,
                config.cross_attention_frequency,
                config.vocab_size if instruct or embeddings is not None else None,
                config.max_position_embeddings,
                config.hidden_dropout_prob,
                config.layer_norm_eps,
                config.attention_probs_dropout_prob,
                config.pad_token_id,
            )
        theirs = dict(model.named_parameters())
        if embeddings is not None:
            theirs |= {f"embeddings.{name}": x for name, x in embeddings.named_parameters()}
            theirs |= {f"embeddings.{name}": theirs.pop(name) for name in ("layernorm.weight", "layernorm.bias")}
        elif not instruct:
            theirs = {
                name: x for name, x in theirs.items() if name.split(".")[3:4] not in (["intermediate"], ["output"])
            }
        q_former.load_state_dict({name: x.detach().clone() for name, x in theirs.items()}, assign=True)
        for name, x in q_former.named_parameters():
            x.requires_grad_(theirs[name].requires_grad)
        return q_former.train(model.training)

    def forward(
        self,
        queries: Tensor,
        encoder_states: Tensor,
        encoder_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What the queries have read.

        Args:
            queries: [B, n, D], or [1, n, D], the same for all samples; cast to the dtype of the weights.
            encoder_states: [B, N, C], what the queries look at; cast likewise.
            encoder_mask: [B, N] (bool or integers), not 0 where a state is real. Padding counts nowhere, whatever it
                holds. Default: all are. The queries of a sample without any attend to nothing, which gives zero.
            input_ids: [B, L] (integers), instructions. Default: none.
            attention_mask: [B, L] (bool or integers), of `input_ids` alone, not 0 where a token is real. Default: all
                are.

        Returns:
            [B, n, D]: the rows of the queries.

        Raises:
            ValueError, TypeError: an argument is wrong.
        """
        self._check(queries, encoder_states, encoder_mask, input_ids, attention_mask)
        layers: Any = self.encoder["layer"]
        norm: Any = self.layernorm if self.embeddings is None else self.embeddings["layernorm"]
        device, dtype = encoder_states.device.type, norm.weight.dtype
        batch, n_queries = encoder_states.size(0), queries.size(1)
        # Autocast, which leaves float64 alone, would cast them again in each layer.
        cast = torch.is_autocast_enabled(device) and dtype != torch.float64
        encoder_states = encoder_states.to(torch.get_autocast_dtype(device) if cast else dtype)
        if encoder_mask is not None:
            encoder_mask = encoder_mask.bool()
            encoder_states = encoder_states.masked_fill(~encoder_mask[..., None], 0)
        rows, mask = queries.to(dtype), None
        if input_ids is not None or self.training:
            # Text and dropout differ from sample to sample.
            rows = rows.expand(batch, -1, -1)
        if input_ids is not None:
            rows = torch.cat([rows, self._embed(input_ids)], 1)
            mask = None if attention_mask is None else F.pad(attention_mask.bool(), (n_queries, 0), value=True)
        rows = self.dropout(norm(rows))
        for layer in layers[:-1]:
            rows = layer(rows, rows, mask, encoder_states, encoder_mask, n_queries)
        out: Tensor = layers[-1](rows[:, :n_queries], rows, mask, encoder_states, encoder_mask, n_queries)
        return out

    def _embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Any = self.embeddings
        embedded: Tensor = embeddings["word_embeddings"](input_ids)
        return embedded + embeddings["position_embeddings"].weight[: input_ids.size(1)]

    def _check(
        self,
        queries: Tensor,
        encoder_states: Tensor,
        encoder_mask: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> None:
        where, shape = "QFormer", list(encoder_states.shape)
        if encoder_states.dim() != 3 or encoder_states.size(2) != self.encoder_hidden_size:
            raise ValueError(f"{where}: encoder_states is {shape}; expected [B, N, {self.encoder_hidden_size}]")
        batch = shape[0]
        if queries.dim() != 3 or queries.size(0) not in (1, batch) or queries.size(2) != self.hidden_size:
            raise ValueError(
                f"{where}: queries is {list(queries.shape)} and encoder_states {shape}; expected queries "
                f"[{batch} or 1, n, {self.hidden_size}]"
            )
        if input_ids is not None:
            if self.embeddings is None:
                raise ValueError(f"{where}: input_ids are given, but there are no weights for text; set vocab_size")
            if input_ids.dim() != 2 or input_ids.size(0) != batch or input_ids.size(1) > self.max_positions:
                raise ValueError(
                    f"{where}: input_ids is {list(input_ids.shape)}; expected [{batch}, L] with L at most "
                    f"max_positions = {self.max_positions}"
                )
        elif attention_mask is not None:
            raise ValueError(f"{where}: attention_mask is given without input_ids, whose mask it is; leave it out")
        for name, mask, masked in (
            ("encoder_mask", encoder_mask, shape[:2]),
            ("attention_mask", attention_mask, None if input_ids is None else list(input_ids.shape)),
        ):
            if mask is None:
                continue
            if mask.is_floating_point():
                raise TypeError(f"{where}: {name} is {mask.dtype}; expected bool or integers, not 0 where real")
            if list(mask.shape) != masked:
                raise ValueError(f"{where}: {name} is {list(mask.shape)}; expected {masked}")

    def extra_repr(self) -> str:
        sizes = f"hidden_size={self.hidden_size}, encoder_hidden_size={self.encoder_hidden_size}"
        return f"{sizes}, num_heads={self.num_heads}"


def _initialize(module: nn.Module) -> None:
    """As BERT begins."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0.0, INITIALIZER_RANGE)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
