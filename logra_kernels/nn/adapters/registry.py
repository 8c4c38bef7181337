"""Which adapter a module gets. A new kind of layer is a file beside this one and an entry in `ADAPTERS`."""

from collections.abc import Callable

from torch import nn

from logra_kernels.nn.adapters.base import Adapter
from logra_kernels.nn.adapters.conv import adapt_conv
from logra_kernels.nn.adapters.embedding import adapt_embedding
from logra_kernels.nn.adapters.linear import adapt_hugging_face_conv1d, adapt_linear
from logra_kernels.nn.adapters.norm import adapt_norm

# kind -> what makes an adapter of (module, with its bias?), or None of a module that it does not fit
ADAPTERS: dict[str, tuple[Callable[[nn.Module, bool], Adapter | None], ...]] = {
    "linear": (adapt_linear, adapt_hugging_face_conv1d),
    "conv": (adapt_conv,),
    "embedding": (adapt_embedding,),
    "norm": (adapt_norm,),
}
KINDS = tuple(ADAPTERS)
DEFAULT_KINDS = ("linear", "conv")


def adapt(module: nn.Module, kinds: tuple[str, ...], bias: bool) -> Adapter | None:
    """The adapter of the first kind that fits this module, or None."""
    return next((found for kind in kinds for make in ADAPTERS[kind] if (found := make(module, bias)) is not None), None)
