"""What belongs to one batch, reached by a global name.

To torch.compile a tensor that it reaches from a module, as through a hook, has one shape for good
(`torch._dynamo.config.force_nn_module_property_static_shapes`): it would compile anew for every number of samples.
"""

import itertools
import weakref

from torch import Tensor


class Batch:
    """The batch that the taps of a model are in.

    Attributes:
        leaves: Layer name -> the zero [N, k_out, k_in] that receives its gradient, of layers that have one by now.
        weights: A factor for each position, [N, T].
        offsets: Where documents are cut, [N+1].
        positions: Where the offsets end.
        sequence_length: Of each sample, where layers may flatten samples and positions.
        samples: N, once it is known.
        begun_by: The layer that told it.
    """

    def __init__(self) -> None:
        self.leaves: dict[str, Tensor] = {}
        self.weights: Tensor | None = None
        self.offsets: Tensor | None = None
        self.positions = 0
        self.sequence_length: int | str | None = None
        self.samples: int | None = None
        self.begun_by: str | None = None


BATCHES: dict[int, Batch] = {}
_numbers = itertools.count()


def new_batch(owner: object) -> int:
    """The number of a batch that lives as long as its owner."""
    number = next(_numbers)
    BATCHES[number] = Batch()
    weakref.finalize(owner, BATCHES.pop, number).atexit = False
    return number
