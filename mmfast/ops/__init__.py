"""Ops: one definition each in plain PyTorch, the same on every backend, forward and backward."""

from mmfast.ops.backends import BackendUnavailable, explain, use_backend
from mmfast.ops.bias_scale_linear import bias_scale_linear
from mmfast.ops.gated_cross_attention import gated_cross_attention, text_times
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.int8 import Int8Weight, int8_dequantize, int8_linear, int8_quantize
from mmfast.ops.linear_cross_entropy import linear_cross_entropy
from mmfast.ops.lora_linear import lora_linear, lora_linear_group
from mmfast.ops.mixture_adapter import mixture_adapter
from mmfast.ops.nf4 import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize
from mmfast.ops.resampler_attention import resampler_attention
from mmfast.ops.rms_norm import rms_norm
from mmfast.ops.rope import rope
from mmfast.ops.spatio_temporal_pool import spatio_temporal_pool
from mmfast.ops.swiglu import swiglu
from mmfast.ops.zero_init_attention import zero_init_attention

__all__ = [
    "BackendUnavailable",
    "Int8Weight",
    "NF4Weight",
    "bias_scale_linear",
    "explain",
    "gated_cross_attention",
    "gated_residual",
    "int8_dequantize",
    "int8_linear",
    "int8_quantize",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
    "mixture_adapter",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "resampler_attention",
    "rms_norm",
    "rope",
    "spatio_temporal_pool",
    "swiglu",
    "text_times",
    "use_backend",
    "zero_init_attention",
]
