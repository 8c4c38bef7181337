from logra_kernels.nn.adapters.attention import AttentionAdapter
from logra_kernels.nn.adapters.base import Adapter, forwards_as
from logra_kernels.nn.adapters.experts import ExpertAdapter
from logra_kernels.nn.adapters.forward import check_forward
from logra_kernels.nn.adapters.linear import LinearAdapter
from logra_kernels.nn.adapters.parallel import parallel
from logra_kernels.nn.adapters.registry import DEFAULT_KINDS, KINDS, adapt
from logra_kernels.nn.adapters.replaced import ReplacedForward

__all__ = [
    "DEFAULT_KINDS",
    "KINDS",
    "Adapter",
    "AttentionAdapter",
    "ExpertAdapter",
    "LinearAdapter",
    "ReplacedForward",
    "adapt",
    "check_forward",
    "forwards_as",
    "parallel",
]
