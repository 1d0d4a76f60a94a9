"""Softmax cross entropy of rows of logits, and its gradient written over them, in Triton."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _linear_cross_entropy_rows_kernel(
    p_logits,  # [rows, vocabulary]: overwritten by the gradient if WRITE_GRADIENT
    p_labels,  # [rows] int64
    p_scale,  # [rows] float32, a factor on each row's gradient; not read unless HAS_SCALE
    p_losses,  # [rows] float32, out
    p_correct,  # [rows] bool, out
    vocabulary,
    smoothing,
    HAS_SCALE: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Grid (rows,): one program owns one row.
    # loss = log Σ exp(x) - x[label] - smoothing · mean(x - x[label]); gradient = scale · ∂loss / ∂x.
    # Traffic: the row is read twice, the second time mostly from L2, and written once.
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * vocabulary
    label = tl.load(p_labels + i_row)
    inside = (label >= 0) & (label < vocabulary)
    # No exception can leave a kernel: a label outside the vocabulary makes loss and gradient NaN.
    target = tl.load(p_row + label, mask=inside, other=float("nan")).to(tl.float32)

    largest = tl.full([], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_above_target = tl.zeros([BLOCK], tl.float32)
    b_beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        o_vocabulary = start + tl.arange(0, BLOCK)
        m_vocabulary = o_vocabulary < vocabulary
        b_x = tl.load(p_row + o_vocabulary, mask=m_vocabulary, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(b_x, 0))
        b_sum = b_sum * tl.exp(largest - new_largest) + tl.exp(b_x - new_largest)
        largest = new_largest
        b_above_target += tl.where(m_vocabulary, b_x - target, 0.0)
        # The label is the argmax if no logit is larger, and none before it as large.
        b_beaten += ((b_x > target) | ((b_x == target) & (o_vocabulary < label))).to(tl.int32)
    total = tl.sum(b_sum, 0)
    loss = (largest - target) + tl.log(total)
    if smoothing > 0:  # a logit of -inf must not make 0 · inf
        loss -= smoothing * tl.sum(b_above_target, 0) / vocabulary
    tl.store(p_losses + i_row, loss)
    tl.store(p_correct + i_row, (tl.sum(b_beaten, 0) == 0) & inside)

    if WRITE_GRADIENT:
        scale = tl.load(p_scale + i_row) if HAS_SCALE else 1.0
        scale = tl.where(inside, scale, float("nan"))
        per_weight = scale / total
        uniform = scale * smoothing / vocabulary
        at_label = scale * (1.0 - smoothing)
        for start in range(0, vocabulary, BLOCK):
            o_vocabulary = start + tl.arange(0, BLOCK)
            m_vocabulary = o_vocabulary < vocabulary
            b_x = tl.load(p_row + o_vocabulary, mask=m_vocabulary, other=float("-inf")).to(tl.float32)
            b_gradient = tl.exp(b_x - largest) * per_weight - uniform
            b_gradient = tl.where(o_vocabulary == label, b_gradient - at_label, b_gradient)
            tl.store(p_row + o_vocabulary, b_gradient.to(p_logits.dtype.element_ty), mask=m_vocabulary)


def launch_config(vocabulary: int) -> dict[str, Any]:
    """How rows of `vocabulary` logits are launched: 8 logits a thread, at most 16 warps."""
    block = min(triton.next_power_of_2(max(vocabulary, 256)), 4096)
    return {"BLOCK": block, "num_warps": block // 256, "num_stages": 3}


def linear_cross_entropy_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | None,
    smoothing: float,
    write_gradient: bool,
    losses: torch.Tensor,
    correct: torch.Tensor,
) -> None:
    """Fills `losses` and `correct`, and overwrites `logits` by their gradient if `write_gradient`.

    Args:
        logits: [rows, vocabulary], contiguous; float32, float16 or bfloat16.
        labels: [rows] int64. One outside the vocabulary makes its loss and gradient NaN.
        scale: [rows] float32, a factor on each row's gradient; None means 1.
        smoothing: label smoothing.
        write_gradient: whether to write the gradient.
        losses: [rows] float32, output.
        correct: [rows] bool, output: whether the label is the first index with the largest logit.
    """
    rows, vocabulary = logits.shape
    _linear_cross_entropy_rows_kernel[(rows,)](
        logits,
        labels,
        losses if scale is None else scale,
        losses,
        correct,
        vocabulary,
        smoothing,
        HAS_SCALE=scale is not None,
        WRITE_GRADIENT=write_gradient,
        **launch_config(vocabulary),
    )


def compile_cases() -> list[dict[str, Any]]:
    """The compiled forms that calls use, for ahead-of-time compilation."""
    cases = []
    for dtype, vocabulary in itertools.product(("fp32", "fp16", "bf16"), (512, 32000)):
        for form, has_scale, write_gradient in (("loss", False, False), ("grad", False, True), ("scaled", True, True)):
            config = launch_config(vocabulary)
            signature = {
                "p_logits": f"*{dtype}",
                "p_labels": "*i64",
                "p_scale": "*fp32",
                "p_losses": "*fp32",
                "p_correct": "*i1",
                "vocabulary": "i32",
                "smoothing": "fp32",
            }
            constexprs = {"HAS_SCALE": has_scale, "WRITE_GRADIENT": write_gradient, "BLOCK": config["BLOCK"]}
            cases.append(
                {
                    "name": f"{form} {dtype} V={vocabulary}",
                    "fn": _linear_cross_entropy_rows_kernel,
                    "signature": signature | dict.fromkeys(constexprs, "constexpr"),
                    "constexprs": constexprs,
                    "num_warps": config["num_warps"],
                    "num_stages": config["num_stages"],
                    "tensor_core": False,
                }
            )
    return cases
