from logra_kernels.nn.capture import Taps, capture
from logra_kernels.nn.fingerprint import model_fingerprint
from logra_kernels.nn.layers import LayerShape, find_layers

__all__ = ["LayerShape", "Taps", "capture", "find_layers", "model_fingerprint"]
