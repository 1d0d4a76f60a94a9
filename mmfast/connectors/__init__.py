"""Trainable bridges from an encoder's features to a language model's embeddings."""

from mmfast.connectors.projector import build_connector
from mmfast.connectors.q_former import VisualQFormer, merge_patches, read_q_former, write_q_former
from mmfast.connectors.visual_prompts import GlobalPrompt, VisualQueries

__all__ = [
    "GlobalPrompt",
    "VisualQFormer",
    "VisualQueries",
    "build_connector",
    "merge_patches",
    "read_q_former",
    "write_q_former",
]
