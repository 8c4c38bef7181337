"""What every hook of a capture asks: whether to tap, how, and how the batch is laid out."""

from logra_kernels.nn.batch import BATCHES, Batch, new_batch
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
        sequence_first: Whether some layers take [T, N, d].
    """

    def __init__(self, in_graph: bool, shared: SharedInputs | None) -> None:
        self.active = False
        self.in_graph = in_graph
        self.shared = shared
        self.mode: TokenShares | Covariances | None = None
        self.beside = False
        self.sequence_first = False
        self._number = new_batch(self)

    @property
    def batch(self) -> Batch:
        """How the batch at hand is laid out, and its gradients."""
        return BATCHES[self._number]
