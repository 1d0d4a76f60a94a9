"""PerceiverResampler against OpenFlamingo's form, written anew, in float64; its names, masks and invariants."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.nn import PerceiverResampler

# The module of Python, for its settings.
source = importlib.import_module("mmfast.nn.perceiver_resampler")


@pytest.fixture(params=[0, 10**9], ids=["folded", "joint"])
def fold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the module: with the norms of the media folded into the weights, as for many media, and not."""
    monkeypatch.setattr(source, "FOLD_ROWS", request.param)


def some_resampler(dtype: torch.dtype = torch.float64, **options: Any) -> PerceiverResampler:
    """Small, with norms that are not the identity."""
    resampler = PerceiverResampler(12, **{"depth": 3, "num_heads": 2, "head_dim": 8, "num_latents": 5, **options})
    for module in resampler.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return resampler.to(dtype)


def open_flamingo(state: dict[str, Tensor], media: Tensor, heads: int = 2) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:15-132, on a state dict; media [b, T, F, v, D]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    b, times, frames, patches, _ = media.shape
    if "frame_embs" in state:
        media = media + state["frame_embs"][:frames].view(1, 1, frames, 1, -1)
    x = media.reshape(b, times, frames * patches, -1)
    if "media_time_embs" in state:
        x = x + state["media_time_embs"][:times]
    latents = state["latents"].expand(b, times, -1, -1)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers"))
    for i in range(depth):
        attention, forward = f"layers.{i}.0", f"layers.{i}.1"
        normed = norm(latents, f"{attention}.norm_latents")
        q = normed @ state[f"{attention}.to_q.weight"].T
        joint = torch.cat([norm(x, f"{attention}.norm_media"), normed], -2)
        k, v = (joint @ state[f"{attention}.to_kv.weight"].T).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
        scores = torch.einsum("bthid,bthjd->bthij", q * q.size(-1) ** -0.5, k)
        scores = scores - scores.amax(-1, keepdim=True).detach()
        out = torch.einsum("bthij,bthjd->bthid", scores.softmax(-1), v).transpose(2, 3).flatten(3)
        latents = out @ state[f"{attention}.to_out.weight"].T + latents
        hidden = norm(latents, f"{forward}.0") @ state[f"{forward}.1.weight"].T
        hidden = 0.5 * hidden * (1 + torch.erf(hidden * 0.5**0.5))
        latents = hidden @ state[f"{forward}.3.weight"].T + latents
    return norm(latents, "norm")


def gradients(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(output, wanted, grad.to(output)))


@pytest.mark.usefixtures("fold")
@pytest.mark.parametrize("embedded", [False, True])
def test_is_open_flamingos_module(embedded: bool) -> None:
    resampler = some_resampler(**({"max_num_frames": 4, "max_num_media": 3} if embedded else {}))
    media = torch.randn(2, 3, 4, 6, 12, dtype=torch.float64, requires_grad=True)
    state = {name: x.detach().requires_grad_() for name, x in resampler.state_dict().items()}
    found, wanted = resampler(media), open_flamingo(state, media)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(resampler(media), wanted, rtol=1e-10, atol=1e-12)
    parameters = dict(resampler.named_parameters())
    assert parameters.keys() == state.keys()
    ours = gradients(found, [media, *parameters.values()])
    theirs = gradients(wanted, [media, *(state[name] for name in parameters)])
    for name, a, b in zip(("media", *parameters), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("fold")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    resampler = some_resampler(dtype)
    media = torch.randn(2, 2, 2, 6, 12).to(dtype)
    found = resampler(media)
    assert found.dtype == dtype
    parameters = dict(resampler.named_parameters())
    state = {name: x.detach().double().requires_grad_() for name, x in parameters.items()}
    wanted = open_flamingo(state, media.double())
    ours = [found, *gradients(found, list(parameters.values()))]
    theirs = [wanted, *gradients(wanted, list(state.values()))]
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.double() - b).norm()) <= tolerance * max(float(b.norm()), 1.0)


def test_keys_of_the_state_dict() -> None:
    state = PerceiverResampler(16, depth=2, num_heads=2, head_dim=4, num_latents=3, max_num_frames=5,
                               max_num_media=7).state_dict()  # fmt: skip
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    wanted: dict[str, tuple[int, ...]] = {"latents": (3, 16), "frame_embs": (5, 16), "media_time_embs": (7, 1, 16)}
    for i in range(2):
        wanted |= {
            f"layers.{i}.0.norm_media.weight": (16,),
            f"layers.{i}.0.norm_media.bias": (16,),
            f"layers.{i}.0.norm_latents.weight": (16,),
            f"layers.{i}.0.norm_latents.bias": (16,),
            f"layers.{i}.0.to_q.weight": (8, 16),
            f"layers.{i}.0.to_kv.weight": (16, 16),
            f"layers.{i}.0.to_out.weight": (16, 8),
            f"layers.{i}.1.0.weight": (16,),
            f"layers.{i}.1.0.bias": (16,),
            f"layers.{i}.1.1.weight": (64, 16),
            f"layers.{i}.1.3.weight": (16, 64),
        }
    assert shapes == wanted | {"norm.weight": (16,), "norm.bias": (16,)}


def test_has_as_many_parameters_as_open_flamingos() -> None:
    with torch.device("meta"):
        resampler = PerceiverResampler(1024)
    assert sum(x.numel() for x in resampler.parameters()) == 63_019_008
    assert str(resampler).startswith("PerceiverResampler(\n  hidden_size=1024, num_latents=64, depth=6")


def test_latents_and_embeddings_start_with_unit_variance() -> None:
    resampler = PerceiverResampler(256, depth=1, max_num_frames=64, max_num_media=64)
    for x in (resampler.latents, resampler.frame_embs, resampler.media_time_embs):
        assert x is not None
        assert abs(float(x.std()) - 1) < 0.05


@pytest.mark.usefixtures("fold")
def test_order_of_media_does_not_matter() -> None:
    resampler, media = some_resampler(), torch.randn(1, 2, 3, 6, 12, dtype=torch.float64)
    shuffled = media.flatten(2, 3)[:, :, torch.randperm(18)]
    torch.testing.assert_close(resampler(shuffled), resampler(media))


@pytest.mark.usefixtures("fold")
def test_images_do_not_see_each_other() -> None:
    resampler, media = some_resampler(), torch.randn(2, 3, 1, 6, 12, dtype=torch.float64)
    together = resampler(media)
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(resampler(media[b : b + 1, t : t + 1])[0, 0], together[b, t])


@pytest.mark.usefixtures("fold")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_frames_are_as_if_they_were_not_there(dtype: torch.dtype) -> None:
    resampler = some_resampler(dtype, max_num_frames=4)
    media = torch.randn(1, 2, 4, 6, 12, dtype=dtype)
    mask = torch.tensor([[[True, True, False, False], [True, True, True, True]]])
    wanted = torch.cat([resampler(media[:, :1, :2]), resampler(media[:, 1:])], 1)
    torch.testing.assert_close(resampler(media, mask), wanted)
    torch.testing.assert_close(resampler(media, mask[..., None].expand(-1, -1, -1, 6)), wanted)
    flat = PerceiverResampler.forward(some_without_frames(resampler), media.flatten(2, 3), mask.repeat_interleave(6, 2))
    assert flat.shape == wanted.shape


def some_without_frames(resampler: PerceiverResampler) -> PerceiverResampler:
    resampler.frame_embs = None
    return resampler


@pytest.mark.usefixtures("fold")
def test_an_image_without_media_is_no_error() -> None:
    resampler = some_resampler(torch.float32)
    media = torch.full((1, 2, 1, 6, 12), float("nan"))
    media[:, 1] = torch.randn(6, 12)
    mask = torch.tensor([[[False], [True]]])
    found = resampler(media, mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 1:], resampler(media[:, 1:]))


@pytest.mark.parametrize("masked", [False, True])
def test_precomputed_keys_and_values(masked: bool) -> None:
    resampler, media = some_resampler(max_num_media=2), torch.randn(3, 2, 2, 6, 12, dtype=torch.float64)
    mask = torch.rand(3, 2, 2) < 0.7 if masked else None
    media_kv = resampler.precompute_media_kv(media, mask)
    assert [tuple(x.shape) for x in media_kv.layers] == [(6, 12, 32)] * 3
    torch.testing.assert_close(resampler(media_kv=media_kv), resampler(media, mask))


def test_frozen_media_get_no_gradient_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FOLD_ROWS", 0)
    resampler, media = some_resampler(), torch.randn(1, 1, 2, 6, 12, dtype=torch.float64)
    normed = [x.requires_grad for x in resampler._rows(media, None) if x is not None]
    assert normed == [False]
    resampler(media).sum().backward()
    assert all(x.grad is not None for x in resampler.parameters())


def test_norms_may_change_after_a_forward_pass() -> None:
    resampler, media = some_resampler(), torch.randn(1, 1, 2, 6, 12, dtype=torch.float64)
    before = resampler.precompute_media_kv(media).layers[0]
    with torch.no_grad():
        resampler.layers[0][0].norm_media.weight.mul_(2)
    assert not torch.equal(resampler.precompute_media_kv(media).layers[0], before)


@pytest.mark.usefixtures("fold")
def test_autocast() -> None:
    resampler, media = some_resampler(torch.float32), torch.randn(1, 2, 2, 6, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = resampler(media)
    torch.testing.assert_close(found.float(), resampler(media), rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("fold")
def test_compiles_as_one_graph() -> None:
    resampler, media = some_resampler(torch.float32), torch.randn(1, 2, 2, 6, 12)
    compiled = torch.compile(resampler, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(media), resampler(media))


def test_errors() -> None:
    resampler = some_resampler(max_num_frames=2, max_num_media=3)
    media = torch.randn(1, 2, 2, 6, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="depth is 0; expected at least 1"):
        PerceiverResampler(12, depth=0)
    with pytest.raises(ValueError, match=r"media is \[1, 2, 2, 6, 11\]; expected \[B, T, F, V, 12\]"):
        resampler(media[..., :11])
    with pytest.raises(ValueError, match="with 3 of max_num_frames = 2 at most"):
        resampler(media.repeat(1, 1, 2, 1, 1)[:, :, :3])
    with pytest.raises(ValueError, match="with 4 of max_num_media = 3 at most"):
        resampler(media.repeat(1, 2, 1, 1, 1))
    with pytest.raises(TypeError, match=r"media_mask is torch.float32; expected torch.bool"):
        resampler(media, torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"media_mask is \[1, 2\] and media \[1, 2, 2, 6, 12\]; expected \[1, 2, 2\]"):
        resampler(media, torch.ones(1, 2, dtype=torch.bool))
    media_kv = resampler.precompute_media_kv(media)
    for arguments, options in (((), {}), ((media,), {"media_kv": media_kv})):
        with pytest.raises(ValueError, match="give media, with or without media_mask, or media_kv alone"):
            resampler(*arguments, **options)
    with pytest.raises(ValueError, match="media_kv is of 2 layers; expected 3"):
        resampler(media_kv=media_kv._replace(layers=media_kv.layers[:2]))
