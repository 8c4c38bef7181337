"""Which adapter a module gets. A new kind of layer is a file beside this one and an entry in `ADAPTERS`."""

from collections.abc import Callable, Mapping

from torch import nn

from logra_kernels.nn.adapters.attention import adapt_attention
from logra_kernels.nn.adapters.base import Adapter
from logra_kernels.nn.adapters.conv import adapt_conv
from logra_kernels.nn.adapters.embedding import adapt_embedding
from logra_kernels.nn.adapters.experts import adapt_experts
from logra_kernels.nn.adapters.linear import adapt_hugging_face_conv1d, adapt_linear
from logra_kernels.nn.adapters.norm import adapt_norm

Made = Adapter | Mapping[str, Adapter] | None

# kind -> what makes the adapter of (module, with its bias?), or several by the names of the module's parts; None or
# nothing for a module that it does not fit
ADAPTERS: dict[str, tuple[Callable[[nn.Module, bool], Made], ...]] = {
    "linear": (adapt_linear, adapt_hugging_face_conv1d, adapt_attention),
    "conv": (adapt_conv,),
    "embedding": (adapt_embedding,),
    "norm": (adapt_norm,),
    "expert": (adapt_experts,),
}
KINDS = tuple(ADAPTERS)
DEFAULT_KINDS = ("linear", "conv")


def adapt(module: nn.Module, kinds: tuple[str, ...], bias: bool) -> Mapping[str, Adapter]:
    """The adapters of the first kind that fits this module, by its part's name ("" for the module itself)."""
    for make in (make for kind in kinds for make in ADAPTERS[kind]):
        made = make(module, bias)
        if made:
            return made if isinstance(made, Mapping) else {"": made}
    return {}
