from logra_kernels.nn.adapters import DEFAULT_KINDS, KINDS, Adapter
from logra_kernels.nn.capture import Taps, capture
from logra_kernels.nn.covariance import Covariances
from logra_kernels.nn.fingerprint import model_fingerprint
from logra_kernels.nn.layers import Layer, find_layers, tappable
from logra_kernels.nn.tokens import TokenShares
from logra_kernels.nn.untapped import without_fused_layers

__all__ = [
    "DEFAULT_KINDS",
    "KINDS",
    "Adapter",
    "Covariances",
    "Layer",
    "Taps",
    "TokenShares",
    "capture",
    "find_layers",
    "model_fingerprint",
    "tappable",
    "without_fused_layers",
]
