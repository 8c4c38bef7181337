from logra_kernels.influence.groups import (
    Groups,
    group_scores,
    layer_groups,
    layer_scores,
    separate_scores,
    separate_self_influence,
)
from logra_kernels.influence.score import MODES, NEEDS, TopK, adjustment, extremes, scores, topk
from logra_kernels.influence.statistics import RowStatistics, row_mask, row_statistics, self_influence
from logra_kernels.influence.valuation import Value, ValueTable, value
from logra_kernels.influence.whitening import whitened_factor, whitening_of

__all__ = [
    "MODES",
    "NEEDS",
    "Groups",
    "RowStatistics",
    "TopK",
    "Value",
    "ValueTable",
    "adjustment",
    "extremes",
    "group_scores",
    "layer_groups",
    "layer_scores",
    "row_mask",
    "row_statistics",
    "scores",
    "self_influence",
    "separate_scores",
    "separate_self_influence",
    "topk",
    "value",
    "whitened_factor",
    "whitening_of",
]
