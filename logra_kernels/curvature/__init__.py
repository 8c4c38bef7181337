from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.factor import Factor
from logra_kernels.curvature.fisher import RawFisher, RawFisher64
from logra_kernels.curvature.gram import GramSums
from logra_kernels.curvature.kfac import EKFAC, KFAC, keep_covariances
from logra_kernels.curvature.kronecker import CorrectedKronecker, Kronecker
from logra_kernels.curvature.lowrank import LowRank
from logra_kernels.curvature.model_fisher import ModelFisher, keep_model_fisher
from logra_kernels.curvature.shrunk import Shrunk
from logra_kernels.curvature.simple import Diagonal, Identity
from logra_kernels.curvature.statistics import Curvature

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
        LowRank,
    )
}

__all__ = [
    "CURVATURES",
    "EKFAC",
    "KFAC",
    "CorrectedKronecker",
    "Curvature",
    "Damping",
    "Diagonal",
    "Factor",
    "GramSums",
    "Identity",
    "Kronecker",
    "LowRank",
    "ModelFisher",
    "RawFisher",
    "RawFisher64",
    "Shrunk",
    "keep_covariances",
    "keep_model_fisher",
]
