"""Frozen encoders behind one interface: pixels [n, 3, H, W] in, features [n, P, D] out."""

from mmfast.encoders.clip import ClipEncoder
from mmfast.encoders.clip_states import ClipScales, ClipTokens, ProjectedClipTokens
from mmfast.encoders.eva import EvaEncoder
from mmfast.encoders.frozen import FrozenEncoder

__all__ = ["ClipEncoder", "ClipScales", "ClipTokens", "EvaEncoder", "FrozenEncoder", "ProjectedClipTokens"]
