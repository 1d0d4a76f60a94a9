"""Training steps of Hugging Face with PEFT, with Liger, and of mmfast: time, tokens a second, memory; loss curves.

A step is forward, backward and AdamW, under autocast where the base is bfloat16. The models of a case share their
frozen weights, and the gradients of all agree before anything is timed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

import mmfast
from mmfast.benchmarks import harness

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Case(NamedTuple):
    """A model of `layers` × `hidden` and a batch in which a quarter of the tokens is labelled.

    Attributes:
        rank: Of the LoRA on all linear layers; 0 trains LLaVA's connector alone.
        image_size: Of CLIP with patches of 14 pixels; 0 is the language model alone.
        vision: Its layers and width.
        nf4: Whether the linear layers of the language model are in NF4.
    """

    batch: int
    length: int
    hidden: int
    layers: int
    dtype: torch.dtype
    rank: int = 16
    image_size: int = 0
    vision: tuple[int, int] = (2, 128)
    nf4: bool = False
    vocabulary: int = 32000

    def __str__(self) -> str:
        trained = f"LoRA r={self.rank}" if self.rank else "connector"
        base = str(self.dtype).removeprefix("torch.") + " in NF4" * self.nf4
        return f"{trained} {self.batch}x{self.length} tokens {self.layers}x{self.hidden} {base}"

    @property
    def image_tokens(self) -> int:
        return (self.image_size // 14) ** 2

    def base(self, device: str) -> nn.Module:
        """The frozen model, with the same random weights at each call."""
        torch.manual_seed(0)
        text = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=11008 if self.hidden == 4096 else self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=min(self.hidden // 64, 32),
            num_key_value_heads=min(self.hidden // 64, 32),
            use_cache=False,
            pad_token_id=0,
        )
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(device):
                model = self._llava(text) if self.image_size else LlamaForCausalLM(text)
        finally:
            torch.set_default_dtype(torch.float32)
        return model.requires_grad_(False).train()

    def _llava(self, text: LlamaConfig) -> nn.Module:
        layers, width = self.vision
        vision = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            image_size=self.image_size,
            patch_size=14,
        )
        return LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=vision, image_token_index=self.vocabulary - 1)
        )

    def inputs(self, device: str, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.vocabulary - 1, (self.batch, self.length), generator=generator)
        labels = ids.clone()
        labels[:, : self.length - self.length // 4] = -100
        ids[:, 1 : 1 + self.image_tokens] = self.vocabulary - 1
        batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        if self.image_size:
            pixels = torch.randn(self.batch, 3, self.image_size, self.image_size, generator=generator)
            batch["pixel_values"] = pixels.to(self.dtype)
        return {name: value.to(device) for name, value in batch.items()}


CPU = [
    *(Case(1, 512, 512, 4, dtype) for dtype in (torch.float32, torch.bfloat16)),
    Case(1, 512, 512, 4, torch.float32, nf4=True),
    Case(1, 512, 512, 4, torch.float32, rank=0, image_size=112, nf4=True),
]
LLAVA_7B: dict[str, Any] = {"image_size": 336, "vision": (24, 1024)}
CUDA = [
    Case(8, 2048, 4096, 32, torch.bfloat16, rank=128, **LLAVA_7B),
    Case(8, 2048, 4096, 32, torch.bfloat16, rank=0, nf4=True, **LLAVA_7B),
    Case(8, 2048, 4096, 32, torch.bfloat16, rank=16, nf4=True, **LLAVA_7B),
]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the language model by name; those of the vision tower are named alike."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS) and "vision" not in name
    }


def hugging_face(case: Case, device: str) -> nn.Module:
    """PEFT's LoRA, on bitsandbytes' layers where the base is in NF4; or a base of which the connector trains."""
    model: Any = case.base(device)
    if case.nf4:
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, linear in linears(model).items():
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=case.dtype)
            layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            model.set_submodule(name, layer.to(device))
        model.is_loaded_in_4bit = True
    if not case.rank:
        return _train_connector(model)
    targets = list(linears(model))
    lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, lora)


def _train_connector(model: Any) -> nn.Module:
    # Trained weights are float32; autocast casts them.
    model.model.multi_modal_projector.float().requires_grad_(True)
    return model


def ours(case: Case, device: str, theirs: Any) -> nn.Module:
    """Their model optimised; in NF4 the layers and the LoRA of mmfast with the weights of theirs."""
    if not case.nf4:
        model = sharing(theirs)
    else:
        model = case.base(device)
        mmfast.adapt.quantize(model)
        if case.rank:
            with tempfile.TemporaryDirectory() as folder:
                theirs.save_pretrained(folder)
                mmfast.adapt.load_adapter(model, folder)
        else:
            _train_connector(model)
    mmfast.optimize(model)
    return model


def sharing(model: nn.Module) -> nn.Module:
    """A copy that shares what is frozen."""
    frozen = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers()) if not tensor.requires_grad}
    return copy.deepcopy(model, frozen)


def checkpointing(model: Any) -> nn.Module:
    """The model with every decoder layer recomputed in backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def liger(model: Any) -> nn.Module:
    """The model with Liger's forwards; its rotary function is put in place by `ligers_rope` for each step."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_llava

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_llava = isinstance(base, LlavaForConditionalGeneration)
    with kept_modelling_file():
        (apply_liger_kernel_to_llava if is_llava else apply_liger_kernel_to_llama)(model=base, rope=False)
    return model


@contextmanager
def ligers_rope() -> Iterator[None]:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    with kept_modelling_file():
        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
        yield


@contextmanager
def kept_modelling_file() -> Iterator[None]:
    """Undoes what Liger replaces in transformers' file for all models of the process."""
    before = dict(vars(modeling_llama))
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


class Training:
    """A model, its optimiser, and what a step runs within."""

    def __init__(
        self,
        model: nn.Module,
        case: Case,
        device: str,
        around: Callable[[], Any] = nullcontext,
        learning_rate: float = 1e-4,
    ) -> None:
        self.model, self.around = model, around
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=case.dtype == torch.bfloat16)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate)

    def step(self, batch: dict[str, Tensor], update: bool = True) -> Tensor:
        """The loss of one step; without `update` the gradients stay, and the weights too."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.around():
            with self.autocast():
                loss = self.model(**batch).loss
            loss.backward()
        if update:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def gradient(self, batch: dict[str, Tensor]) -> tuple[Tensor]:
        """That of all trained weights, one after the other."""
        self.step(batch, update=False)
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.trained if parameter.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return (gradient,)

    def resident(self) -> int:
        """Bytes of weights and optimiser states."""
        states = chain.from_iterable(state.values() for state in self.optimizer.state.values())
        tensors = chain(self.model.parameters(), self.model.buffers(), filter(torch.is_tensor, states))
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def trainings(case: Case, device: str) -> dict[str, Training]:
    """All providers of a case, the baseline first. A further one, as a policy of kept activations, is a line here."""
    theirs = hugging_face(case, device)
    optimised = ours(case, device, theirs)
    models = {
        "hf_peft": theirs,
        "hf_peft_checkpointing": checkpointing(sharing(theirs)),
        "mmfast": optimised,
        "mmfast_checkpointing": checkpointing(sharing(optimised)),
    }
    found = {name: Training(model, case, device) for name, model in models.items()}
    if device == "cuda":
        models = {"liger": liger(sharing(theirs)), "liger_checkpointing": checkpointing(liger(sharing(theirs)))}
        found |= {name: Training(model, case, device, ligers_rope) for name, model in models.items()}
    return found


def fits(run: harness.Provider) -> bool:
    """Whether the GPU has the memory for it."""
    try:
        run()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def rows_of(case: Case, settings: harness.Settings) -> list[harness.Row]:
    """One row for each provider; the ratio is to the first one that fits."""
    batch = case.inputs(settings.device)
    everyone = trainings(case, settings.device)
    fitting = {name: training for name, training in everyone.items() if fits(partial(training.gradient, batch))}
    first = next(iter(fitting))
    expected = fitting[first].gradient(batch)
    for name, training in fitting.items():
        harness.gate(name, training.gradient(batch), expected, 1e-4 if case.dtype == torch.float32 else 5e-2, str(case))
    # The first update makes the optimiser's states.
    fitting = {name: training for name, training in fitting.items() if fits(partial(training.step, batch))}
    timings = harness.measure(
        {name: partial(training.step, batch) for name, training in fitting.items()},
        settings.device,
        # A step of 7B takes a second.
        min(settings.rounds, 5) if settings.device == "cuda" else settings.rounds,
        warmup=2,
    )
    rows: list[harness.Row] = []
    for name, training in everyone.items():
        row = {"case": str(case), "provider": name, "kind": harness.kind_by_name(name, first)}
        if name in fitting:
            timing = timings[name]
            peak = harness.peak_extra_bytes(partial(training.step, batch), settings.device)
            row |= timing | {
                "tokens/s": round(case.batch * case.length * 1e3 / timing["ms"]),
                "peak MiB": round(peak / 2**20, 1),
                "resident MiB": round(training.resident() / 2**20, 1),
            }
        else:
            row["out of memory"] = True
        rows.append(row)
    return rows


def loss_curves(device: str, steps: int = 200) -> list[harness.Row]:
    """Whether both sides learn alike: the largest difference to hf_peft's loss over some steps on 16 batches.

    The measure for it is how far hf_peft's own losses go when its weights differ by a rounding error at the start.
    """
    case = Case(4, 64, 128, 2, torch.float32, vocabulary=512)
    batches = [case.inputs(device, seed) for seed in range(16)]
    theirs = hugging_face(case, device)
    models = {"hf_peft": sharing(theirs), "hf_peft rounded": sharing(theirs), "mmfast": ours(case, device, theirs)}
    with torch.no_grad():
        for parameter in models["hf_peft rounded"].parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
    curves = {}
    for name, model in models.items():
        training = Training(model, case, device, learning_rate=1e-3)
        curves[name] = torch.stack([training.step(batches[index % len(batches)]) for index in range(steps)])
    return [
        {
            "case": f"loss of {steps} steps, {case}",
            "provider": name,
            "first": round(curve[0].item(), 4),
            "last": round(curve[-1].item(), 4),
            "max difference": (curve - curves["hf_peft"]).abs().max().item(),
        }
        for name, curve in curves.items()
    ]


def rows(settings: harness.Settings) -> list[harness.Row]:
    cases = (CUDA if settings.device == "cuda" else CPU)[: 1 if settings.quick else None]
    return [row for case in cases for row in rows_of(case, settings)] + loss_curves(settings.device)
