from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._dispatch import Backend, FallbackWarning, backends, plain, untransformed
from logra_kernels.ops._factored import MOST_RANK, factored_dim, rebuild_rows
from logra_kernels.ops._format import FORMATS, EncodedRows, RowFormat
from logra_kernels.ops.accumulate_gram import accumulate_gram
from logra_kernels.ops.dequantize_rows import dequantize_rows
from logra_kernels.ops.factor_rows import factor_rows
from logra_kernels.ops.project_grad import AddProjectGrad, add_project_grad, kept_dtype, project_grad
from logra_kernels.ops.project_rows import ProjectRows, columns_stand_alone, project_rows, row_projector
from logra_kernels.ops.quantize_rows import quantize_rows
from logra_kernels.ops.score_block import QUERY_FORMATS, Scorer, score_block
from logra_kernels.ops.score_factored import score_factored
from logra_kernels.ops.score_topk import TopK, score_topk

__all__ = [
    "FORMATS",
    "MOST_RANK",
    "QUERY_FORMATS",
    "AddProjectGrad",
    "Backend",
    "EncodedRows",
    "FallbackWarning",
    "ProjectRows",
    "RowFormat",
    "Scorer",
    "TopK",
    "accumulate_gram",
    "accumulator_dtype",
    "add_project_grad",
    "backends",
    "columns_stand_alone",
    "dequantize_rows",
    "factor_rows",
    "factored_dim",
    "kept_dtype",
    "plain",
    "project_grad",
    "project_rows",
    "quantize_rows",
    "rebuild_rows",
    "row_projector",
    "score_block",
    "score_factored",
    "score_topk",
    "untransformed",
]
