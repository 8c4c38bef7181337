from logra_kernels.session.analysis import Analysis
from logra_kernels.session.ensemble import Ensemble, ensemble, member_scores, tracin
from logra_kernels.session.fisher_sums import FisherSums
from logra_kernels.session.modes import mode_problems, unscaled, zero_layers
from logra_kernels.session.observation import Observation
from logra_kernels.session.query import Query
from logra_kernels.session.row_ids import row_ids
from logra_kernels.session.sensitivity import Sensitivity
from logra_kernels.session.settings import Settings
from logra_kernels.session.shared_observation import SharedObservation
from logra_kernels.session.skipped_rows import SkippedRows
from logra_kernels.session.solved import Solved
from logra_kernels.session.verify import Verification
from logra_kernels.session.writing import Writing

__all__ = [
    "Analysis",
    "Ensemble",
    "FisherSums",
    "Observation",
    "Query",
    "Sensitivity",
    "Settings",
    "SharedObservation",
    "SkippedRows",
    "Solved",
    "Verification",
    "Writing",
    "ensemble",
    "member_scores",
    "mode_problems",
    "row_ids",
    "tracin",
    "unscaled",
    "zero_layers",
]
