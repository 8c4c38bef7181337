"""What the ranks of a process group observe, each its own batches, and learn together: one projection for all."""

import torch
import torch.distributed as dist
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.nn import Covariances
from logra_kernels.projection import SideSpectrum
from logra_kernels.session.observation import Observation


class SharedObservation(Observation):
    """An `Observation` whose `decide` every rank must come by, once, before its first row.

    Rank 0 gathers what all have seen, finds the factors, and gives every rank the same bits. The covariances seen so
    far are then rank 0's, so that the ranks' own still add up to all that was seen.
    """

    def _spectra(self) -> dict[tuple[str, str], SideSpectrum] | None:
        said: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, None if self._seen is None else self._seen.sharing)
        if self._seen is None and not any(said):
            return None
        if self._seen is None or len(set(said)) > 1:
            each = ", ".join(f"rank {rank}: {sharing or 'nothing'}" for rank, sharing in enumerate(said))
            raise LograError(f"observe: ranks observed unlike things ({each}); let each observe some batches alike")
        _gather(self._seen)
        spectra = _from_rank_0(self._seen)
        if dist.get_rank() != 0:
            self._seen = None
        return spectra


def _gather(seen: Covariances) -> None:
    """Add every rank's covariances to rank 0's, in the order of ranks; a moment of all ranks is held at a time."""
    first, layers = dist.get_rank() == 0, seen.layers
    counts: list[tuple[int, list[int]]] = [(0, [])] * dist.get_world_size()
    dist.all_gather_object(counts, (seen.samples, [sums.positions for sums in layers.values()]))
    if first:
        seen.samples = sum(samples for samples, _ in counts)
    for at, sums in enumerate(layers.values()):
        if first:
            sums.positions = sum(positions[at] for _, positions in counts)
        for moment in (sums.right, sums.left):
            parts = [_gathered(part, first) for part in moment.parts]
            if first:
                for others in list(zip(*parts, strict=True))[1:]:
                    moment.join(others)


def _gathered(part: Tensor, first: bool) -> list[Tensor]:
    """Every rank's, on rank 0; nothing on the others."""
    found = [torch.empty_like(part) for _ in range(dist.get_world_size())] if first else []
    dist.gather(part, found if first else None)
    return found


def _from_rank_0(seen: Covariances) -> dict[tuple[str, str], SideSpectrum]:
    found = seen.spectra() if dist.get_rank() == 0 else {}
    for key, moment in seen.whole_sides().items():
        k = min(seen.rank, moment.dim)
        own = found.get(key) or SideSpectrum(
            torch.empty(k, moment.dim, dtype=torch.float32, device="cpu"),
            torch.empty(k, dtype=torch.float64, device="cpu"),
            1.0,
        )
        spread = torch.tensor(own.spread, dtype=torch.float64, device="cpu")
        for tensor in (own.factor, own.values, spread):
            dist.broadcast(tensor, 0)
        found[key] = SideSpectrum(own.factor, own.values, float(spread))
    return found
