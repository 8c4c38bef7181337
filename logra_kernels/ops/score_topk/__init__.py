from logra_kernels.ops.score_topk.op import score_topk
from logra_kernels.ops.score_topk.search import TopK, merge

__all__ = ["TopK", "merge", "score_topk"]
