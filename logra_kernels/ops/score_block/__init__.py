from logra_kernels.ops.score_block.op import QUERY_FORMATS, score_block
from logra_kernels.ops.score_block.scorer import Scorer

__all__ = ["QUERY_FORMATS", "Scorer", "score_block"]
