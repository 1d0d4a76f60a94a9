"""Data: samples, conversation templates, label masks, images, batches and their order."""

from mmfast.data.dataset import EncodedDataset, SupervisionReport, check_supervision
from mmfast.data.images import load_image, pad_to_square
from mmfast.data.order import BatchPlan, epoch_order
from mmfast.data.processor import Encoded, Processor
from mmfast.data.samples import Sample, load_samples, validate_sample, without_last_answer
from mmfast.data.templates import TEMPLATES, ControlPiece, MediaPiece, Piece, Template, get_template

__all__ = [
    "TEMPLATES",
    "BatchPlan",
    "ControlPiece",
    "Encoded",
    "EncodedDataset",
    "MediaPiece",
    "Piece",
    "Processor",
    "Sample",
    "SupervisionReport",
    "Template",
    "check_supervision",
    "epoch_order",
    "get_template",
    "load_image",
    "load_samples",
    "pad_to_square",
    "validate_sample",
    "without_last_answer",
]
