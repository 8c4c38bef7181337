from logra_kernels.ops.score_topk.op import score_topk
from logra_kernels.ops.score_topk.search import Ranked, RowBlocks, TopK, merge, nothing

__all__ = ["Ranked", "RowBlocks", "TopK", "merge", "nothing", "score_topk"]
