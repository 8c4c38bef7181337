"""What an adapter is: one kind of layer seen as a matrix product, so that one tap serves them all.

Every adapter writes a sample's weight gradient as dW = sum_t left[t] (x) right[t], [d_out, d_in], and says what to keep
from the forward and how to project both sides.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from logra_kernels.nn.adapters.replaced import ReplacedForward
from logra_kernels.ops import project_grad, project_rows


class Adapter(ABC):
    """One layer's matrix view.

    Attributes:
        kind: "linear", "conv", "embedding", "norm" or "expert", what `capture(kinds=)` chooses by.
        d_in, d_out: Width of the gradient's two sides.
        argument: The name of x in the layer's forward.
        projects_x: Whether P_in meets x itself, in x's dtype; else it meets what stands beside dy, in dy's.
        part: Which part of the module the layer is, where it has several.
        samples_first: Whether a dimension of the module's input holds the samples,
        samples_at: and which.
        mixes_dtypes: Whether factors may have another dtype than what they meet, because nothing but the ops sees them.
        repeats: How many rows of `sides` stand for one position (a convolution's groups), as [repeats, T] flattened.
        flattens: Whether x may come as [N * T, ...], which models flatten [N, T, ...] to.
        known: Whether the module's forward is the kind's (`forwards_as`); else `check_forward` asks it.
    """

    kind: str
    argument = "input"
    projects_x = False
    part = ""
    samples_first = True
    samples_at = 0
    mixes_dtypes = False
    repeats = 1
    flattens = True
    known = True

    def __init__(self, d_in: int, d_out: int) -> None:
        self.d_in, self.d_out = d_in, d_out

    @abstractmethod
    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless x is a batch this layer can be tapped on."""

    def counts_positions(self, x: Tensor) -> bool:
        """Whether x says of positions alone, the same for any samples, and so is none of theirs."""
        return False

    def positions(self, x: Tensor, y: Tensor) -> tuple[int, ...]:
        """The shape [N, ...] that position weights must have (up to flattening)."""
        return y.shape[:-1]

    @abstractmethod
    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        """What the forward saves: as little as the backward can do with."""

    @abstractmethod
    def gradient(
        self,
        kept: Tensor,
        dy: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        """[N, k_out, k_in] from what was kept and the gradient of the layer's output.

        Args:
            weights: A factor for each position, [rows, T].
            offsets: Where samples are documents packed in token rows: sample n is the flattened positions
                offsets[n] .. offsets[n+1]-1, [N+1].
        """

    @abstractmethod
    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """left [N, repeats * T, k_out], right [N, repeats * T, k_in]: the gradient is sum_t left (x) right."""

    def expected(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        """What layers of this kind may give for x; nothing where that is not to be had (quantised weights)."""
        return []

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """The parameters whose gradients make up dW."""
        return [module.weight]  # type: ignore[list-item]

    def matrix(self, grads: list[Tensor]) -> Tensor:
        """dW [d_out, d_in] from the gradients of `parameters`, as autograd gives them."""
        return grads[0].flatten(1)


def forwards_as(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether the module runs the forward of one of these: no subclass's own, and none that was put on the instance."""
    own = vars(module).get("forward")
    return (own is None or isinstance(own, ReplacedForward)) and type(module).forward in [c.forward for c in classes]


def positions_flat(x: Tensor) -> Tensor:
    """[N, ..., d] -> [N, T, d]."""
    if x.dim() == 3:
        return x
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def sample_gradients(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """project_grad of x and dy [rows, T, d]: a row is a sample, or `offsets` cut the flattened positions into some."""
    if offsets is None:
        return project_grad(x, dy, p_in, p_out, None, weights)
    flat = None if weights is None else weights.flatten()
    return project_grad(x.flatten(0, 1), dy.flatten(0, 1), p_in, p_out, offsets, flat)


def projected(rows: Tensor, p: Tensor | None) -> Tensor:
    """P rows; 16-bit ones in fp32, since single positions do not average their rounding away."""
    if p is None:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    return project_rows(rows.to(wide), p.to(wide))
