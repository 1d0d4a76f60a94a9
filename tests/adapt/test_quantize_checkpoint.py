"""From file to file: the bits of quantising in memory, for bitsandbytes too; in little memory; all or nothing."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from mmfast.adapt import dequantize, load_quantized, quantize, quantize_checkpoint, quantized_checkpoint
from mmfast.cli import main
from mmfast.nn import QuantizedLinear
from mmfast.nn.quantized_state import Format

KINDS: list[tuple[Format, bool]] = [("nf4", True), ("nf4", False), ("int8", False)]
kinds = pytest.mark.parametrize(("format", "double_quant"), KINDS, ids=["nf4-double", "nf4", "int8"])
IDS = torch.tensor([[1, 5, 7, 9, 11, 2]])


@pytest.fixture(autouse=True)
def portable_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16 instructions bitsandbytes packs weights anew, in bfloat16 and only for rows of whole blocks."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def llama_config(**options: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,  # whole blocks: with AVX-512, bitsandbytes 0.50 dequantises other rows wrongly
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**sizes | options)


def save_llama(folder: Path, shard: str = "5GB", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    LlamaForCausalLM(llama_config(**options)).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def quantised_in_memory(folder: Path, *options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    quantize(model, None, *options)
    return model


def logits(model: Any, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_hold_the_bits_of_quantising_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Format, double_quant: bool, dtype: torch.dtype
) -> None:
    # Several input files, several slices of each weight, several output files.
    source = save_llama(tmp_path / "dense", "60KB", dtype, rope_parameters={"rope_type": "linear", "factor": 2.0})
    monkeypatch.setattr(quantized_checkpoint, "SLICE_ELEMENTS", 1000)
    report = quantize_checkpoint(source, tmp_path / "small", format, double_quant, max_shard_bytes=20_000)
    model, expected = load_quantized(tmp_path / "small"), quantised_in_memory(source, format, double_quant)
    assert report == quantize(
        AutoModelForCausalLM.from_pretrained(source).requires_grad_(False), None, format, double_quant
    )
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(expected))
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # In memory the layers share the table of double quantisation.
    buffers = dict(expected.named_buffers(remove_duplicate=False))
    assert dict(model.named_buffers(remove_duplicate=False)).keys() == buffers.keys()
    assert any("inv_freq" in name for name in buffers)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    for file in files:
        with safe_open(tmp_path / "small" / file, "pt") as opened:
            assert {key for key, name in index["weight_map"].items() if name == file} == set(opened.keys())
        assert (tmp_path / "small" / file).stat().st_size < 25_000
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(tmp_path / "small" / file).values()
    )


@kinds
def test_stock_transformers_opens_the_folder_with_bitsandbytes(
    tmp_path: Path, format: Format, double_quant: bool
) -> None:
    source = save_llama(tmp_path / "dense")
    quantize_checkpoint(source, tmp_path / "small", format, double_quant)
    ours, theirs = load_quantized(tmp_path / "small"), AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    kind = "Linear4bit" if format == "nf4" else "Linear8bitLt"
    converted = {name for name, layer in theirs.named_modules() if type(layer).__name__ == kind}
    assert converted == {name for name, layer in ours.named_modules() if isinstance(layer, QuantizedLinear)}
    exact = logits(ours)
    error = (logits(theirs) - exact).norm() / exact.norm()
    # bitsandbytes' 8-bit product also quantises x.
    assert error < (1e-5 if format == "nf4" else 5e-2)


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_transformers_and_bitsandbytes_wrote_opens_here(tmp_path: Path, double_quant: bool) -> None:
    source = save_llama(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_quantized(tmp_path / "theirs")
    assert torch.equal(logits(ours), logits(quantised_in_memory(source, "nf4", double_quant)))


def test_a_loaded_model_is_saved_again_as_it_was(tmp_path: Path) -> None:
    quantize_checkpoint(save_llama(tmp_path / "dense"), tmp_path / "small")
    model = load_quantized(tmp_path / "small")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(model))
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")).isfinite().all()
    dequantize(model)
    model.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(model), rtol=0, atol=0
    )


def test_a_multimodal_folder_keeps_its_names_encoder_and_projector(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(text_config=llama_config(), vision_config=vision, image_token_index=63)
    dense = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    dense.save_pretrained(tmp_path / "dense")
    layers = quantize(dense).layers
    assert quantize_checkpoint(tmp_path / "dense", tmp_path / "small").layers == layers
    before = load_file(tmp_path / "dense" / "model.safetensors")
    after = load_file(tmp_path / "small" / "model.safetensors")
    # In the file the names are those of an older version, which transformers translates.
    assert before.keys() <= after.keys()
    assert any(key.startswith("language_model.model.layers") for key in before)
    changed = {key for key in before if after[key].dtype != before[key].dtype}
    assert {name.removeprefix("model.language_model") for name in layers} == {
        key.removeprefix("language_model.model").removesuffix(".weight") for key in changed
    }
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - changed)
    inputs = {"ids": torch.tensor([[1, 63, 63, 63, 63, 5]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    ours = load_quantized(tmp_path / "small")
    assert type(ours) is LlavaForConditionalGeneration
    assert torch.equal(logits(ours, **inputs), logits(dense, **inputs))
    written = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert sorted(written["llm_int8_skip_modules"]) == ["lm_head", "model.multi_modal_projector", "model.vision_tower"]
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(theirs, **inputs), logits(ours, **inputs), rtol=1e-4, atol=1e-4)


def test_tied_heads_generation_and_a_cast(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "dense", tie_word_embeddings=True)
    quantize_checkpoint(source, tmp_path / "small")
    model = load_quantized(tmp_path / "small")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    options: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    expected = quantised_in_memory(source)
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    embeds = torch.randn(1, 6, 64, requires_grad=True)
    model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().max() > 0
    half = load_quantized(tmp_path / "small", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.layers[0].mlp.up_proj.weight_absmax.dtype == torch.uint8
    assert half.model.layers[0].mlp.up_proj.weight_nested_absmax.dtype == torch.float32
    assert logits(half).dtype == torch.bfloat16
    assert (logits(half) - logits(model)).norm() / logits(model).norm() < 5e-2


def test_targets_and_small_files(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "dense")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("not copied")
    (source / "pytorch_model.bin.index.json").write_text("not copied")
    (source / "original").mkdir()
    report = quantize_checkpoint(source, tmp_path / "a" / "small", targets=["q_proj"])
    assert report.layers == [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    files = {path.name for path in (tmp_path / "a" / "small").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    ours, theirs = (
        load_quantized(tmp_path / "a" / "small"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "small"),
    )
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


MEASURE = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from mmfast.adapt import dequantize, load_quantized, quantize_checkpoint, quantized_checkpoint

torch.set_num_threads(1)
quantized_checkpoint.SLICE_ELEMENTS = 2**17
warm, source, target = sys.argv[1:]

def memory(name):
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024

def grown(function, *arguments, **options):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    result = function(*arguments, **options)
    print(memory("VmHWM") - before)
    return result

quantize_checkpoint(warm, warm + "-small")
load_quantized(warm + "-small")
load_quantized(warm, format="nf4")
grown(quantize_checkpoint, source, target, max_shard_bytes=2**21)
model = grown(load_quantized, target)
streamed = grown(load_quantized, source, format="nf4")
dense = grown(lambda: [p.clone() for p in AutoModelForCausalLM.from_pretrained(source).parameters()])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux' /proc")
def test_the_dense_model_is_never_in_memory(tmp_path: Path) -> None:
    save_llama(tmp_path / "warm")
    source = save_llama(tmp_path / "dense", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    dense = (source / "model.safetensors").stat().st_size
    arguments = [str(tmp_path / name) for name in ("warm", "dense", "small")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    written, loaded, streamed, control = map(int, done.stdout.split())
    small = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert small < dense / 6
    # An output file, one weight's slice, and what quantising that takes.
    assert written < 0.3 * dense
    assert loaded < small + 0.1 * dense
    assert streamed < small + 0.1 * dense
    # The measurement sees a dense model.
    assert control > 0.9 * dense


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    source = save_llama(tmp_path / "dense")
    written = []

    def fail_second(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        written.append(path)
        if len(written) == 2:
            raise error

    monkeypatch.setattr(quantized_checkpoint, "save_file", fail_second)
    with pytest.raises(type(error)):
        quantize_checkpoint(source, tmp_path / "small", max_shard_bytes=30_000)
    assert len(written) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "dense")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            quantize_checkpoint(source, tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_sources_that_cannot_be_quantised(tmp_path: Path) -> None:
    source, target = save_llama(tmp_path / "dense"), tmp_path / "small"
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        quantize_checkpoint(tmp_path / "nowhere", target)
    with pytest.raises(FileExistsError, match="dense exists; choose a folder that does not"):
        quantize_checkpoint(source, source)
    with pytest.raises(ValueError, match=r"no linear layer is named \['w1'\]"):
        quantize_checkpoint(source, target, targets=["w1"])
    quantize_checkpoint(source, target)
    with pytest.raises(ValueError, match=r"small is quantised already \(bitsandbytes\)"):
        quantize_checkpoint(target, tmp_path / "again")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    file = source / "model.safetensors"
    for value, error, message in (
        (tensors[name].double(), TypeError, r"up_proj cannot be quantised: nf4_quantize: weight is torch\.float64"),
        (tensors[name] / 0, ValueError, r"layers\.1\.mlp\.up_proj cannot be quantised.*infinity or NaN"),
    ):
        save_file(tensors | {name: value}, file)
        with pytest.raises(error, match=message):
            quantize_checkpoint(source, tmp_path / "again")
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match=r"lacks the weights \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        quantize_checkpoint(source, tmp_path / "again")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"model\.safetensors cannot be read .*was the download complete"):
        quantize_checkpoint(source, tmp_path / "again")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        quantize_checkpoint(source, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    source, folder = save_llama(tmp_path / "dense"), tmp_path / "small"
    with pytest.raises(ValueError, match="dense holds no weight in NF4 or int8"):
        load_quantized(source)
    quantize_checkpoint(source, folder)
    tensors = load_file(folder / "model.safetensors")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    for changes, message in (
        ({norm: None}, r"lacks \['model\.norm\.weight'\]"),
        ({norm: torch.zeros(3)}, r"model\.norm\.weight in .* is \[3\]; LlamaForCausalLM expects \[64\]"),
        ({f"{up}.absmax": None}, r"the weight of model\.layers\.1\.mlp\.up_proj .*it has the entries"),
        (
            {f"{up}.absmax": torch.zeros(2)},
            r"up_proj in .*absmax is torch\.float32 \[2\]; expected torch\.uint8 \[128\]",
        ),
        ({"model.norm.SCB": torch.zeros(2)}, r"a quantised model\.norm, which in LlamaForCausalLM is LlamaRMSNorm"),
        ({"model.other.SCB": torch.zeros(2)}, r"a quantised model\.other, which in LlamaForCausalLM is missing"),
    ):
        changed = tensors | changes
        save_file({key: value for key, value in changed.items() if value is not None}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)
    save_file(tensors | {"model.extra.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"has no use for \['model\.extra\.weight'\]"):
        load_quantized(folder)
    index = {"metadata": {}, "weight_map": {up: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"has no model-00001-of-00002\.safetensors"):
        load_quantized(folder)


def test_the_file_may_go_once_it_is_loaded(tmp_path: Path) -> None:
    quantize_checkpoint(save_llama(tmp_path / "dense"), tmp_path / "small")
    model = load_quantized(tmp_path / "small")
    before = logits(model)
    with (tmp_path / "small" / "model.safetensors").open("r+b") as file:
        file.write(bytes(100_000))
    shutil.rmtree(tmp_path / "small")
    assert torch.equal(logits(model), before)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_llama(tmp_path / "dense")
    assert main(["quantize", str(source), str(tmp_path / "a"), "--no-double-quant"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("14 linear layers: 0.00 GiB before")
    assert printed.endswith(f"written to {tmp_path / 'a'}\n")
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is False
    assert main(["quantize", str(source), str(tmp_path / "b"), "--format", "int8"]) == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] is True
    assert main(["quantize", str(source), str(tmp_path / "b")]) == 1
    assert f"{tmp_path / 'b'} exists; choose a folder that does not" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(tmp_path / "c"), "--format", "fp4"])
