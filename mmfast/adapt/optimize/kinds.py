"""Every kind of replacement, in the order in which they are tried."""

from __future__ import annotations

from mmfast.adapt.optimize.lora import LORA
from mmfast.adapt.optimize.loss import LOSS
from mmfast.adapt.optimize.rms_norm import LAYER, NORM
from mmfast.adapt.optimize.rope import ATTENTION
from mmfast.adapt.optimize.swiglu import MLP

KINDS = (LORA, NORM, LAYER, MLP, ATTENTION, LOSS)
BY_NAME = {kind.name: kind for kind in KINDS}
