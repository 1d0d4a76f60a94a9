"""The published files of LLaMA-Adapter: exactly their names and shapes, small, both ways; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfast.models import LlamaAdapter, LlamaAdapterConfig, LoraSpec, open_model
from mmfast.models.convert import convert
from mmfast.models.export import export
from mmfast.models.llama_adapter_original import FILE, layout_of, read_checkpoint

C, HEADS, LAYERS, FFN, WIDTH, PROJECTED, DEPTH, RANK = 48, 4, 3, 64, 32, 20, 2, 3


def version_1(length: int = 10, prompted: int = 2) -> dict[str, Tensor]:
    """alpaca_finetuning_v1/extract_adapter_from_checkpoint.py: the table, and the gates of all layers."""
    gates = {f"layers.{i}.attention.gate": (1, HEADS, 1, 1) for i in range(LAYERS)}
    return filled({"adapter_query.weight": (length * prompted, C), **gates})


def version_2(lora: bool = False) -> dict[str, Tensor]:
    """llama_adapter_v2_multimodal7b/util/extract_adapter_from_checkpoint.py, the BIAS form or the LORA form."""
    linears = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    linears |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    shapes: dict[str, tuple[int, ...]] = {
        "visual_query.weight": (10, WIDTH),
        "adapter_query.weight": (10 * (LAYERS - 1), C),
        **linear("clip_proj", WIDTH, PROJECTED),
        **norm("clip_proj_norm", WIDTH),
        **linear("visual_proj", C, WIDTH),
        **norm("visual_proj_norm", C),
        "llama.norm.weight": (C,),
    }
    for i in range(DEPTH):
        for name, size in linears.items():
            shapes |= linear(f"visual_blocks.{i}.{name}", *size)
        shapes |= norm(f"visual_blocks.{i}.norm1", WIDTH) | norm(f"visual_blocks.{i}.norm2", WIDTH)
    for i in range(LAYERS):
        layer = f"llama.layers.{i}"
        shapes[f"{layer}.attention.gate"] = (1, HEADS, 1, 1)
        shapes |= {f"{layer}.attention.{name}.bias": (C,) for name in ("wq", "wo")}
        shapes |= {f"{layer}.feed_forward.{name}.bias": (size,) for name, size in (("w1", FFN), ("w2", C), ("w3", FFN))}
        shapes |= {f"{layer}.{name}.weight": (C,) for name in ("attention_norm", "ffn_norm")}
        if lora:
            shapes[f"{layer}.attention.new_gate"] = (1, 1, 1, 1)
            sizes = {f"attention.lora_w{name}": (C, C) for name in "qkvo"}
            sizes |= {"feed_forward.lora_w1": (C, FFN), "feed_forward.lora_w3": (C, FFN)}
            sizes["feed_forward.lora_w2"] = (FFN, C)
            shapes |= {f"{layer}.{name}_l1.weight": (RANK, into) for name, (into, _) in sizes.items()}
            shapes |= {f"{layer}.{name}_l2.weight": (out, RANK) for name, (_, out) in sizes.items()}
    return filled(shapes)


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def write(state: dict[str, Tensor], folder: Path, wrapped: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "config": {"w_bias": True}} if wrapped else state, folder / "in.pth")
    return folder / "in.pth"


def published_logits(base: dict[str, Tensor], state: dict[str, Tensor], ids: Tensor, visual: Tensor) -> Tensor:
    """The multimodal 7B's forward as llama_adapter_v2_multimodal7b/llama/llama.py has it, in float64.

    Its rotary embedding turns the channels 2i and 2i + 1 of a head together; prompts see wk and wv as they are.

    Args:
        base: A language model of transformers, whose rotary embedding turns i and i + D / 2 together.
        state: The file.
        ids: [L].
        visual: [10, C], the prompts of the image.
    """
    base, state = ({name: tensor.double() for name, tensor in tensors.items()} for tensors in (base, state))
    length, size = len(ids), C // HEADS
    pairs = [half * size // 2 + pair for pair in range(size // 2) for half in (0, 1)]
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(angles), angles)
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"llama.{name}.weight"]

    def heads(x: Tensor) -> Tensor:
        return x.view(-1, HEADS, size).transpose(0, 1)

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(HEADS, length, -1, 2)) * turn).flatten(-2)

    hidden = base["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
        names |= {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
        weights = {name: base[f"model.layers.{i}.{ours}.weight"] for name, ours in names.items()}
        for name in ("wq", "wk"):
            weights[name] = weights[name].view(HEADS, size, C)[:, pairs].flatten(0, 1)

        def mapped(x: Tensor, name: str, i: int = i, weights: dict[str, Tensor] = weights) -> Tensor:
            block = f"llama.layers.{i}.{'feed_forward' if name[1].isdigit() else 'attention'}"
            y = x @ weights[name].T + state.get(f"{block}.{name}.bias", 0.0)
            if f"{block}.lora_{name}_l1.weight" in state:
                y = y + x @ state[f"{block}.lora_{name}_l1.weight"].T @ state[f"{block}.lora_{name}_l2.weight"].T
            return y

        x = norm(hidden, f"layers.{i}.attention_norm")
        q, k, v = rotated(heads(mapped(x, "wq"))), rotated(heads(mapped(x, "wk"))), heads(mapped(x, "wv"))
        out = (q @ k.mT / size**0.5 + causal).softmax(-1) @ v
        if i > 0:
            prompts = state["adapter_query.weight"][10 * (i - 1) : 10 * i] + visual
            few_k, few_v = heads(prompts @ weights["wk"].T), heads(prompts @ weights["wv"].T)
            gate = state[f"llama.layers.{i}.attention.gate"][0].tanh()
            gate = gate * state.get(f"llama.layers.{i}.attention.new_gate", torch.ones(1, 1, 1, 1))[0]
            out = out + gate * ((q @ few_k.mT / size**0.5).softmax(-1) @ few_v)
        hidden = hidden + mapped(out.transpose(0, 1).flatten(1), "wo")
        x = norm(hidden, f"layers.{i}.ffn_norm")
        hidden = hidden + mapped(torch.nn.functional.silu(mapped(x, "w1")) * mapped(x, "w3"), "w2")
    return norm(hidden, "norm") @ base["lm_head.weight"].T


@pytest.fixture
def llm(write_llm: Callable[..., Path]) -> Path:
    return write_llm(num_hidden_layers=LAYERS, intermediate_size=FFN, num_key_value_heads=HEADS)


@pytest.fixture
def encoder(write_projected_encoder: Callable[[int], Path]) -> Path:
    return write_projected_encoder(PROJECTED)


@pytest.mark.parametrize(("version", "lora"), [(1, False), (2, False), (2, True)])
def test_a_checkpoint_comes_back_bit_for_bit(
    llm: Path, encoder: Path, tmp_path: Path, version: int, lora: bool
) -> None:
    state = version_1() if version == 1 else version_2(lora)
    # Gates of layers without prompts mean nothing and are written as they start.
    idle = {"layers.0.attention.gate" if version == 1 else "llama.layers.0.attention.gate": 0.0}
    idle |= {"llama.layers.0.attention.new_gate": 1.0} if lora else {}
    for name, start in idle.items():
        state[name].fill_(start)
    model, names = LlamaAdapter.from_original(write(state, tmp_path, version == 2), llm, encoder)
    assert model.config.version == ("v1" if version == 1 else "v2_multimodal_7b")
    assert set(names.values()) == state.keys() - idle.keys()
    assert model.to_original(tmp_path / "out") == names
    content = torch.load(tmp_path / "out" / FILE, weights_only=True)
    if version == 2:
        assert content["config"] == {"w_bias": True, "w_lora": lora, "lora_rank": RANK if lora else 16}
        content = content["model"]
    assert content.keys() == state.keys()
    assert all(torch.equal(content[name], tensor) for name, tensor in state.items())


def test_the_counts_of_the_published_files() -> None:
    text = {"model_type": "llama"}  # whose defaults are the 7B's sizes
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768}
    layout = layout_of(LlamaAdapterConfig(text, vision, "v1"))
    assert len({*layout.names.values(), *layout.idle}) == 33
    assert list(layout.idle) == ["layers.0.attention.gate", "layers.1.attention.gate"]
    layout = layout_of(LlamaAdapterConfig(text, vision, "v2_multimodal_7b"))
    assert len({*layout.names.values(), *layout.idle}) == 363
    assert list(layout.idle) == ["llama.layers.0.attention.gate"] and len(layout.prompts) == 31
    layout = layout_of(LlamaAdapterConfig(text, vision, "v2_multimodal_7b"), lora=True)
    assert len({*layout.names.values(), *layout.idle}) == 843
    assert list(layout.idle) == [f"llama.layers.0.attention.{name}" for name in ("gate", "new_gate")]
    with pytest.raises(ValueError, match="no published layout of the version 'v1' with LoRA"):
        layout_of(LlamaAdapterConfig(text, vision, "v1"), lora=True)
    with pytest.raises(ValueError, match="no published layout of the version 'v2'"):
        layout_of(LlamaAdapterConfig(text, vision, "v2"))


def test_the_values_of_the_published_file_with_lora() -> None:
    options = {"version": "v2_multimodal_7b", "prompt_layers": 31}
    model = LlamaAdapter.skeleton("huggyllama/llama-7b", "openai/clip-vit-large-patch14", **options)
    for stage in model.stages().values():
        model.set_stage(stage)
    layout, state = layout_of(model.config, lora=True), model.trained_state()
    assert state.keys() == layout.names.keys()
    values = sum(p.numel() for p in state.values()) + sum(p.numel() for p in layout.idle.values())
    assert values == 103_072_544


@pytest.mark.parametrize("lora", [False, True])
def test_logits_are_those_of_the_published_code(llm: Path, encoder: Path, tmp_path: Path, lora: bool) -> None:
    state = version_2(lora)
    convert(str(write(state, tmp_path, True)), str(tmp_path / "model"), str(llm), str(encoder), system="llama_adapter")
    model = open_model(tmp_path / "model")
    ids, pixels = torch.tensor([[1, 9, 30, 7, 44, 12]]), torch.randn(1, 3, 16, 16)
    media = {"pixel_values": pixels, "media_rows": torch.tensor([0])}
    base = load_file(llm / "model.safetensors")
    # Text alone goes with an image of zeros.
    for given, seen in ((media, pixels), ({}, torch.zeros(1, 3, 16, 16))):
        with torch.no_grad():
            visual = model.connector(model.encoder(seen))[0].double()
            found = model(ids, **given).logits[0].double()
        expected = published_logits(base, state, ids[0], visual)
        assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - published_logits(base, state, ids[0], 0 * visual)).norm() > 1e-3 * expected.norm()
    assert model.processor.channel_order == "bgr"
    assert export(str(tmp_path / "model"), str(tmp_path / "out"), to="original") == 0.0


def test_where_the_values_go(llm: Path, encoder: Path, tmp_path: Path) -> None:
    state = version_2()
    model, _ = LlamaAdapter.from_original(write(state, tmp_path, True), llm, encoder)
    found = model.trained_state()
    layer = "language_model.model.layers.{}.self_attn"
    table, gates = state["adapter_query.weight"], "llama.layers.{}.attention.gate"
    for index in (1, 2):
        assert torch.equal(found[layer.format(index) + ".prompts.prompt"], table[10 * (index - 1) : 10 * index])
        assert torch.equal(found[layer.format(index) + ".prompts.gate"], state[gates.format(index)].flatten())
    # Meta rotates channels 2i and 2i + 1 of a head together, transformers i and i + d / 2.
    theirs = state["llama.layers.0.attention.wq.bias"].view(HEADS, C // HEADS)
    ours = found[layer.format(0) + ".q_proj.adapter_bias"].view(HEADS, C // HEADS)
    half = C // HEADS // 2
    for channel in range(half):
        assert torch.equal(ours[:, channel], theirs[:, 2 * channel])
        assert torch.equal(ours[:, half + channel], theirs[:, 2 * channel + 1])
    assert torch.equal(found[layer.format(0) + ".o_proj.adapter_bias"], state["llama.layers.0.attention.wo.bias"])


def test_the_gates_activation_is_that_of_the_authors_inference(llm: Path, encoder: Path, tmp_path: Path) -> None:
    path = write(version_1(), tmp_path, False)
    assert LlamaAdapter.from_original(path, llm, encoder)[0].config.gate_activation == "identity"
    trained, _ = LlamaAdapter.from_original(path, llm, encoder, gate_activation="tanh")
    assert trained.config.gate_activation == "tanh"
    path = write(version_2(), tmp_path / "2", True)
    assert LlamaAdapter.from_original(path, llm, encoder)[0].config.gate_activation == "tanh"


def test_convert_and_export(llm: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(version_1(), tmp_path, False)
    names = convert(str(path), str(tmp_path / "model"), str(llm), str(encoder), system="llama_adapter")
    assert f"{len(names)} tensors" in capsys.readouterr().out
    model = open_model(tmp_path / "model")
    assert model.config.gate_activation == "identity"
    trained = str(tmp_path / "trained")
    options: dict[str, Any] = {"system": "llama_adapter", "gate_activation": "tanh", "prompt_length": 20}
    convert(str(path), trained, str(llm), str(encoder), **options)
    config = open_model(trained).config
    assert (config.gate_activation, config.prompt_length, config.prompt_layers) == ("tanh", 20, 1)
    found = {name: p for name, p in model.named_parameters() if ".prompts." in name}
    assert found.keys() == names.keys()
    assert export(str(tmp_path / "model"), str(tmp_path / "out"), to="original") == 0.0
    written, given = read_checkpoint(tmp_path / "out"), read_checkpoint(path)
    assert all(torch.equal(written[name], given[name]) for name in set(names.values()))


def test_safetensors_and_the_early_spelling(llm: Path, encoder: Path, tmp_path: Path) -> None:
    state = version_2()
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({name.replace("llama.", "llma."): tensor for name, tensor in state.items()}, folder / "a.safetensors")
    model, _ = LlamaAdapter.from_original(folder, llm, encoder)
    assert torch.equal(model.trained_state()["connector.query"], state["visual_query.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.1.attention.gate"), r"missing: layers\.1\.attention\.gate"),
        (lambda s: s.update({"layers.3.attention.gate": torch.zeros(1, HEADS, 1, 1)}), r"unexpected: layers\.3\."),
        (lambda s: s.update({"layers.1.attention.gate": torch.zeros(1)}), r"of another shape than \[1, 4, 1, 1\]"),
        (lambda s: s.update({"adapter_query.weight": torch.zeros(20, 9)}), r"is \[20, 9\], not \[2 layers · 10, 48\]"),
        (lambda s: s.update({"adapter_query.weight": torch.zeros(15, C)}), r"is \[15, 48\], not \[1 layers · 10, 48\]"),
        (lambda s: s.pop("adapter_query.weight"), "are not LLaMA-Adapter's"),
        (
            lambda s: s.update({"llama.layers.0.attention.lora_wq_l1.weight": torch.zeros(2, C)}),
            "unexpected: .*lora_wq",
        ),
    ],
)
def test_what_does_not_fit_is_refused(llm: Path, encoder: Path, tmp_path: Path, change: Any, message: str) -> None:
    state = version_1()
    change(state)
    with pytest.raises(ValueError, match=message):
        LlamaAdapter.from_original(write(state, tmp_path, False), llm, encoder)


def test_version_2_of_another_size_is_refused(llm: Path, encoder: Path, tmp_path: Path) -> None:
    state = version_2()
    state["llama.layers.0.feed_forward.w1.bias"] = torch.zeros(FFN + 1)
    with pytest.raises(ValueError, match=r"1 of another shape: language_model\.model\.layers\.0\.mlp\.gate_proj"):
        LlamaAdapter.from_original(write(state, tmp_path, True), llm, encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("llama.layers.2.feed_forward.lora_w2_l2.weight"), r"missing: llama\.layers\.2\..*lora_w2_l2"),
        (lambda s: s.pop("llama.layers.1.attention.new_gate"), r"missing: llama\.layers\.1\.attention\.new_gate"),
        (lambda s: s.update({"llama.layers.1.attention.wk.bias": torch.zeros(C)}), r"unexpected: .*wk\.bias"),
        (
            lambda s: s.update({"llama.layers.1.attention.new_gate": torch.ones(1)}),
            r"of another shape than \[1, 1, 1, 1\]",
        ),
        (
            lambda s: s.update({"llama.layers.1.attention.lora_wv_l1.weight": torch.zeros(RANK + 1, C)}),
            r"1 of another shape: language_model\.model\.layers\.1\.self_attn\.v_proj\.lora_a",
        ),
        (
            lambda s: s.update({"llama.layers.1.attention.lora_wk_l2.weight": torch.zeros(C + 1, RANK)}),
            r"not of heads of 12 channels: llama\.layers\.1\.attention\.lora_wk_l2\.weight",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if "_l1." in name],
            r"unexpected: llama\.layers\.0\.attention\.lora_wk_l2\.weight",
        ),
    ],
)
def test_a_file_with_lora_that_is_not_whole_is_refused(
    llm: Path, encoder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    state = version_2(lora=True)
    change(state)
    with pytest.raises(ValueError, match=message):
        LlamaAdapter.from_original(write(state, tmp_path, True), llm, encoder)


def test_files_that_hold_no_tensors_are_refused(llm: Path, encoder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is not a file of tensors alone"):
        read_checkpoint(broken)
    broken.unlink()
    with pytest.raises(FileNotFoundError, match="holds 0 checkpoint files"):
        LlamaAdapter.from_original(tmp_path, llm, encoder)
    with pytest.raises(ValueError, match="prompt_length is 0; 1 or more is accepted"):
        LlamaAdapter.from_original(write(version_1(), tmp_path / "whole", False), llm, encoder, prompt_length=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LlamaAdapter.from_original(tmp_path / "no.pth", llm, encoder)
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        LlamaAdapter.from_original(tmp_path / "a.pth", llm, encoder)


def test_what_has_no_place_in_the_layout_is_refused(llm: Path, encoder: Path, tmp_path: Path) -> None:
    model = LlamaAdapter.from_parts(llm, encoder)
    model.set_stage(model.stages()["instruct_images"])
    with pytest.raises(ValueError, match=r"cannot hold this model: no place for: connector\.0\.bias"):
        model.to_original(tmp_path)
    with pytest.raises(ValueError, match="no published layout of the version 'v2'"):
        LlamaAdapter.from_parts(llm, encoder, version="v2", visual_width=32).to_original(tmp_path)
    published: dict[str, Any] = {"version": "v2_multimodal_7b", "channel_order": "bgr", "blank_image": True}
    for other in (
        {"channel_order": "rgb"},
        {"blank_image": False},
        {"visual_heads": 4},
        {"gate_activation": "identity"},
    ):
        model = LlamaAdapter.from_parts(llm, encoder, visual_width=32, **{**published, **other})
        with pytest.raises(ValueError, match=f"the model has .*'{next(iter(other))}': .* would compute something else"):
            model.to_original(tmp_path / "out")
    model, _ = LlamaAdapter.from_original(write(version_2(), tmp_path, True), llm, encoder)
    model.add_lora(LoraSpec(2, 4))
    with pytest.raises(ValueError, match="LoRA's alpha is 4 and its rank 2; equal ones are accepted"):
        model.to_original(tmp_path / "out")
    assert not (tmp_path / "out").exists()
