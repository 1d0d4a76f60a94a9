"""save_adapter and load_adapter against the peft package: the same folder gives the same logits in both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmfast.adapt import (
    add_bias_scale,
    add_lora,
    has_adapters,
    load_adapter,
    lora_parameters,
    merge,
    quantize,
    remove,
    save_adapter,
)
from mmfast.nn import LoRALinear

IDS = torch.tensor([[1, 5, 9, 30, 7], [1, 4, 4, 2, 11]])
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 40, "num_key_value_heads": 2, "tie_word_embeddings": False}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **TEXT, **options})).eval().requires_grad_(False)


def qwen2() -> nn.Module:
    """Has biases on q, k and v; random ones here."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **TEXT)).eval().requires_grad_(False)
    return randomise(model, [name for name, _ in model.named_parameters() if name.endswith("bias")])


def clip() -> nn.Module:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    return CLIPVisionModel(config).eval().requires_grad_(False)


def randomise(model: nn.Module, names: Any = None) -> nn.Module:
    """Gives the named parameters, by default those that train, the change that training gives them."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad if names is None else name in names:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def train(model: nn.Module, *ends: str) -> nn.Module:
    """Parameters whose names have one of these parts require a gradient."""
    for name, parameter in model.named_parameters():
        if any(end in name for end in ends):
            parameter.requires_grad_(True)
    return model


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(base, CLIPVisionModel):
        return model(pixel_values=PIXELS).last_hidden_state
    return model(input_ids=IDS).logits


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).norm() / theirs.norm() < 1e-6


def assert_differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() / b.norm() > 1e-3


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **fields}))


def assert_peft_loads(adapted: nn.Module, base: nn.Module, folder: Path) -> None:
    """Saved from `adapted`, the folder gives its outputs in stock PEFT and, loaded here, the same parameters."""
    expected = output(adapted)
    assert_differ(expected, output(base))
    report = save_adapter(adapted, folder)
    assert report.why_not_peft == ()
    assert report.peft_type == "LORA"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert_same(output(theirs), expected)
    again = copy.deepcopy(base)
    assert load_adapter(again, folder).tensors == report.tensors
    assert torch.equal(output(again), expected)
    assert trained(again) == trained(adapted) == set(report.tensors.values())


def from_peft(base: nn.Module, folder: Path, **options: Any) -> torch.Tensor:
    """An adapter of these options that PEFT saves; the outputs that it gives in PEFT."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options})
    theirs = randomise(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(folder)
    return output(theirs)


# ---- ours in PEFT


@pytest.mark.parametrize(("make", "use_rslora"), [(llama, False), (qwen2, True), (clip, False)])
def test_peft_loads_lora_on_every_linear_layer(make: Any, use_rslora: bool, tmp_path: Path) -> None:
    base = make()
    adapted = copy.deepcopy(base)
    names = add_lora(adapted, rank=3, alpha=7.5, dropout=0.1, use_rslora=use_rslora)
    linears = {name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    assert set(names) == linears
    assert_peft_loads(randomise(adapted), base, tmp_path)
    config = config_of(tmp_path)
    assert config["lora_dropout"] == 0.1
    assert config["target_modules"] == sorted({name.rpartition(".")[2] for name in names})


def test_peft_loads_ranks_and_alphas_that_differ(tmp_path: Path) -> None:
    base = llama()
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["q_proj", "k_proj"], rank=2, alpha=4)
    add_lora(adapted, ["v_proj"], rank=5, alpha=4)
    add_lora(adapted, ["model.layers.0.mlp.up_proj"], rank=3, alpha=1.5)
    add_lora(adapted, ["1.mlp.up_proj"], rank=4, alpha=9)
    assert_peft_loads(randomise(adapted), base, tmp_path)
    config = config_of(tmp_path)
    assert config["r"] == 2
    assert config["rank_pattern"] == {
        "v_proj": 5,
        r"^model\.layers\.0\.mlp\.up_proj": 3,
        r"^model\.layers\.1\.mlp\.up_proj": 4,
    }
    assert config["alpha_pattern"].keys() == config["rank_pattern"].keys() - {"v_proj"}


def test_peft_loads_layers_that_only_full_names_tell(tmp_path: Path) -> None:
    base = llama()
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["layers.1.self_attn.q_proj"], rank=2, alpha=4)
    assert_peft_loads(randomise(adapted), base, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["model.layers.1.self_attn.q_proj"]


class Nested(nn.Module):
    """The name of one layer is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["norm"](self.inner["proj"](self.norm(self.proj(x))))


def test_peft_loads_a_layer_whose_name_is_the_end_of_another(tmp_path: Path) -> None:
    base = Nested().requires_grad_(False)
    adapted = copy.deepcopy(base)
    adapted.proj = LoRALinear.from_linear(adapted.proj, 2, 4)
    randomise(adapted)
    assert save_adapter(adapted, tmp_path).peft_type == "LORA"
    assert config_of(tmp_path)["target_modules"] == "proj"
    x = torch.randn(3, 4)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(x), adapted(x))
    assert_same(theirs(x), adapted(x))


def test_names_that_mean_too_much_to_peft_make_our_own_format(tmp_path: Path) -> None:
    base = Nested().requires_grad_(False)
    adapted = copy.deepcopy(base)
    adapted.norm.requires_grad_(True)
    randomise(adapted)
    report = save_adapter(adapted, tmp_path)
    assert report.why_not_peft == ("no names of modules_to_save mean just ['norm']",)
    load_adapter(base, tmp_path)
    assert torch.equal(base.norm.weight, adapted.norm.weight)
    assert trained(base) == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("parts", "saved"),
    [
        (["norm"], ["input_layernorm", "norm", "post_attention_layernorm"]),
        (["layers.0.input_layernorm"], ["model.layers.0.input_layernorm"]),
        (["lm_head", "embed_tokens"], ["embed_tokens", "lm_head"]),
    ],
)
def test_peft_loads_modules_that_trained_as_a_whole(parts: list[str], saved: list[str], tmp_path: Path) -> None:
    base = llama()
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["q_proj"], rank=2, alpha=4)
    assert_peft_loads(randomise(train(adapted, *parts)), base, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == saved


def test_norms_alone_need_no_lora(tmp_path: Path) -> None:
    base = llama()
    assert_peft_loads(randomise(train(copy.deepcopy(base), "norm")), base, tmp_path)


@pytest.mark.parametrize(("make", "parts"), [(qwen2, ["q_proj.bias", "v_proj.bias"]), (clip, ["bias"])])
@pytest.mark.parametrize("lora", [True, False])
def test_peft_loads_trained_biases(make: Any, parts: list[str], lora: bool, tmp_path: Path) -> None:
    base = make()
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["q_proj", "v_proj"], rank=2, alpha=4)
    if not lora:
        remove(adapted)
        parts = ["bias"]
    assert_peft_loads(randomise(train(adapted, *parts)), base, tmp_path)
    assert config_of(tmp_path)["bias"] == ("lora_only" if make is qwen2 and lora else "all")


def test_tied_embeddings_are_saved_under_both_names(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["q_proj"], rank=2, alpha=4)
    randomise(train(adapted, "embed_tokens"))
    expected = output(adapted)
    assert save_adapter(adapted, tmp_path).peft_type == "LORA"
    assert_same(output(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), expected)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), expected)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    state = load_file(tmp_path / "adapter_model.safetensors")
    state["base_model.model.lm_head.weight"] += 1
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"ties model.embed_tokens.weight and lm_head.weight.*different values"):
        load_adapter(copy.deepcopy(base), tmp_path)
    del state["base_model.model.lm_head.weight"]
    save_file(state, tmp_path / "adapter_model.safetensors")
    edit(tmp_path, modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="of which only the first is given"):
        load_adapter(copy.deepcopy(base), tmp_path)


def test_frozen_weights_are_not_in_the_folder(tmp_path: Path) -> None:
    adapted = llama()
    add_lora(adapted, ["q_proj"], rank=2, alpha=4)
    save_adapter(adapted, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    layers = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert set(state) == {f"{layer}.lora_{which}.weight" for layer in layers for which in "AB"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


# ---- PEFT's here


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.3},
        {"rank_pattern": {"q_proj": 2, "v_proj": 7}, "alpha_pattern": {"0.self_attn.q_proj": 3}},
        {"rank_pattern": {r"^model\.layers\.1\..*": 2, "_proj": 3, "q_proj": 5}, "use_rslora": True},
        {"target_modules": r"model\.layers\.\d\.(self_attn\.k_proj|mlp\..*_proj)"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": 0},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["norm", "embed_tokens"]},
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_ours_loads_what_peft_saved(options: dict[str, Any], tmp_path: Path) -> None:
    base = qwen2()
    expected = from_peft(base, tmp_path, **options)
    assert_differ(expected, output(base))
    report = load_adapter(base, tmp_path)
    assert report.peft_type == "LORA"
    assert set(report.tensors) <= set(load_file(tmp_path / "adapter_model.safetensors"))
    assert trained(base) == set(report.tensors.values())
    assert_same(output(base), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "fc1"], "bias": "all", "modules_to_save": ["post_layernorm"]},
        {"target_modules": "all-linear", "use_rslora": True, "modules_to_save": ["embeddings"]},
    ],
)
def test_ours_loads_a_vision_tower_that_peft_saved(options: dict[str, Any], tmp_path: Path) -> None:
    base = clip()
    expected = from_peft(base, tmp_path, **options)
    load_adapter(base, tmp_path)
    assert_same(output(base), expected)


def test_a_classifier_that_peft_saved_has_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **TEXT, num_labels=3, pad_token_id=0)
    base = LlamaForSequenceClassification(config).eval().requires_grad_(False)
    expected = from_peft(base, tmp_path, task_type="SEQ_CLS")
    assert config_of(tmp_path)["modules_to_save"] == ["classifier", "score"]
    assert "score.weight" in load_adapter(base, tmp_path).tensors.values()
    assert_same(output(base), expected)


def test_lora_is_float32_on_a_bfloat16_model_and_the_rest_keeps_its_dtype(tmp_path: Path) -> None:
    base = llama().to(torch.bfloat16)
    expected = from_peft(base, tmp_path / "theirs", modules_to_save=["norm"])
    load_adapter(base, tmp_path / "theirs")
    assert (output(base) - expected).float().norm() / expected.float().norm() < 1e-2
    save_adapter(base, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in stored.items() if "lora_" in key} == {torch.float32}
    assert {tensor.dtype for key, tensor in stored.items() if "norm" in key} == {torch.bfloat16}


def test_peft_saves_again_what_ours_saved(tmp_path: Path) -> None:
    base = qwen2()
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["q_proj", "up_proj"], rank=2, alpha=4)
    add_lora(adapted, ["v_proj"], rank=3, alpha=5)
    randomise(train(adapted, "norm"))
    save_adapter(adapted, tmp_path / "ours")
    peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    load_adapter(base, tmp_path / "theirs")
    assert torch.equal(output(base), output(adapted))


def test_embeddings_that_peft_saved_unasked_are_loaded(tmp_path: Path) -> None:
    base = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    randomise(theirs, [name for name, _ in theirs.named_parameters() if "lm_head" in name or "lora" in name])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    report = load_adapter(base, tmp_path)
    assert "lm_head.weight" in report.tensors.values()
    assert_same(output(base), output(theirs.eval()))


def test_a_pickled_adapter_is_read_for_tensors_only(tmp_path: Path) -> None:
    base = llama()
    expected = from_peft(base, tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    load_adapter(base, tmp_path)
    assert_same(output(base), expected)
    torch.save({"base_model.model.x": Path("x")}, tmp_path / "adapter_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_adapter(llama(), tmp_path)


def test_base_model_and_revision_are_kept(tmp_path: Path) -> None:
    model = llama()
    add_lora(model, ["q_proj"], rank=2, alpha=4)
    model.name_or_path = "someone/llama"
    model.config._commit_hash = "abc"
    assert save_adapter(model, tmp_path)[-2:] == ("someone/llama", "abc")
    assert load_adapter(llama(), tmp_path)[-2:] == ("someone/llama", "abc")
    assert peft.PeftConfig.from_pretrained(tmp_path).revision == "abc"
    assert save_adapter(model, tmp_path, base_model="other")[-2:] == ("other", None)


# ---- our own format


def test_bias_scale_is_saved_in_our_own_format_that_peft_refuses_by_name(tmp_path: Path) -> None:
    base = qwen2()
    adapted = copy.deepcopy(base)
    add_bias_scale(adapted, ["q_proj", "down_proj"], "output")
    add_bias_scale(adapted, ["v_proj"], "input")
    add_bias_scale(adapted, ["k_proj", "o_proj"], "none")
    add_lora(adapted, ["up_proj", "o_proj"], rank=2, alpha=3, dropout=0.1, use_rslora=True)
    randomise(train(adapted, "norm", "adapter"))
    report = save_adapter(adapted, tmp_path)
    assert report.peft_type == "MMFAST"
    assert report.why_not_peft == (
        "model.layers.0.self_attn.q_proj has a bias-scale adapter",
        "model.layers.0.self_attn.o_proj has a trained bias beside LoRA",
    )
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path) == report
    assert repr(again) == repr(adapted)
    assert torch.equal(output(again), output(adapted))
    assert trained(again) == trained(adapted)
    with pytest.raises(KeyError, match="MMFAST"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_what_peft_has_no_words_for_is_saved_all_the_same(tmp_path: Path) -> None:
    base = llama()
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["q_proj"], rank=2, alpha=3, dropout=0.1)
    add_lora(adapted, ["v_proj"], rank=2, alpha=3, use_rslora=True)
    randomise(train(adapted, "0.self_attn.q_proj.weight"))
    report = save_adapter(adapted, tmp_path)
    assert report.why_not_peft == (
        "the LoRA layers differ in dropout: [0.0, 0.1]",
        "the LoRA layers differ in use_rslora: [False, True]",
        "model.layers.0.self_attn.q_proj.weight is trained in a module that is not trained as a whole",
    )
    load_adapter(base, tmp_path)
    assert repr(base) == repr(adapted)
    assert torch.equal(output(base), output(adapted))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_layer_used_twice_is_one_layer_again(tmp_path: Path) -> None:
    base = Twice().requires_grad_(False)
    adapted = copy.deepcopy(base)
    add_lora(adapted, ["first", "second"], rank=2, alpha=3)
    randomise(adapted)
    assert save_adapter(adapted, tmp_path).why_not_peft == ("a layer with LoRA is used under several names",)
    load_adapter(base, tmp_path)
    x = torch.randn(2, 4)
    assert base.first is base.second
    assert torch.equal(base(x), adapted(x))


def test_running_statistics_of_a_trained_module_are_saved(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)

    adapted, base = make(), make()
    base.load_state_dict(adapted.state_dict())
    add_lora(adapted, ["0"], rank=2, alpha=3)
    adapted[1].requires_grad_(True)
    adapted[1].running_mean += 3
    x = torch.randn(2, 4)
    assert save_adapter(adapted, tmp_path).peft_type == "LORA"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(x), adapted(x))
    assert_same(theirs(x), adapted(x))


def test_a_quantised_base_gets_the_adapter_of_a_dense_one(tmp_path: Path) -> None:
    adapted = llama()
    quantize(adapted, format="int8")
    add_lora(adapted, ["q_proj", "up_proj"], rank=2, alpha=4)
    randomise(adapted)
    assert save_adapter(adapted, tmp_path).peft_type == "LORA"
    again = llama()
    quantize(again, format="int8")
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(adapted))
    expected = output(again)
    merge(again)
    assert (output(again) - expected).norm() / expected.norm() < 1e-5


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"the tensor .*lora_embedding_A"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base's weights"),
        ({"lora_bias": True}, "lora_bias=True"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = llama()
    from_peft(base, tmp_path, **options)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=message):
        load_adapter(base, tmp_path)
    assert not has_adapters(base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_other_methods_and_transposed_weights_are_refused_by_name(tmp_path: Path) -> None:
    base = llama()
    config = peft.LoHaConfig(target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type 'LOHA'; 'LORA' and 'MMFAST' are accepted"):
        load_adapter(base, tmp_path)
    from_peft(base, tmp_path)
    edit(tmp_path, fan_in_fan_out=True)
    with pytest.raises(ValueError, match="fan_in_fan_out=True"):
        load_adapter(base, tmp_path)
    edit(tmp_path, fan_in_fan_out=False, something_new={"a": 1})
    with pytest.raises(ValueError, match="something_new="):
        load_adapter(base, tmp_path)


def test_all_that_does_not_fit_is_listed_and_nothing_changed(tmp_path: Path) -> None:
    base = llama()
    from_peft(base, tmp_path, modules_to_save=["norm"], rank_pattern={"v_proj": 3})
    state = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn"
    del state[f"{layer}.q_proj.lora_B.weight"], state["base_model.model.model.norm.weight"]
    state[f"{layer}.o_proj.weight"] = torch.zeros(32, 32)
    state[f"{layer}.k_proj.lora_A.weight"] = torch.zeros(4, 32)
    state[f"{layer}.v_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(state, tmp_path / "adapter_model.safetensors")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="it does not fit this LlamaForCausalLM") as caught:
        load_adapter(base, tmp_path)
    for problem in (
        f"missing: {layer}.q_proj.lora_B.weight",
        "missing: base_model.model.model.norm.weight",
        f"unexpected: {layer}.o_proj.weight",
        "unexpected: LoRA of model.layers.0.self_attn.k_proj",
        f"{layer}.v_proj.lora_A.weight is [4, 32] but model.layers.0.self_attn.v_proj.lora_a is [3, 32]",
    ):
        assert problem in str(caught.value)
    assert repr(base) == repr(llama())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert trained(base) == set()


@pytest.mark.parametrize("own", [False, True])
def test_an_adapter_for_another_model_is_refused(own: bool, tmp_path: Path) -> None:
    adapted = llama()
    add_lora(adapted, ["q_proj"], rank=2, alpha=4)
    if own:
        add_bias_scale(adapted, ["up_proj"])
    save_adapter(adapted, tmp_path)
    with pytest.raises(ValueError, match=r"lora_(A\.weight|a) is \[2, 32\] but .*lora_a is \[2, 64\]"):
        load_adapter(llama(hidden_size=64), tmp_path)
    with pytest.raises(ValueError, match=r"no layer model\.layers\.0\.self_attn\.q_proj"):
        load_adapter(clip(), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name, tensor = state.popitem()
    save_file({**state, "stray": tensor}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"unexpected: stray.*missing: {name}|missing: {name}.*unexpected: stray"):
        load_adapter(llama(), tmp_path)


def test_lora_on_a_convolution_is_refused(tmp_path: Path) -> None:
    base = clip()
    from_peft(base, tmp_path, target_modules=["q_proj", "patch_embedding"])
    with pytest.raises(ValueError, match=r"patch_embedding is a Conv2d; a torch\.nn\.Linear is accepted"):
        load_adapter(base, tmp_path)
    assert not has_adapters(base)


def test_a_head_tied_to_the_embedding_is_no_place_for_lora(tmp_path: Path) -> None:
    adapted = llama()
    add_lora(adapted, ["lm_head"], rank=2, alpha=4)
    save_adapter(adapted, tmp_path)
    with pytest.raises(ValueError, match=r"weight of lm_head is tied to model\.embed_tokens"):
        load_adapter(llama(tie_word_embeddings=True), tmp_path)


def test_states_that_cannot_be_saved_or_loaded_into(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match="no adapter and no parameter that requires a gradient"):
        save_adapter(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(model, tmp_path)
    add_lora(model, ["q_proj"], rank=2, alpha=4)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the model has adapters already"):
        load_adapter(model, tmp_path)
    model.model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(ValueError, match="q_proj is merged"):
        save_adapter(model, tmp_path)
    model = llama()
    add_bias_scale(model, ["q_proj"])
    save_adapter(model, tmp_path)
    edit(tmp_path, format=2)
    with pytest.raises(ValueError, match="format 2; this release reads format 1"):
        load_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(model.to("meta"), tmp_path)


def test_a_failed_write_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    add_lora(model, ["q_proj"], rank=2, alpha=4)
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomise(model)

    def fail(state: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mmfast.adapt.folder.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(lora_parameters(model)) == 4
