"""Whether the files that a command is to write can be written, looked at before the work."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from logra_kernels.errors import LograError


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
