from logra_kernels.curvature.blocks import Groups, matching
from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.factor import Factor
from logra_kernels.curvature.fisher import RawFisher, RawFisher64
from logra_kernels.curvature.kfac import COVARIANCES, EKFAC, KFAC, keep_covariances
from logra_kernels.curvature.kronecker import CorrectedKronecker, Kronecker
from logra_kernels.curvature.lowrank import LowRank
from logra_kernels.curvature.model_fisher import ModelFisher, ModelFisher64
from logra_kernels.curvature.shrunk import Shrunk
from logra_kernels.curvature.simple import Diagonal, Identity
from logra_kernels.curvature.statistics import Curvature
from logra_kernels.curvature.sums import GramSums, Progress, RowSums

CURVATURES: dict[str, type[Curvature]] = {
    curvature.kind: curvature
    for curvature in (
        Identity,
        RawFisher,
        RawFisher64,
        Diagonal,
        Kronecker,
        CorrectedKronecker,
        Shrunk,
        KFAC,
        EKFAC,
        ModelFisher,
        ModelFisher64,
        LowRank,
    )
}

__all__ = [
    "COVARIANCES",
    "CURVATURES",
    "EKFAC",
    "KFAC",
    "CorrectedKronecker",
    "Curvature",
    "Damping",
    "Diagonal",
    "Factor",
    "GramSums",
    "Groups",
    "Identity",
    "Kronecker",
    "LowRank",
    "ModelFisher",
    "ModelFisher64",
    "Progress",
    "RawFisher",
    "RawFisher64",
    "RowSums",
    "Shrunk",
    "keep_covariances",
    "matching",
]
