"""What a study is: data, model, training recipe, how many subsets, seeds and checkpoints."""

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Setting:
    """One study. Everything that the retrained losses depend on is here, so its hash names the cached ground truth.

    Attributes:
        widths: Of the MLP, input first, classes last; linear layers with biases and ReLU between.
        positions: Of a sample, which all layers but the last share; the last takes them side by side. None for one.
        subsets: Random subsets of half the training rows (Park et al. 2023, section 2).
        seeds: Models trained on each subset; their losses are averaged.
        checkpoints: Models trained on all rows, each one scored by every method.
    """

    study: str
    train: int
    queries: int
    widths: tuple[int, ...]
    epochs: int = 20
    batch: int = 64
    lr: float = 3e-2  # at the first step; falls linearly to 0 at the last
    momentum: float = 0.9
    weight_decay: float = 1e-3
    subsets: int = 40
    seeds: int = 3
    checkpoints: int = 5
    positions: int | None = None

    @property
    def facts(self) -> dict[str, object]:
        """Name -> value of all that is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def key(self) -> str:
        """16 hexadecimal digits that belong to this setting."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of every layer."""
        shapes = list(pairwise(self.widths))
        return [*shapes[:-1], (shapes[-1][0] * (self.positions or 1), shapes[-1][1])]


# Choe et al. 2024, table 2, FMNIST, but for the falling rate: without it the last steps' noise drowns a subset's effect
STUDIES = {
    "digits": Setting("digits", train=1000, queries=100, widths=(64, 128, 64, 10), seeds=10),
    "fmnist": Setting("fmnist", train=2000, queries=100, widths=(784, 256, 128, 10)),
    # digits again, by the 9 patches of 4 x 4 pixels at stride 2: layers that positions share, as in a language model
    "patches": Setting("patches", train=1000, queries=100, widths=(16, 32, 32, 10), seeds=10, positions=9),
}
