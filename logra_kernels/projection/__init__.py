from logra_kernels.projection.learned import Learned, SideSpectrum, side_spectra
from logra_kernels.projection.moment import Moment, SecondMoment
from logra_kernels.projection.projection import KINDS, Projection
from logra_kernels.projection.sketch import SketchedMoment, moment

__all__ = [
    "KINDS",
    "Learned",
    "Moment",
    "Projection",
    "SecondMoment",
    "SideSpectrum",
    "SketchedMoment",
    "moment",
    "side_spectra",
]
