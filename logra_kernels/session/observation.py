"""What a run learns from a sample of its data: the factors of a PCA projection, and the covariances of KFAC."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from logra_kernels.curvature import keep_covariances
from logra_kernels.errors import LograError
from logra_kernels.nn import Covariances, Taps
from logra_kernels.projection import Projection, SideSpectrum, side_spectra
from logra_kernels.store import GradientStore


class Observation:
    """The observed batches of a run, and its projection until they have decided it.

    Args:
        taps: Of the run; with `wanted.drawn()` factors as long as the projection is open.
        wanted: The projection; None for PCA of what is observed before the first row, or a random one if nothing is.
        decided: Whether a store has fixed the factors already.
    """

    def __init__(self, taps: Taps, wanted: Projection | None, decided: bool) -> None:
        self._taps, self._wanted = taps, wanted
        self._open = not decided and (wanted is None or bool(wanted.learns))
        self._seen: Covariances | None = None

    @contextmanager
    def batch(self, sharing: str, *, beside: bool = False) -> Iterator[None]:
        """Forward and backward of a batch go inside; they count once they succeed.

        Args:
            sharing: As in `Run.observe`.
            beside: Let them give the gradients as well, once the projection is decided.

        Raises:
            LograError: A layer received no gradient, the covariances are NaN or infinite, or `sharing` changed.
        """
        if self._seen is not None and self._seen.sharing != sharing:
            raise LograError(
                f"observe: earlier batches have sharing={self._seen.sharing!r}, this one {sharing!r};"
                " use one of them for all"
            )
        whole = () if not self._open else ("in", "out") if self._wanted is None else self._wanted.learns
        with self._taps.covariances(self._seen, whole, sharing, self._taps.projection.rank, beside=beside) as seen:
            yield
            seen.samples += self._taps.samples or 0
        _ = seen.layers
        self._seen = seen

    def beside(self, wanted: bool) -> AbstractContextManager[None]:
        """`batch` of the positions whose gradients are gathered, if `wanted`; else nothing."""
        return self.batch("expand", beside=True) if wanted else nullcontext()

    def decide(self) -> None:
        """Fix the factors, because gradients are about to be projected; a second call does nothing.

        Raises:
            LograError: The projection is to be learned, and nothing was observed.
        """
        if not self._open:
            return
        spectra = self._spectra()
        projection = self._wanted or Projection(kind="orthonormal" if spectra is None else "pca")
        if projection.learns and spectra is not None:
            projection = projection.learn(spectra, self._taps.factor_dtypes)
            if self._seen is not None and projection.learned is not None:  # on one rank of several
                self._seen = self._seen.projected(spectra, projection.learned)
        self._taps.project(projection)
        self._open = False

    def _spectra(self) -> dict[tuple[str, str], SideSpectrum] | None:
        """(layer name, side) -> what was learned of it; None where nothing was observed."""
        return None if self._seen is None else self._seen.spectra()

    def learn(self, rank: int) -> Projection:
        """The PCA projection of what was observed with no projection, for another run of the model.

        Raises:
            LograError: Nothing was observed, or it was projected.
        """
        if self._seen is None:
            raise LograError("observe: nothing was observed that a projection could be learned from")
        if any(p is not None for factors in self._taps.factors.values() for p in factors):
            raise LograError('observe: these batches were projected; observe with Projection(kind="identity")')
        moments = {
            (name, side): moment
            for name, sums in self._seen.layers.items()
            for side, moment in (("in", sums.right), ("out", sums.left))
        }
        return Projection(rank, "pca").learn(side_spectra(moments, rank), self._taps.factor_dtypes)

    @property
    def learning(self) -> bool:
        """Whether the factors are still to be learned."""
        return self._open and self._wanted is not None and self._seen is None

    def keep(self, store: GradientStore) -> None:
        """Keep the covariances beside the store."""
        if self._seen is not None:
            layers = self._seen.layers
            sums = {name: (sums.a.cpu(), sums.b.cpu()) for name, sums in layers.items()}
            positions = {name: sums.positions for name, sums in layers.items()}
            keep_covariances(store, sums, positions, self._seen.samples)
