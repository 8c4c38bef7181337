"""What cannot work, refused before a model is loaded or a row read: options, and files that cannot be written."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from logra_kernels.errors import LograError


def check_least(args: argparse.Namespace, **least: int) -> None:
    """
    Raises:
        ValueError: An option is given and below what it must be at least; its name has _ for -.
    """
    for name, most in least.items():
        value = getattr(args, name)
        if value is not None and value < most:
            dashes = "-" if len(name) == 1 else "--"
            raise ValueError(f"{dashes}{name.replace('_', '-')} {value} must be at least {most}")


def check_rank_c(rank_c: int | None, layers: Mapping[str, tuple[int, int]] | None = None) -> None:
    """
    Args:
        rank_c: What `--rank-c` says.
        layers: name -> (k_out, k_in), where they are known.

    Raises:
        ValueError: There cannot be so many factors of each layer, or they would be no fewer numbers than the row.
    """
    from logra_kernels.ops import MOST_RANK, factored_dim

    if rank_c is None:
        return
    if not 1 <= rank_c <= MOST_RANK:
        raise ValueError(f"--rank-c {rank_c} must be 1 to {MOST_RANK}; leave it out to keep rows as they are")
    if layers is None:
        return
    width, dim = factored_dim(list(layers.values()), rank_c), sum(k_out * k_in for k_out, k_in in layers.values())
    if width >= dim:
        raise ValueError(
            f"--rank-c {rank_c} keeps {width} numbers of rows of {dim}; use fewer factors, or leave it out"
        )


def check_curvature(kind: str, store: str) -> None:
    """
    Args:
        kind: What `--curvature` says.
        store: The directory, where there may be none yet.

    Raises:
        LograError: An unknown one, or a Fisher of the model's own predictions, which no command observes, where a
            program has not.
    """
    from logra_kernels.curvature import CURVATURES, ModelFisher
    from logra_kernels.store import GradientStore, observed

    if kind not in CURVATURES:
        raise LograError(f"--curvature {kind!r} must be one of {', '.join(CURVATURES)}")
    chosen = CURVATURES[kind]
    if not issubclass(chosen, ModelFisher):
        return
    if not GradientStore.exists(store) or observed(GradientStore.open(store), chosen.sidecar()) is None:
        others = ", ".join(name for name, other in CURVATURES.items() if not issubclass(other, ModelFisher))
        raise LograError(
            f"--curvature {kind!r} is made of gradients that only a Python program observes (Run.observe_fisher),"
            f" and {store} has none; use one of {others}"
        )


def check_is_no_input(out: str, inputs: Sequence[str]) -> None:
    """
    Raises:
        LograError: The store to be written is one of those that are read.
    """
    for path in inputs:
        if os.path.realpath(path) == os.path.realpath(out):
            raise LograError(f"--out {out} is the store {path} itself; the output must be a new path, not an input's")


def check_is_no_store(out: str) -> None:
    """
    Raises:
        LograError: There is a store already.
    """
    from logra_kernels.store import GradientStore

    if GradientStore.exists(out):
        raise LograError(f"--out {out} holds a gradient store already; the output must be a new path")


def check_report(path: str) -> None:
    """
    Raises:
        LograError: `--report` names no file that can be written, or jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise LograError("--report needs jinja2; pip install 'logra-kernels[report]'")
    target = Path(path)
    if target.is_dir() or path.endswith(os.sep):
        raise LograError(f"--report {path} is a directory; name a file, as {target / 'report.html'}")
    # The directories above it are made; not Path.exists, which raises where a folder may not be searched.
    nearest = next(parent for parent in target.resolve().parents if os.path.exists(parent))
    if not nearest.is_dir():
        raise LograError(f"--report {path} cannot be written: {nearest} is a file; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise LograError(f"--report {path} cannot be written: no permission to write in {nearest}")
