"""One block's (H + lambda I)^-1 and (H + lambda I)^-1/2, by the factorisation that suits H. Never an explicit inverse.

    cholesky    H dense, [d, d]                          L L^T = H + lambda I
    spectral    H = U diag(s) U^T, r <= d columns in U
                (H + lambda I)^p g = U ((s + lambda)^p - lambda^p) U^T g + lambda^p g
    kronecker   U = U_out (x) U_in, s [k_out, k_in]
                (H + lambda I)^p G = U_out ((s + lambda)^p * U_out^T G U_in) U_in^T

Factorised in fp64; rows are [N, d] with d = k_out * k_in, k_in running fastest. They are solved with in fp64, save by a
wide dense block, whose fp32 substitution errs by at most about 2 u sqrt(cond(H + lambda I)), u = 2^-24, relative to
g^T (H + lambda I)^-1 g: where that bound is below `FP32_BOUND`, it is taken for its speed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from logra_kernels.errors import LograError

U = 2**-24  # half the distance from 1 to the next fp32
FP32_WIDTH = 1024  # narrower blocks cost little in fp64
FP32_BOUND = 3e-5


class Solver(ABC):
    """Attributes: width d, the damping lambda that was added, and the dtype that it works in."""

    width: int
    damping: float
    dtype: torch.dtype = torch.float64

    @abstractmethod
    def power(self, rows: Tensor, exponent: float) -> Tensor:
        """(H + lambda I)^exponent applied to every row, [N, d] -> [N, d]; exponent is -1 or -0.5.

        For -0.5 any square root serves, as long as its rows' products are those of the inverse.
        """

    def settle(self, exact: bool) -> None:
        """Choose the dtype to work in: fp64 if `exact`, else whatever the solver's error bound allows."""
        return None

    def quadratic(self, rows: Tensor) -> Tensor:
        """g^T (H + lambda I)^-1 g of every row, [N, d] -> [N]."""
        return self.power(rows, -0.5).square().sum(1)

    def toward_stored(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 applied to every row, less any part whose product with every stored row is 0.

        Where there are fewer stored rows than dims that part is the largest, and would only add its rounding.
        """
        return self.power(rows, -1)


class CholeskySolver(Solver):
    """For a dense block of full rank.

    Args:
        h: H, [d, d].

    Raises:
        LograError: H + lambda I is not positive definite.
    """

    def __init__(self, layer: str, h: Tensor, damping: float) -> None:
        damped = h.to(torch.float64, copy=True)
        self.width, self.damping = len(h), damping
        largest = float(torch.linalg.vector_norm(damped)) + damping  # the Frobenius norm is an upper bound
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        pivots = lower.diagonal()
        if damping < U * largest:  # then what is added drowns in the rounding of fp32 sums, and so may a pivot
            failed |= bool(pivots.min() ** 2 < 16 * U * pivots.max() ** 2)
        if failed:
            raise LograError(
                f"curvature: H + {damping:g} I of layer {layer!r} is not positive definite; use a larger damping, or"
                " log more rows"
            )
        self._bounded = 2 * U * largest**0.5 <= FP32_BOUND * damping**0.5
        self._upper = lower.T

    def settle(self, exact: bool) -> None:
        if not exact and self.width >= FP32_WIDTH and self._bounded:
            self.dtype = torch.float32
            self._upper = self._upper.float()

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        # rows L^-T: solved from the right, BLAS runs along the rows as they lie in memory
        half = torch.linalg.solve_triangular(self._upper, rows, upper=True, left=False)
        return half if exponent == -0.5 else torch.linalg.solve_triangular(self._upper.T, half, upper=False, left=False)


class SpectralSolver(Solver):
    """For a block known by r <= d eigenvectors; the rest of the space has eigenvalue 0.

    Args:
        vectors: U, [d, r], orthonormal columns; None for the unit vectors, a diagonal H.
        values: s, [r], not negative.
        spanning: Whether every stored row lies in the columns' span.

    Raises:
        LograError: The damped spectrum has a zero.
    """

    def __init__(
        self, layer: str, vectors: Tensor | None, values: Tensor, damping: float, *, spanning: bool = False
    ) -> None:
        self._spanning = spanning
        self._values = values.double().clamp_min(0)
        self._vectors = None if vectors is None else vectors.double()
        self.width = len(values) if vectors is None else len(vectors)
        self.damping = damping
        complete = vectors is None or vectors.shape[1] == len(vectors)
        check_positive(layer, self._values, damping, complete)

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        damped = (self._values + self.damping) ** exponent
        if self._vectors is None:
            return rows * damped
        inside = rows @ self._vectors
        if self._vectors.shape[1] == self.width:
            return (inside * damped) @ self._vectors.T
        outside = self.damping**exponent
        return (inside * (damped - outside)) @ self._vectors.T + outside * rows

    def toward_stored(self, rows: Tensor) -> Tensor:
        if self._vectors is None or not self._spanning:
            return self.power(rows, -1)
        return (rows @ self._vectors / (self._values + self.damping)) @ self._vectors.T

    def quadratic(self, rows: Tensor) -> Tensor:
        if self._vectors is None or self._vectors.shape[1] == self.width:
            return super().quadratic(rows)
        inside = (rows @ self._vectors).square()
        outside = (rows.square().sum(1) - inside.sum(1)).clamp_min(0)
        return (inside / (self._values + self.damping)).sum(1) + outside / self.damping


class KroneckerSolver(Solver):
    """For a block that is diagonal in the basis U_out (x) U_in (KFAC and EKFAC).

    Args:
        u_out, u_in: Orthonormal columns, [k_out, k_out] and [k_in, k_in].
        values: Eigenvalues, [k_out, k_in], not negative.

    Raises:
        LograError: The damped spectrum has a zero.
    """

    def __init__(self, layer: str, u_out: Tensor, u_in: Tensor, values: Tensor, damping: float) -> None:
        self._u_out, self._u_in, self._values = u_out.double(), u_in.double(), values.double().clamp_min(0)
        self.width, self.damping = values.numel(), damping
        check_positive(layer, self._values, damping, True)

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        g = rows.unflatten(1, self._values.shape)
        turned = (self._u_out.T @ g @ self._u_in) * (self._values + self.damping) ** exponent
        return (self._u_out @ turned @ self._u_in.T).flatten(1)

    def quadratic(self, rows: Tensor) -> Tensor:
        turned = self._u_out.T @ rows.unflatten(1, self._values.shape) @ self._u_in
        return (turned.square() / (self._values + self.damping)).sum((1, 2))


class SideBySide(Solver):
    """Solvers of equal damping that share a block: its diagonal blocks, in the order of its columns."""

    def __init__(self, solvers: Sequence[Solver]) -> None:
        self._solvers = list(solvers)
        self._widths = [solver.width for solver in solvers]
        self.width, self.damping = sum(self._widths), solvers[0].damping

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        parts = rows.split(self._widths, dim=1)
        own = [solver.power(part, exponent) for solver, part in zip(self._solvers, parts, strict=True)]
        return own[0] if len(own) == 1 else torch.cat(own, dim=1)


class ZeroSolver(Solver):
    """For a block whose stored rows are all zero: whatever a query has there, its products with them are 0."""

    def __init__(self, width: int) -> None:
        self.width, self.damping = width, 0.0

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        return torch.zeros_like(rows)


class Without(Solver):
    """Another solver of a block some of whose layers have no gradients: there it gives zeros.

    Args:
        inner: That solves; its H is zero in the rows and columns of these layers.
        kept: Of each layer, whether it has gradients.
        widths: Of the layers.
    """

    def __init__(self, inner: Solver, kept: Sequence[bool], widths: Sequence[int]) -> None:
        self._inner, self.width, self.damping = inner, inner.width, inner.damping
        self._kept = torch.tensor(kept, device="cpu").repeat_interleave(torch.tensor(widths, device="cpu"))

    def settle(self, exact: bool) -> None:
        self._inner.settle(exact)
        self.dtype = self._inner.dtype

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        return self._masked(self._inner.power(self._masked(rows), exponent))

    def toward_stored(self, rows: Tensor) -> Tensor:
        return self._masked(self._inner.toward_stored(self._masked(rows)))

    def quadratic(self, rows: Tensor) -> Tensor:
        return self._inner.quadratic(self._masked(rows))

    def _masked(self, rows: Tensor) -> Tensor:
        return torch.where(self._kept, rows, 0.0)


class Spanned(Solver):
    """Another solver that knows the span of the stored rows, which its own H need not have.

    Args:
        inner: That solves.
        rows: The stored rows, [N, d] with N < d.
    """

    def __init__(self, inner: Solver, rows: Tensor) -> None:
        self._inner, self.width, self.damping = inner, inner.width, inner.damping
        self._span = torch.linalg.qr(rows.T.double()).Q

    def settle(self, exact: bool) -> None:
        self._inner.settle(exact)
        self.dtype = self._inner.dtype
        self._span = self._span.to(self.dtype)

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        return self._inner.power(rows, exponent)

    def toward_stored(self, rows: Tensor) -> Tensor:
        return (self.power(rows, -1) @ self._span) @ self._span.T

    def quadratic(self, rows: Tensor) -> Tensor:
        return self._inner.quadratic(rows)


def check_positive(layer: str, values: Tensor, damping: float, complete: bool) -> None:
    """Raise LograError unless every eigenvalue plus the damping is positive, those of unknown directions included."""
    if damping <= 0 and (not complete or bool((values <= 0).any())):
        raise LograError(
            f"curvature: H + {damping:g} I of layer {layer!r} is singular; use a larger damping, or log more rows"
        )
