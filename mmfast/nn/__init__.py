"""Drop-in modules: each replaces a torch module of the same interface and keeps its state-dict names."""

from mmfast.nn.lora_linear import LoRALinear

__all__ = ["LoRALinear"]
