"""Second moments over positions: what KFAC and PCA projections are made of.

    A = sum over positions of (P_in x) (P_in x)^T,   B = sum over positions of (P_out dy) (P_out dy)^T      uncentred
    expand     a weight that is shared by T positions sees T samples
    reduce     it sees one: x is the mean over positions, dy the sum        (both Eschenhagen et al. 2023)

A mode of the taps: the same hooks, and a backward that adds to A and B instead of making gradients. A side whose
projection is still to be learned is taken whole.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.nn.adapters import Adapter
from logra_kernels.nn.tap import alias, check_heard
from logra_kernels.projection import Moment, SecondMoment, SideSpectrum, moment, side_spectra

SHARING = ("expand", "reduce")


class CovarianceTap(torch.autograd.Function):
    """y and dy pass; A and B grow. The probe makes the backward come by here when all weights are frozen."""

    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        x: Tensor,
        probe: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        adapter: Adapter,
        sums: "LayerCovariance",
        sharing: str,
    ) -> Tensor:
        ctx.save_for_backward(adapter.keep(x, p_in), p_in, p_out, weights)
        ctx.adapter, ctx.sums, ctx.sharing = adapter, sums, sharing
        return alias(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        kept, p_in, p_out, weights = ctx.saved_tensors
        ctx.sums.add(*ctx.adapter.sides(kept, dy, p_in, p_out), weights, ctx.adapter.repeats, ctx.sharing)
        return dy, None, torch.zeros_like(dy[(0,) * dy.dim()]), None, None, None, None, None, None


class LayerCovariance:
    """Sums of one layer.

    Attributes:
        right, left: The moments A [k_in, k_in] and B [k_out, k_out], fp32 (fp64 for an fp64 model).
        positions: How many positions were summed over; those of weight 0 do not count. Samples with "reduce".
    """

    def __init__(self, right: Moment, left: Moment, positions: int = 0) -> None:
        self.right, self.left, self.positions = right, left, positions

    @property
    def a(self) -> Tensor:
        return self.right.matrix  # type: ignore[attr-defined]

    @property
    def b(self) -> Tensor:
        return self.left.matrix  # type: ignore[attr-defined]

    def add(self, left: Tensor, right: Tensor, weights: Tensor | None, repeats: int, sharing: str) -> None:
        """left [N, repeats * T, k_out], right [N, repeats * T, k_in], weights [N, T]."""
        left, right = left.detach().to(self.left.dtype), right.detach().to(self.right.dtype)
        if weights is not None:
            weights = weights.repeat(1, repeats).to(left.dtype)
        if sharing == "reduce":
            left, right = _reduced(left, right, weights, repeats)
        else:
            left, right = left.flatten(0, 1), right.flatten(0, 1)
            if weights is not None:
                factor = weights.flatten()
                if not bool((factor == 1).all()):  # those of a batch without padding are, and need no copies
                    kept = factor != 0
                    left, right = left[kept] * factor[kept][:, None], right[kept]
        self.right.add(right)
        self.left.add(left)
        self.positions += len(left)


def _reduced(left: Tensor, right: Tensor, weights: Tensor | None, repeats: int) -> tuple[Tensor, Tensor]:
    """One row a sample (and group of a convolution): the sum of left and the mean of right over its positions."""
    left, right = left.unflatten(1, (repeats, -1)), right.unflatten(1, (repeats, -1))
    if weights is None:
        return left.sum(2).flatten(0, 1), right.mean(2).flatten(0, 1)
    factor = weights.unflatten(1, (repeats, -1))[..., None]
    counted = (factor != 0).to(left.dtype)
    count = counted.sum(2)
    kept = count.flatten() != 0
    left, right = (left * factor).sum(2), (right * counted).sum(2) / count.clamp_min(1)
    return left.flatten(0, 1)[kept], right.flatten(0, 1)[kept]


class Covariances:
    """The sums of all layers. Made by `Taps.covariances`; eager models only.

    Args:
        layers: Layer names.
        whole: The sides, of "in" and "out", that are taken whole, for `spectra`; wide ones as a sketch.
        sharing: "expand" or "reduce".
        rank: The most directions that `spectra` will be asked for.

    Attributes:
        samples: How many samples were seen.
    """

    def __init__(
        self, layers: Collection[str], whole: Collection[str] = (), sharing: str = "expand", rank: int = 64
    ) -> None:
        if sharing not in SHARING:
            raise ValueError(f"covariances: sharing is {sharing!r}; it must be one of {', '.join(SHARING)}")
        self._names = list(layers)
        self.whole, self.sharing, self.rank = tuple(whole), sharing, rank
        self._sums: dict[str, LayerCovariance] = {}
        self._unreached: set[str] = set()
        self.samples = 0

    def tap(
        self,
        name: str,
        adapter: Adapter,
        y: Tensor,
        x: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        """y, with this layer's covariances tapped; what the taps' hooks call."""
        if torch.compiler.is_compiling():
            raise RuntimeError("covariances: a compiled model cannot be observed; run the model itself")
        if self.sharing == "reduce" and not adapter.samples_first:
            raise ValueError(
                f"covariances: the rows of layer {name!r} are not cut by samples, which sharing='reduce' needs; use"
                " 'expand', or exclude the layer"
            )
        p_in, p_out = (None if side in self.whole else p for side, p in (("in", p_in), ("out", p_out)))
        sums = self._of(name, adapter, y, p_in, p_out)
        probe = torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        return CovarianceTap.apply(y, x, probe, p_in, p_out, weights, adapter, sums, self.sharing)

    def unreached(self, name: str, adapter: Adapter, like: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> None:
        """The layer was called with no position at all, as an expert that no token came to; `like` gives its dtype."""
        self._unreached.add(name)
        self._of(name, adapter, like, p_in, p_out)

    def _of(
        self, name: str, adapter: Adapter, y: Tensor, p_in: Tensor | None, p_out: Tensor | None
    ) -> "LayerCovariance":
        if name not in self._sums:
            dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
            right, left = (
                moment(dim, self.rank, y.device, dtype)
                if side in self.whole
                else SecondMoment.zeros(dim if p is None else len(p), y.device, dtype)
                for side, dim, p in (("in", adapter.d_in, p_in), ("out", adapter.d_out, p_out))
            )
            self._sums[name] = LayerCovariance(right, left)
        return self._sums[name]

    @property
    def layers(self) -> dict[str, LayerCovariance]:
        """Layer name -> its sums.

        Raises:
            LograError: A layer saw no backward, or its sums are not finite.
        """
        heard = [name for name, sums in self._sums.items() if sums.positions or name in self._unreached]
        advice = (
            "run forward and backward of the model inside, and exclude layers that the loss does not reach or that the"
            " model does not call"
        )
        check_heard("covariances", self._names, heard, advice)
        for name, sums in self._sums.items():
            if not (sums.right.isfinite() and sums.left.isfinite()):
                raise LograError(f"covariances: those of layer {name!r} are NaN or infinite; check the model's loss")
        return {name: self._sums[name] for name in self._names}

    def spectra(self) -> dict[tuple[str, str], SideSpectrum]:
        """(layer name, side) -> the `rank` leading directions of every side that was taken whole (all of a narrow one).

        Raises:
            LograError: As `layers`.
        """
        return side_spectra(self.whole_sides(), self.rank)

    def whole_sides(self) -> dict[tuple[str, str], Moment]:
        """(layer name, side) -> the moment of every side that was taken whole.

        Raises:
            LograError: As `layers`.
        """
        return {
            (name, side): side_moment
            for name, sums in self.layers.items()
            for side, side_moment in (("in", sums.right), ("out", sums.left))
            if side in self.whole
        }

    def projected(
        self, spectra: Mapping[tuple[str, str], SideSpectrum], factors: Mapping[tuple[str, str], Tensor]
    ) -> "Covariances":
        """The same covariances in the coordinates of what was learned; to be added to.

        Args:
            spectra: P and the eigenvalues v of C: P C P^T = diag(v), C P^T = P^T diag(v).
            factors: Q, P as it is kept, perhaps rounded: Q C Q^T = (Q P^T) diag(v) (Q P^T)^T but for what Q has outside
                of P's rows, which is squared.
        """
        found = Covariances(self._names, sharing=self.sharing)
        found.samples, found._unreached = self.samples, set(self._unreached)
        for name, sums in self.layers.items():
            sides = [("in", sums.right), ("out", sums.left)]
            for at, (side, whole) in enumerate(sides):
                if (name, side) in spectra:
                    known, q = spectra[name, side], factors[name, side]
                    turned = known.values.diag()
                    if q.dtype != known.factor.dtype:
                        turn = q.to(known.values) @ known.factor.to(known.values).T
                        turned = turn @ turned @ turn.T
                    sides[at] = side, SecondMoment(turned.to(whole.device, whole.dtype))
            found._sums[name] = LayerCovariance(sides[0][1], sides[1][1], sums.positions)
        return found
