"""What a study is: data, model, training recipe, how many subsets, seeds and checkpoints."""

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Setting:
    """One study. Everything that the retrained losses depend on is here, so its hash names the cached ground truth.

    Attributes:
        widths: Of the MLP, input first, classes last; linear layers with biases and ReLU between.
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

    @property
    def key(self) -> str:
        """16 hexadecimal digits that belong to this setting."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


# Choe et al. 2024, table 2, FMNIST, but for the falling rate: without it the last steps' noise drowns a subset's effect
STUDIES = {
    "digits": Setting("digits", train=1000, queries=100, widths=(64, 128, 64, 10), seeds=10),
    "fmnist": Setting("fmnist", train=2000, queries=100, widths=(784, 256, 128, 10)),
}
