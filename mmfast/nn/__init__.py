"""Drop-in modules: each replaces a torch module of the same interface and keeps its state-dict names."""

from mmfast.nn.adapted_linear import AdaptedLinear, MergeDrift
from mmfast.nn.adapter import Adapter
from mmfast.nn.base_linear import BaseLinear
from mmfast.nn.bias_scale_linear import BiasScaleLinear
from mmfast.nn.gated_cross_attention import GatedCrossAttentionBlock
from mmfast.nn.gated_residual import GatedResidual
from mmfast.nn.lora_linear import BiasLoRALinear, LoRALinear, LoRALinearGroup
from mmfast.nn.mixture_adapter import MixtureAdapter
from mmfast.nn.perceiver_resampler import MediaKV, PerceiverResampler
from mmfast.nn.q_former import QFormer
from mmfast.nn.quantized_linear import QuantizedLinear
from mmfast.nn.rms_norm import RMSNorm
from mmfast.nn.spatio_temporal_pool import SpatioTemporalPool
from mmfast.nn.visual_resampler import VisualResampler
from mmfast.nn.zero_init_attention import ZeroInitAttention

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "BaseLinear",
    "BiasLoRALinear",
    "BiasScaleLinear",
    "GatedCrossAttentionBlock",
    "GatedResidual",
    "LoRALinear",
    "LoRALinearGroup",
    "MediaKV",
    "MergeDrift",
    "MixtureAdapter",
    "PerceiverResampler",
    "QFormer",
    "QuantizedLinear",
    "RMSNorm",
    "SpatioTemporalPool",
    "VisualResampler",
    "ZeroInitAttention",
]
