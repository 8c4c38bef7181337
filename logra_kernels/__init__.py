"""Fused kernels for gradient-projection data attribution."""

from logra_kernels.ops import (
    accumulate_gram,
    backends,
    project_grad,
    project_rows,
    score_block,
    score_topk,
)

__all__ = ["accumulate_gram", "backends", "project_grad", "project_rows", "score_block", "score_topk"]
__version__ = "0.1.0"
