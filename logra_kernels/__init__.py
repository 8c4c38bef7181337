"""Fused kernels for gradient-projection data attribution."""

from logra_kernels.curvature import Damping
from logra_kernels.distributed import DistributedRun
from logra_kernels.errors import LograError, StoreError, StoreMismatch
from logra_kernels.nn import Taps, capture
from logra_kernels.ops import (
    EncodedRows,
    RowFormat,
    accumulate_gram,
    backends,
    dequantize_rows,
    factor_rows,
    project_grad,
    project_rows,
    quantize_rows,
    rebuild_rows,
    score_block,
    score_factored,
    score_topk,
)
from logra_kernels.plan import plan, probe
from logra_kernels.projection import Projection
from logra_kernels.run import Query, Run
from logra_kernels.session import ensemble, tracin
from logra_kernels.store import GradientStore

__all__ = [
    "Damping",
    "DistributedRun",
    "EncodedRows",
    "GradientStore",
    "LograError",
    "Projection",
    "Query",
    "RowFormat",
    "Run",
    "StoreError",
    "StoreMismatch",
    "Taps",
    "accumulate_gram",
    "backends",
    "capture",
    "dequantize_rows",
    "ensemble",
    "factor_rows",
    "plan",
    "probe",
    "project_grad",
    "project_rows",
    "quantize_rows",
    "rebuild_rows",
    "score_block",
    "score_factored",
    "score_topk",
    "tracin",
]
__version__ = "0.1.0"
