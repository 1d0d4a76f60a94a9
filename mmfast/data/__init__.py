"""Data: samples, conversation templates, label masks, images, videos, batches and their order."""

from mmfast.data.answer_formats import ANSWER_FORMATS, multiple_choice, with_answer_format
from mmfast.data.anyres import LLAVA_NEXT_PINPOINTS, Anyres, pinpoints_up_to
from mmfast.data.anyres_processor import AnyresProcessor, TiledImage
from mmfast.data.dataset import EncodedDataset, JoinedDataset, SupervisionReport, check_supervision
from mmfast.data.images import image_size, load_image, pad_to_square
from mmfast.data.order import BatchPlan, epoch_order
from mmfast.data.processor import Encoded, Processor
from mmfast.data.samples import Sample, load_samples, validate_sample, with_media_first, without_last_answer
from mmfast.data.scienceqa import load_scienceqa
from mmfast.data.templates import TEMPLATES, ControlPiece, MediaPiece, Piece, Seam, Template, get_template
from mmfast.data.video_processor import VideoProcessor
from mmfast.data.videos import frame_indices, load_video

__all__ = [
    "ANSWER_FORMATS",
    "LLAVA_NEXT_PINPOINTS",
    "TEMPLATES",
    "Anyres",
    "AnyresProcessor",
    "BatchPlan",
    "ControlPiece",
    "Encoded",
    "EncodedDataset",
    "JoinedDataset",
    "MediaPiece",
    "Piece",
    "Processor",
    "Sample",
    "Seam",
    "SupervisionReport",
    "Template",
    "TiledImage",
    "VideoProcessor",
    "check_supervision",
    "epoch_order",
    "frame_indices",
    "get_template",
    "image_size",
    "load_image",
    "load_samples",
    "load_scienceqa",
    "load_video",
    "multiple_choice",
    "pad_to_square",
    "pinpoints_up_to",
    "validate_sample",
    "with_answer_format",
    "with_media_first",
    "without_last_answer",
]
