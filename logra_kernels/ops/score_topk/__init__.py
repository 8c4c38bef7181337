from logra_kernels.ops.score_topk.op import score_topk

__all__ = ["score_topk"]
