"""Data: samples, conversation templates, label masks, images, videos, batches and their order."""

from mmfast.data.answer_formats import ANSWER_FORMATS, multiple_choice, with_answer_format
from mmfast.data.anyres import LLAVA_NEXT_PINPOINTS, Anyres, pinpoints_up_to
from mmfast.data.anyres_processor import AnyresProcessor, TiledImage
from mmfast.data.budget import allowed_bad, spent_budget
from mmfast.data.check import check_data, format_report
from mmfast.data.dataset import EncodedDataset, JoinedDataset, SupervisionReport, check_supervision
from mmfast.data.hf_datasets import HfSamples, is_dataset_folder
from mmfast.data.images import image_size, load_image, pad_to_square
from mmfast.data.json_files import JsonSamples, load_samples
from mmfast.data.order import BatchPlan, epoch_order
from mmfast.data.preview import format_sample, write_pictures
from mmfast.data.processor import Encoded, Processor
from mmfast.data.samples import (
    BadSampleError,
    Sample,
    StoredMedium,
    validate_sample,
    with_media_first,
    without_last_answer,
)
from mmfast.data.scienceqa import load_scienceqa
from mmfast.data.tar_files import TarSamples, expand_braces
from mmfast.data.templates import TEMPLATES, ControlPiece, MediaPiece, Piece, Seam, Template, get_template
from mmfast.data.video_processor import VideoProcessor
from mmfast.data.videos import frame_indices, load_video

__all__ = [
    "ANSWER_FORMATS",
    "LLAVA_NEXT_PINPOINTS",
    "TEMPLATES",
    "Anyres",
    "AnyresProcessor",
    "BadSampleError",
    "BatchPlan",
    "ControlPiece",
    "Encoded",
    "EncodedDataset",
    "HfSamples",
    "JoinedDataset",
    "JsonSamples",
    "MediaPiece",
    "Piece",
    "Processor",
    "Sample",
    "Seam",
    "StoredMedium",
    "SupervisionReport",
    "TarSamples",
    "Template",
    "TiledImage",
    "VideoProcessor",
    "allowed_bad",
    "check_data",
    "check_supervision",
    "epoch_order",
    "expand_braces",
    "format_report",
    "format_sample",
    "frame_indices",
    "get_template",
    "image_size",
    "is_dataset_folder",
    "load_image",
    "load_samples",
    "load_scienceqa",
    "load_video",
    "multiple_choice",
    "pad_to_square",
    "pinpoints_up_to",
    "spent_budget",
    "validate_sample",
    "with_answer_format",
    "with_media_first",
    "without_last_answer",
    "write_pictures",
]
