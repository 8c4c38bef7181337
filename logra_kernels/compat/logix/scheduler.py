"""LogIXScheduler: what each pass over the training data is for."""

from collections.abc import Iterator

from logra_kernels.compat.logix.session import LogIX
from logra_kernels.compat.logix.statistic import CorrectedEigval, Covariance, Log

LORA, HESSIAN, SAVE = ("none", "random", "pca"), ("none", "raw", "kfac", "ekfac"), ("none", "grad")


class LogIXScheduler:
    """Iterate over it in place of the epochs; it sets the session up for each pass.

    Args:
        logix: The session.
        lora: "random" projects from the first pass on, "pca" from the second, by what the first has seen.
        hessian: "raw", "kfac", "ekfac" (a pass for its basis before), or "none".
        save: "grad" stores the last pass's gradients. So do "raw" and "ekfac", which are made of them.

    Raises:
        ValueError: Another value.
    """

    def __init__(self, logix: LogIX, lora: str = "none", hessian: str = "none", save: str = "none") -> None:
        for name, value, known in (("lora", lora, LORA), ("hessian", hessian, HESSIAN), ("save", save, SAVE)):
            if value not in known:
                raise ValueError(f"LogIXScheduler: {name} is {value!r}; it must be one of {', '.join(known)}")
        self._logix, self._lora, self._save = logix, lora, save
        sides = {"forward": [Covariance], "backward": [Covariance]}
        last: dict[str, list[str]] = {"grad": [Log] if save == "grad" else []}
        if hessian == "kfac":
            last |= sides
        elif hessian != "none":
            last["grad"] += [Covariance if hessian == "raw" else CorrectedEigval]
        self._passes = [sides] * ((lora == "pca") + (hessian == "ekfac")) + [last]
        self._epoch = -1

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._epoch + 1 >= len(self._passes):
            raise StopIteration
        self._epoch += 1
        if self._lora != "none" and self._epoch == LORA.index(self._lora) - 1:
            self._logix._add_lora(self._lora)
        if self._save == "grad" and self._epoch == len(self._passes) - 1:
            self._logix.save(True)
        self._logix.setup(self._passes[self._epoch])
        return self._epoch

    def __len__(self) -> int:
        return len(self._passes)
