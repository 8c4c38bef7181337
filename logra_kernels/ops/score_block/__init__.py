from logra_kernels.ops.score_block.op import score_block

__all__ = ["score_block"]
