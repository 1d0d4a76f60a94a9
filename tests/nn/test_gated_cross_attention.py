"""GatedCrossAttentionBlock against OpenFlamingo's form, written anew, in float64; its names, gates and invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.nn import GatedCrossAttentionBlock
from mmfast.ops import text_times

HIDDEN, MEDIA_SIZE, HEADS, HEAD_DIM = 12, 10, 2, 8
MODES = [True, False]


def some_block(dtype: torch.dtype = torch.float64, gates: tuple[float, float] = (0.7, -0.4), **options: Any) -> Any:
    """Small, with a norm that is not the identity and open gates."""
    block = GatedCrossAttentionBlock(HIDDEN, MEDIA_SIZE, HEADS, HEAD_DIM, **options)
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    nn.init.constant_(block.attn_gate, gates[0])
    nn.init.constant_(block.ff_gate, gates[1])
    return block.to(dtype)


def some_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Text with one token before its first medium, where media stand in the text, and three media of five rows."""
    locations = torch.zeros(2, 9, dtype=torch.bool)
    locations[0, [1, 4, 6]] = locations[1, [2, 3]] = True
    return torch.randn(2, 9, HIDDEN, dtype=dtype), locations, torch.randn(2, 3, 5, MEDIA_SIZE, dtype=dtype)


def open_flamingo(
    state: dict[str, Tensor], x: Tensor, locations: Tensor, media: Tensor, only_latest: bool, cached: bool = False
) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:15-22 and 136-279, on a state dict."""

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)

    query = heads(norm(x, "attn.norm") @ state["attn.to_q.weight"].t()) * HEAD_DIM**-0.5
    key, value = map(heads, (media.flatten(1, 2) @ state["attn.to_kv.weight"].t()).chunk(2, -1))
    scores = query @ key.transpose(2, 3)
    media_time = (torch.arange(media.size(1)) + 1).repeat_interleave(media.size(2))
    times = locations.count_nonzero(1)[:, None].expand(-1, x.size(1)) if cached else locations.cumsum(1)
    seen = (torch.eq if only_latest else torch.ge)(times[:, None, :, None], media_time)
    weights = scores.masked_fill(~seen, -torch.finfo(scores.dtype).max).softmax(-1)
    if only_latest:
        weights = weights.masked_fill((times == 0)[:, None, :, None], 0.0)
    attended = (weights @ value).transpose(1, 2).flatten(2) @ state["attn.to_out.weight"].t()
    x = x + attended * state["attn_gate"].tanh()
    inner = nn.functional.gelu(norm(x, "ff.0") @ state["ff.1.weight"].t())
    return x + inner @ state["ff.3.weight"].t() * state["ff_gate"].tanh()


@pytest.mark.parametrize("only_latest", MODES)
def test_is_open_flamingos_form(only_latest: bool) -> None:
    block, (x, locations, media) = some_block(only_latest=only_latest, leak=True), some_inputs()
    locations[0, 8] = True  # a fourth medium, which is not supplied
    leaves = [tensor.requires_grad_() for tensor in (x, media, *block.parameters())]
    state = dict(block.named_parameters())
    ours, theirs = block(x, text_times(locations), media), open_flamingo(state, x, locations, media, only_latest)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    grad = torch.randn_like(ours)
    for found, wanted in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_the_leak_is_off_by_default() -> None:
    block, (x, locations, media) = some_block(only_latest=False), some_inputs()
    times = text_times(locations)
    found = block(x, times, media)
    leaking = open_flamingo(block.state_dict(), x, locations, media, False)
    differs = (found - leaking).abs().amax(2) > 1e-12
    assert torch.equal(differs, times == 0)
    torch.testing.assert_close(found[times == 0], block(x, times, media[:, :0])[times == 0])


def test_names_are_open_flamingos() -> None:
    block = GatedCrossAttentionBlock(HIDDEN, MEDIA_SIZE, HEADS, HEAD_DIM)
    assert {name: list(x.shape) for name, x in block.state_dict().items()} == {
        "attn_gate": [1],
        "ff_gate": [1],
        "attn.norm.weight": [12],
        "attn.norm.bias": [12],
        "attn.to_q.weight": [16, 12],
        "attn.to_kv.weight": [32, 10],
        "attn.to_out.weight": [12, 16],
        "ff.0.weight": [12],
        "ff.0.bias": [12],
        "ff.1.weight": [48, 12],
        "ff.3.weight": [12, 48],
    }
    # The size of the released models: 9B.
    with torch.device("meta"):
        block = GatedCrossAttentionBlock(4096, 1024)
    assert sum(x.numel() for x in block.parameters()) == 139_476_994


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_closed_gates_give_the_text_and_only_they_get_a_gradient(dtype: torch.dtype) -> None:
    block, (x, locations, media) = some_block(dtype, gates=(0.0, 0.0)), some_inputs(dtype)
    media.requires_grad_()
    out = block(x, text_times(locations), media)
    assert torch.equal(out, x)
    out.backward(torch.randn_like(out))
    for name, parameter in block.named_parameters():
        assert parameter.grad.any() == name.endswith("gate"), name
    assert not media.grad.any()


@pytest.mark.parametrize("only_latest", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_who_sees_what(dtype: torch.dtype, only_latest: bool) -> None:
    block, (x, locations, media) = some_block(dtype, only_latest=only_latest), some_inputs(dtype)
    times = text_times(locations)
    before = block(x, times, media)
    # Before the first medium nothing depends on any.
    blind = times == 0
    assert blind.any(1).all()
    assert torch.equal(before[blind], block(x, times, torch.randn_like(media))[blind])
    # A medium is seen where its time is, or from there on.
    changed = media.clone()
    changed[:, 1] = torch.randn_like(changed[:, 1])
    differs = (block(x, times, changed) != before).any(2)
    assert torch.equal(differs, times == 2 if only_latest else times >= 2)
    # The rows of a medium are a set.
    shuffled = media.clone()
    shuffled[:, 0] = media[:, 0, torch.randperm(5)]
    torch.testing.assert_close(block(x, times, shuffled), before)
    # Media that no token stands for change nothing.
    padded = torch.cat([media, torch.zeros_like(media)], 1)
    assert times.max() == 3
    torch.testing.assert_close(block(x, times, padded), before)


@pytest.mark.parametrize("only_latest", MODES)
def test_decoding_with_precomputed_media(only_latest: bool) -> None:
    block, (x, locations, media) = some_block(only_latest=only_latest), some_inputs()
    whole, media_kv = block(x, text_times(locations), media), block.precompute_media_kv(media)
    prompt = 7  # all media lie in it, as in OpenFlamingo's cache
    past = locations[:, :prompt].sum(1)
    steps = [block(x[:, :prompt], text_times(locations[:, :prompt]), media_kv=media_kv)]
    for token in range(prompt, 9):
        times = text_times(locations[:, token : token + 1], past)
        steps.append(block(x[:, token : token + 1], times, media_kv=media_kv))
        theirs = open_flamingo(block.state_dict(), x[:, token : token + 1], locations, media, only_latest, cached=True)
        torch.testing.assert_close(steps[-1], theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-12, atol=1e-13)


def test_no_media_at_all() -> None:
    block, (x, locations, media) = some_block(), some_inputs()
    out = block(x, text_times(torch.zeros_like(locations)), media[:, :0])
    torch.testing.assert_close(out, x + block.ff(x) * block.ff_gate.tanh())


def test_autocast_keeps_the_dtype_of_the_text() -> None:
    block, (x, locations, media) = some_block(torch.float32), some_inputs(torch.float32)
    exact = block(x, text_times(locations), media)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(x, text_times(locations), media)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("give media or media_kv, and not both", {"media": None}),
        ("give media or media_kv, and not both", {"media_kv": torch.zeros(2, 3, 5, 32)}),
        (r"x is \[2, 9, 7\]; expected \[B, L, 12\]", {"x": torch.zeros(2, 9, 7)}),
        (r"media is \[2, 3, 10\]; expected \[B, T, n, 10\]", {"media": torch.zeros(2, 3, 10)}),
        (r"media_kv is \[2, 3, 5, 30\]; .* 32\]", {"media": None, "media_kv": torch.zeros(2, 3, 5, 30)}),
    ],
)
def test_bad_arguments(message: str, change: dict[str, Any]) -> None:
    x, locations, media = some_inputs()
    arguments = {"x": x, "text_time": text_times(locations), "media": media}
    with pytest.raises(ValueError, match=f"GatedCrossAttentionBlock: {message}"):
        some_block()(**(arguments | change))


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="GatedCrossAttentionBlock: num_heads is 0; expected at least 1"):
        GatedCrossAttentionBlock(8, 8, num_heads=0)
