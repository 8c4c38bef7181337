from logra_kernels.ops.score_block.op import QUERY_FORMATS, score_block

__all__ = ["QUERY_FORMATS", "score_block"]
