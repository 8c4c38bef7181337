"""Batches of any size under torch.compile, compiled once more for all of them.

torch.compile takes the shape of a tensor that hangs on a module for a constant, and what a tap needs hangs on the
module it taps: its probe, weights of positions, offsets. So it would compile anew for every number of samples, and give
up after eight. While a batch of taps has been begun, such tensors are to it as those of the batch itself.
"""

import sys
import weakref

_SWITCH = "force_nn_module_property_static_shapes"  # of torch._dynamo.config; parameters and buffers have their own
_begun: weakref.WeakSet[object] = weakref.WeakSet()
_before: bool | None = None  # the switch's value, while it is off


def let_shapes_vary(taps: object, begun: bool) -> None:
    """Say whether these taps have a batch that a compiled model may be given."""
    global _before
    if begun:
        _begun.add(taps)
    else:
        _begun.discard(taps)
    config = sys.modules.get("torch._dynamo.config")
    if config is None:
        return
    if _begun and _before is None:
        _before = getattr(config, _SWITCH)
        setattr(config, _SWITCH, False)
    elif not _begun and _before is not None:
        setattr(config, _SWITCH, _before)
        _before = None
