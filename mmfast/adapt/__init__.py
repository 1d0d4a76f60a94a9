"""Put adapters on a model, take them off again, merge them, keep them in a folder; quantise or optimise the base."""

from mmfast.adapt.add import add_bias_scale, add_lora, remove
from mmfast.adapt.bias_scale_checkpoint import bias_scale_state, load_bias_scale
from mmfast.adapt.folder import AdapterReport, load_adapter, save_adapter
from mmfast.adapt.layers import has_adapters, has_lora, lora_parameters
from mmfast.adapt.merge import merge, merged_state_dict
from mmfast.adapt.optimize import OptimizeReport, optimize, restore
from mmfast.adapt.prompt_checkpoint import load_prompts
from mmfast.adapt.prompts import add_prompts, given_prompts
from mmfast.adapt.quantize import QuantizeReport, dequantize, quantize
from mmfast.adapt.quantized_checkpoint import load_quantized, quantize_checkpoint
from mmfast.adapt.recompute import recompute

__all__ = [
    "AdapterReport",
    "OptimizeReport",
    "QuantizeReport",
    "add_bias_scale",
    "add_lora",
    "add_prompts",
    "bias_scale_state",
    "dequantize",
    "given_prompts",
    "has_adapters",
    "has_lora",
    "load_adapter",
    "load_bias_scale",
    "load_prompts",
    "load_quantized",
    "lora_parameters",
    "merge",
    "merged_state_dict",
    "optimize",
    "quantize",
    "quantize_checkpoint",
    "recompute",
    "remove",
    "restore",
    "save_adapter",
]
