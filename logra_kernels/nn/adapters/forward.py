"""Whether a module of somebody's own class computes what it is taken for.

A gradient comes from x and dy alone, so it is right only where y is what the layer's kind says. A subclass, or a
function put in the place of a module's forward, may shift the ids (BART's positions), pad, normalise or route. Such a
module is asked once, on the first batch.
"""

import torch
from torch import Tensor, nn

from logra_kernels.nn.adapters.base import Adapter

_TOLERANCE = 0.05  # of y's norm: rounding in any dtype is below, another function beyond


def check_forward(name: str, adapter: Adapter, module: nn.Module, x: Tensor, y: object) -> None:
    """Compare what the module gave for the first sample with what a layer of its kind gives.

    Args:
        x, y: Its input and output, samples first.

    Raises:
        ValueError: They differ, or torch.compile is tracing, which computes nothing.
    """
    kind = f"capture: layer {name!r} is a {type(module).__name__} with a forward of its own"
    if torch.compiler.is_compiling():
        raise ValueError(f"{kind}: run one batch eagerly under the taps before torch.compile traces it, or exclude it")
    with torch.no_grad():
        known = adapter.expected(module, x[:1])
        if not known:
            return
        if isinstance(y, Tensor) and y[:1].shape == known[0].shape:
            got = y[:1].double()
            if any((got - one.double()).norm() <= _TOLERANCE * got.norm() for one in known):
                return
    raise ValueError(
        f"{kind}, and it gives something else than a layer of kind {adapter.kind!r} with its weight does, so that its"
        " gradient cannot be told from its input and output; exclude it"
    )
