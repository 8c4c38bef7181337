"""What every hook of a capture asks: whether to tap, how, and how the batch is laid out."""

from torch import Tensor

from logra_kernels.nn.covariance import Covariances
from logra_kernels.nn.shared_inputs import SharedInputs
from logra_kernels.nn.tokens import TokenShares


class TapState:
    """The part of `Taps` that its hooks know.

    Attributes:
        active: Hooks do nothing without.
        in_graph: Every tap is a node of autograd's graph.
        shared: Projects once what several taps are given.
        mode: Gathers something else than gradients,
        beside: or gradients beside it.
        weights: A factor for each position, [N, T].
        offsets: Where documents are cut, [N+1].
        extent: One number seen as all positions, where they were told: a tensor, whose shape torch.compile lets vary
            (nn/shapes.py), as it does not an integer.
        any_length: Whether layers may flatten samples and any number of positions.
        samples: N, once it is known.
        begun_by: The layer that told it.
        sequence_first: Whether some layers take [T, N, d].
    """

    def __init__(self, in_graph: bool, shared: SharedInputs | None) -> None:
        self.active = False
        self.in_graph = in_graph
        self.shared = shared
        self.mode: TokenShares | Covariances | None = None
        self.beside = False
        self.weights: Tensor | None = None
        self.offsets: Tensor | None = None
        self.extent: Tensor | None = None
        self.any_length = False
        self.samples: int | None = None
        self.begun_by: str | None = None
        self.sequence_first = False
