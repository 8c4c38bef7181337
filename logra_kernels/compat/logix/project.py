"""A project: the watched layers of a model, the run that logs them, and the curvatures that its rows are asked with."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from torch import Tensor, nn

from logra_kernels.compat.logix.config import Config
from logra_kernels.curvature import CURVATURES, Damping, Factor, Identity
from logra_kernels.errors import LograError
from logra_kernels.nn import DEFAULT_KINDS, KINDS, tappable
from logra_kernels.projection import Projection
from logra_kernels.run import Run
from logra_kernels.session import Solved
from logra_kernels.store import GradientStore, projection_of

PROJECTED, WHOLE, FACTS = "rows", "rows-unprojected", "logix.json"  # in the project's directory
UNPROJECTED = Projection(kind="identity")
DAMPING = Damping(0.1)  # LogIX's: times each layer's mean eigenvalue
HESSIANS = ("auto", "raw", "kfac", "ekfac", "none")


class Project:
    """
    Attributes:
        model: The watched one.
        projection: Of the rows.
        statistics: Those gathered of "raw", "kfac" and "ekfac", by which hessian="auto" chooses.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model: nn.Module | None = None
        self.projection = UNPROJECTED
        self.statistics: set[str] = set()
        self._names: list[str] = []
        self._opened: Path | None = None
        self._run: Run | None = None
        self._seen: Counter[str] = Counter()  # ids of this session's rows
        self._repeated = False
        self._solved: dict[tuple[str, str], Solved] = {}  # by kind, and content_hash of the rows

    # --- what is watched ---

    def watch(
        self, model: nn.Module, type_filter: Sequence[type] | None, name_filter: Sequence[str] | None, anew: bool
    ) -> None:
        """Choose layers, beside those chosen before of the same model, or `anew`.

        Raises:
            ValueError: The filters match no layer that can be tapped.
        """
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        found = tappable(getattr(model, "_orig_mod", model), KINDS if type_filter else DEFAULT_KINDS)
        chosen = {
            name
            for name, (module, _) in found.items()
            if (not type_filter or isinstance(module, tuple(type_filter)))
            and (not name_filter or any(part in name for part in name_filter))
        }
        if not chosen:
            types = f" of the types {', '.join(t.__name__ for t in type_filter)}" if type_filter else ""
            parts = f" with {' or '.join(map(repr, name_filter))} in their names" if name_filter else ""
            raise ValueError(
                f"watch: {type(model).__name__} has no layers{types}{parts} that can be watched; it has"
                f" {', '.join(list(found)[:8]) or 'none'}"
            )
        if model is self.model and not anew:
            chosen |= set(self._names)
            if chosen == set(self._names):
                return
        elif model is not self.model:
            self.projection = UNPROJECTED
        self.close()
        self.model = model
        self._names = [name for name in tappable(getattr(model, "_orig_mod", model)) if name in chosen]

    def project(self, projection: Projection) -> None:
        """Log with this projection from now on; what was gathered is forgotten."""
        self.close()
        self.projection = projection

    def open(self, directory: str | os.PathLike) -> None:
        """Go on with the rows of a project's directory, as they were logged.

        Raises:
            LograError: It has none, or LogIX wrote it.
            StoreMismatch: They are of another model.
        """
        self._watched()
        place = Path(directory)
        there = [place / name for name in (PROJECTED, WHOLE) if GradientStore.exists(place / name)]
        if not there and any(place.glob("log_rank_*_chunk_*.mmap")):
            raise LograError(
                f"{place} was logged by LogIX itself; logra_kernels.compat.import_logix makes a store of its rows"
            )
        if not there:
            raise LograError(f"{place} has no logged rows; check project, root_dir and whether finalize() was called")
        self.close()
        self._opened = there[0]
        self.projection = projection_of(GradientStore.open(there[0]))
        _ = self.run  # checks that the model fits
        self.statistics = set(self._facts().get(there[0].name, []))

    def close(self) -> None:
        """Commit what was logged, take the taps off, and forget what was gathered."""
        if self._run is not None:
            self._run.close()
        self._run, self._opened = None, None
        self.statistics = set()
        self._seen.clear()
        self._repeated = False
        self._solved.clear()

    # --- the run ---

    @property
    def run(self) -> Run:
        """Made when it is first needed.

        Raises:
            LograError: No model is watched.
            StoreMismatch: The project has rows of another model, or made in another way.
        """
        if self._run is None:
            asked = self._opened is None  # else everything is as the store has it
            self._run = Run(
                self.path,
                self._watched(),
                include=[escape(name) for name in self._names] if asked else None,
                kinds=KINDS if asked else None,
                projection=self.projection,
                dtype=self.config.logging.dtype if asked else None,
                # unprojected, LogIX leaves watched weights their gradients; under its LoRA they get none
                freeze=self.projection.kind != "identity",
                curvature="raw",
                damping=DAMPING,
            )
        return self._run

    @property
    def path(self) -> Path:
        """Of the store."""
        name = WHOLE if self.projection.kind == "identity" else PROJECTED
        return self._opened or Path(self.config.log_dir) / name

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (k_out, k_in)."""
        return self.run.taps.layers

    def commit(self) -> GradientStore:
        """The store with every row logged so far.

        Raises:
            StoreError: There are none.
        """
        return self.run.commit()

    @contextmanager
    def log(self, names: list[str], mask: Tensor | None, observe: bool) -> Iterator[list[str]]:
        """Store the rows of a batch; the names they get."""
        here: Counter[str] = Counter()
        fresh = []
        for name in names:
            here[name] += 1
            times = self._seen[name] + here[name]
            fresh.append(name if times == 1 else f"{name}#{times}")
        again = next((name for name, new in zip(names, fresh, strict=True) if name != new), None)
        if again is not None and not self._repeated:
            warnings.warn(f"logix: the data_id {again!r} came before; its rows are told apart as '...#2'", stacklevel=2)
        with self.run.log(fresh, weights=mask if observe else None, observe=observe):
            yield fresh
        self._seen.update(here)
        self._repeated = self._repeated or again is not None
        self._solved.clear()
        if observe:
            self.statistics.add("kfac")

    @contextmanager
    def observe(self, mask: Tensor | None) -> Iterator[None]:
        """Gather the covariances of a batch, and nothing else."""
        with self.run.observe(weights=mask):
            yield
        self._solved.clear()
        self.statistics.add("kfac")

    def keep(self) -> None:
        """Commit all rows, and keep beside them which statistics were gathered."""
        if self._run is None or not GradientStore.exists(self.path):
            return
        self.commit()
        facts = {**self._facts(), self.path.name: sorted(self.statistics)}
        file = self.path.parent / FACTS
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(facts))
        temporary.replace(file)

    def _facts(self) -> dict[str, list[str]]:
        file = self.path.parent / FACTS
        try:
            return json.loads(file.read_text()) if file.exists() else {}
        except ValueError:
            raise LograError(f"{file} is damaged; remove it, and name the hessian instead of 'auto'") from None

    def _watched(self) -> nn.Module:
        if self.model is None:
            raise LograError("logix: no model is watched; call watch(model) first")
        return self.model

    # --- the curvatures ---

    def curvature(self, hessian: str, precondition: bool) -> str:
        """The curvature's kind, for LogIX's arguments.

        Raises:
            ValueError: Another hessian.
        """
        if hessian not in HESSIANS:
            raise ValueError(f"logix: hessian is {hessian!r}; it must be one of {', '.join(HESSIANS)}")
        if not precondition or hessian == "none":
            return "identity"
        if hessian == "raw" or (hessian == "auto" and "raw" in self.statistics):
            return "raw"
        if "ekfac" in self.statistics or hessian == "ekfac":
            return "ekfac"
        if "kfac" in self.statistics or hessian == "kfac":
            return "kfac"
        warnings.warn("logix: no statistics were set up, so there is no preconditioning; name a hessian", stacklevel=2)
        return "identity"

    def solved(self, kind: str, store: GradientStore) -> Solved:
        """A curvature of a store's rows, and what the rows have under it."""
        key = kind, store.content_hash
        if key not in self._solved:
            self._solved[key] = Solved(CURVATURES[kind], None if kind == "identity" else DAMPING)
        return self._solved[key]

    def factor(self, kind: str, damping: float | None) -> Factor:
        """The curvature, ready to be solved with.

        Raises:
            LograError: Nothing is stored, or it lacks what the kind needs, or is singular at this damping.
        """
        if kind == "identity":
            return Identity.without_rows(self.layers)
        store = self.commit()
        return self.solved(kind, store).factor(store, damping)
