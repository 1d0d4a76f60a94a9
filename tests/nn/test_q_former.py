"""QFormer against transformers' Q-Formers of BLIP-2 and InstructBLIP; its masks and invariants."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.nn import QFormer
from mmfast.ops.resampler_attention import resampler_attention

transformers = pytest.importorskip("transformers")
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

TINY = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 12,
    "max_position_embeddings": 9,
}
ENCODER_MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1, 0]])
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


def randomized(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Weights for which every part of the model matters; in eval mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * 0.3 + (x.dim() == 1 and float(x.mean()) > 0.5))
    return model.to(dtype).eval()


def instruct(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    config = transformers.InstructBlipQFormerConfig(**TINY, **options)
    return randomized(InstructBlipQFormerModel(config), dtype)


def blip2(**options: Any) -> Any:
    return randomized(Blip2QFormerModel(transformers.Blip2QFormerConfig(**TINY, **options)))


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(3, 4, 16, generator=generator, dtype=torch.float64)
    states = torch.randn(3, 7, 12, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 19, (3, 5), generator=generator)
    return queries.to(dtype).requires_grad_(), states.to(dtype).requires_grad_(), ids


def text_embeddings(q_former: QFormer) -> Any:
    assert q_former.embeddings is not None
    return q_former.embeddings["word_embeddings"]


def assert_same(
    ours: Tensor,
    q_former: QFormer,
    theirs: Tensor,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    rtol: float = 1e-9,
    atol: float = 1e-10,
) -> None:
    """Outputs, and gradients of inputs and of all parameters; one that we do not make is zero in theirs."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(ours)
    names = dict(q_former.named_parameters())
    found = torch.autograd.grad(ours, [*inputs, *names.values()], grad, materialize_grads=True)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(theirs, [*inputs, *(parameters[name] for name in names)], grad, materialize_grads=True)
    for name, a, b in zip([*map(str, range(len(inputs))), *names], found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frequency", [1, 2])
def test_is_instruct_blips(text: bool, masked: bool, frequency: int) -> None:
    model = instruct(cross_attention_frequency=frequency)
    q_former = QFormer.from_transformers(model)
    queries, states, ids = arguments()
    encoder_mask = ENCODER_MASK if masked else None
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": TEXT_MASK if masked else None} if text else {}
    ours = q_former(queries, states, encoder_mask, **options)
    joint = torch.cat([torch.ones(3, 4, dtype=torch.int64), TEXT_MASK], 1) if masked and text else None
    theirs = model(
        ids if text else None,
        joint,
        query_embeds=queries,
        encoder_hidden_states=states,
        encoder_attention_mask=encoder_mask,
    ).last_hidden_state[:, :4]
    assert_same(ours, q_former, theirs, model, (queries, states))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text_weights", [False, True])
def test_is_blip2s(masked: bool, text_weights: bool) -> None:
    model = blip2(use_qformer_text_input=text_weights)
    q_former = QFormer.from_transformers(model)
    queries, states, _ = arguments()
    mask = ENCODER_MASK if masked else None
    ours = q_former(queries, states, mask)
    theirs = model(queries, encoder_hidden_states=states, encoder_attention_mask=mask).last_hidden_state
    assert_same(ours, q_former, theirs, model, (queries, states))


def test_is_blip2s_with_text() -> None:
    model = blip2(use_qformer_text_input=True)
    embeddings = randomized(Blip2TextEmbeddings(model.config))
    q_former = QFormer.from_transformers(model, embeddings)
    queries, states, ids = arguments()
    joint = torch.cat([torch.ones(3, 4, dtype=torch.int64), TEXT_MASK], 1)
    embedded = embeddings(ids, query_embeds=queries)
    theirs = model(embedded, 4, joint, encoder_hidden_states=states).last_hidden_state[:, :4]
    found = q_former(queries, states, input_ids=ids, attention_mask=TEXT_MASK)
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-10)


def test_float32() -> None:
    model = instruct(torch.float32)
    q_former = QFormer.from_transformers(model)
    queries, states, ids = arguments(torch.float32)
    ours = q_former(queries, states, ENCODER_MASK, ids)
    theirs = model(
        ids, query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=ENCODER_MASK
    ).last_hidden_state[:, :4]
    assert_same(ours, q_former, theirs, model, (queries, states), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", [instruct(), blip2()], ids=["instruct", "blip2"])
def test_takes_transformers_state_dict(model: nn.Module) -> None:
    made = QFormer(16, 3, 2, 12, 24, vocab_size=19 if hasattr(model, "embeddings") else None, max_positions=9)
    made.double().load_state_dict(model.state_dict())
    assert made.state_dict().keys() == model.state_dict().keys()


def test_from_transformers_copies_and_keeps_what_is_frozen() -> None:
    model = instruct(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    model.encoder.layer[1].requires_grad_(False)
    q_former = QFormer.from_transformers(model.train())
    frozen = {name for name, x in q_former.named_parameters() if not x.requires_grad}
    assert frozen == {name for name, _ in q_former.named_parameters() if name.startswith("encoder.layer.1.")}
    assert q_former.training
    assert q_former.dropout.p == 0.25
    assert {m.dropout for m in q_former.modules() if type(m).__name__ == "_Projections"} == {0.5}
    words = text_embeddings(q_former).weight
    before = words.detach().clone()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.zero_()
    assert torch.equal(words, before)


def test_default_size_and_start() -> None:
    with torch.device("meta"):
        whole, alone = QFormer(vocab_size=30523), QFormer()
    layer = 4 * (768 * 768 + 768) + 2 * 768
    cross = layer + 2 * 768 * (1408 - 768)
    feed_forward = 2 * 768 * 3072 + 3072 + 3 * 768
    count = 12 * (layer + feed_forward) + 6 * cross + 2 * 768
    assert sum(x.numel() for x in alone.parameters()) == count
    assert sum(x.numel() for x in whole.parameters()) == count + 12 * feed_forward + (30523 + 512) * 768
    small = QFormer(64, 1, 2, 48, 128, vocab_size=100)
    words = text_embeddings(small).weight.detach()
    assert abs(float(words[1:].std()) - 0.02) < 0.002
    assert not words[0].any()
    assert str(alone).startswith("QFormer(\n  hidden_size=768, encoder_hidden_size=1408")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("holds", [float("nan"), 1e4])
def test_padding_counts_nowhere(training: bool, holds: float) -> None:
    q_former = QFormer.from_transformers(instruct()).train(training)
    queries, states, ids = arguments()
    mask = ENCODER_MASK.bool()
    found = []
    for filled, word in ((states, 3), (states.masked_fill(~mask[..., None], holds), 4)):
        torch.manual_seed(0)
        padded = ids.masked_fill(TEXT_MASK == 0, word)
        out = q_former(queries, filled, mask, padded, TEXT_MASK)
        used = [x for name, x in q_former.named_parameters() if "crossattention" in name]
        found.append([out, *torch.autograd.grad(out.square().sum(), [states, *used])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[1][1][~mask].any()


def test_more_padding_changes_nothing() -> None:
    q_former = QFormer.from_transformers(instruct())
    queries, states, ids = arguments()
    wanted = q_former(queries, states, None, ids)
    mask, text_mask = torch.arange(9).expand(3, -1) < 7, torch.arange(8).expand(3, -1) < 5
    states, ids = nn.functional.pad(states, (0, 0, 0, 2), value=1.0), nn.functional.pad(ids, (0, 3), value=2)
    torch.testing.assert_close(q_former(queries, states, mask, ids, text_mask), wanted)


def test_order_of_image_tokens_does_not_matter() -> None:
    q_former = QFormer.from_transformers(instruct())
    queries, states, ids = arguments()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    found = q_former(queries, states[:, order], ENCODER_MASK[:, order], ids)
    torch.testing.assert_close(found, q_former(queries, states, ENCODER_MASK, ids))


@pytest.mark.parametrize("text", [False, True])
def test_shared_queries(text: bool) -> None:
    q_former = QFormer.from_transformers(instruct())
    queries, states, ids = arguments()
    options = {"input_ids": ids} if text else {}
    shared = queries.detach()[:1].requires_grad_()
    found, wanted = q_former(shared, states, **options), q_former(shared.expand(3, -1, -1), states, **options)
    torch.testing.assert_close(found, wanted)
    parameters = [x for name, x in q_former.named_parameters() if "query" in name]
    for a, b in zip(*(torch.autograd.grad(out.pow(3).sum(), [shared, *parameters]) for out in (found, wanted)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_instructions_matter_and_samples_do_not_see_each_other() -> None:
    q_former = QFormer.from_transformers(instruct())
    queries, states, ids = arguments()
    together = q_former(queries, states, None, ids)
    assert (q_former(queries, states) - together).abs().amax() > 1e-3
    for b in range(3):
        alone = slice(b, b + 1)
        torch.testing.assert_close(q_former(queries[alone], states[alone], None, ids[alone]), together[alone])


def test_a_sample_without_image_is_no_error() -> None:
    queries, states, _ = arguments()
    mask = torch.tensor([True, False, True])[:, None].expand(-1, 7)
    for training in (False, True):
        q_former = QFormer.from_transformers(blip2()).train(training)
        out = q_former(queries, states, mask)
        assert out.isfinite().all()
        grads = torch.autograd.grad(out.sum(), [states, *q_former.parameters()])
        assert all(x.isfinite().all() for x in grads)
        assert not grads[0][1].any()


def test_dropout_differs_from_sample_to_sample() -> None:
    states = torch.randn(1, 7, 12).expand(2, -1, -1)
    for dropout, attention_dropout in ((0.5, 0.0), (0.0, 0.5)):
        q_former = QFormer(16, 2, 2, 12, 24, dropout=dropout, attention_dropout=attention_dropout)
        out = randomized(q_former, torch.float32).train()(torch.randn(1, 4, 16), states)
        assert (out[0] - out[1]).abs().amax() > 1e-3
    still = randomized(QFormer(16, 2, 2, 12, 24, dropout=0.0), torch.float32)
    queries = torch.randn(1, 4, 16)
    torch.testing.assert_close(still.train()(queries, states), still.eval()(queries, states))


def test_which_attention_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = importlib.import_module("mmfast.nn.q_former"), []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(options["media_mask"])
        return resampler_attention(*arguments, **options)

    monkeypatch.setattr(source, "resampler_attention", counted)
    queries, states, _ = arguments()
    for training, dropout, count in ((False, 0.5, 1), (True, 0.5, 0), (True, 0.0, 1)):
        calls.clear()
        model = instruct(hidden_dropout_prob=0.1, attention_probs_dropout_prob=dropout)
        QFormer.from_transformers(model).train(training)(queries, states, ENCODER_MASK)
        # In three layers rows look at each other, without a mask, and in the first and the last at the image.
        masked = [mask is not None and mask.dtype == torch.bool for mask in calls]
        assert masked == [False, True, False, False, True] * count


def test_lower_precision_and_autocast() -> None:
    queries, states, ids = arguments(torch.float32)
    q_former = QFormer.from_transformers(instruct(torch.float32))
    wanted = q_former(queries, states, ENCODER_MASK, ids)
    # An encoder in 16 bits before a Q-Former in fp32, as BLIP-2 has it.
    half = q_former(queries, states.bfloat16(), ENCODER_MASK, ids)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = q_former(queries, states, ENCODER_MASK, ids)
        exact = QFormer.from_transformers(instruct())(queries, states, ENCODER_MASK, ids)
    torch.testing.assert_close(exact, wanted.double(), rtol=1e-3, atol=1e-4)
    assert (cast.float() - wanted).norm() < 0.05 * wanted.norm()


def test_compiles_as_one_graph() -> None:
    q_former = QFormer.from_transformers(instruct(torch.float32))
    queries, states, ids = arguments(torch.float32)
    compiled = torch.compile(q_former, fullgraph=True, backend="aot_eager")
    arguments_ = (queries, states, ENCODER_MASK, ids, TEXT_MASK)
    torch.testing.assert_close(compiled(*arguments_), q_former(*arguments_))


def test_errors() -> None:
    q_former, alone = QFormer.from_transformers(instruct()), QFormer.from_transformers(blip2())
    queries, states, ids = arguments()
    with pytest.raises(ValueError, match="num_layers is 0; expected at least 1"):
        QFormer(num_layers=0)
    with pytest.raises(ValueError, match="hidden_size is 16; expected a multiple of num_heads = 3"):
        QFormer(16, num_heads=3)
    with pytest.raises(ValueError, match=r"encoder_states is \[3, 7, 11\]; expected \[B, N, 12\]"):
        q_former(queries, states[..., :11])
    with pytest.raises(ValueError, match=r"queries is \[2, 4, 16\] .* expected queries \[3 or 1, n, 16\]"):
        q_former(queries[:2], states)
    with pytest.raises(ValueError, match="there are no weights for text; set vocab_size"):
        alone(queries, states, None, ids)
    with pytest.raises(ValueError, match=r"input_ids is \[3, 10\]; expected \[3, L\] with L at most max_positions = 9"):
        q_former(queries, states, None, ids.repeat(1, 2))
    with pytest.raises(ValueError, match="attention_mask is given without input_ids"):
        q_former(queries, states, None, None, TEXT_MASK)
    with pytest.raises(TypeError, match=r"encoder_mask is torch.float32; expected bool or integers"):
        q_former(queries, states, torch.ones(3, 7))
    with pytest.raises(ValueError, match=r"attention_mask is \[3, 9\]; expected \[3, 5\]"):
        q_former(queries, states, None, ids, torch.ones(3, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match="model is Linear; expected Blip2QFormerModel or InstructBlipQFormerModel"):
        QFormer.from_transformers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="hidden_act is relu; expected gelu"):
        QFormer.from_transformers(instruct(hidden_act="relu"))
    with pytest.raises(ValueError, match="the InstructBlipQFormerModel has its own; leave them out"):
        QFormer.from_transformers(instruct(), nn.Identity())
    with pytest.raises(ValueError, match="the Blip2QFormerModel has no weights for text; leave them out"):
        QFormer.from_transformers(blip2(), nn.Identity())
