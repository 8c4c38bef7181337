from logra_kernels.influence.score import MODES, TopK, layer_scores, scores, topk
from logra_kernels.influence.self_influence import self_influence

__all__ = ["MODES", "TopK", "layer_scores", "scores", "self_influence", "topk"]
