"""Rows of the CPU encoded into their place in the file."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from logra_kernels.store.encoding import encode_here, spread_out
from logra_kernels.store.format import Manifest
from logra_kernels.store.native import quantize_rows, quantizes_rows, quantizing_threads, take_rows, takes_rows
from logra_kernels.store.writing.growing import Place


def checks_itself(manifest: Manifest, rows: Tensor) -> bool:
    """Whether `fill` looks at the numbers, too, in the pass that it makes anyway."""
    if manifest.rank is not None:
        return False
    return quantizes_rows(rows) if manifest.format.scaled else takes_rows(rows, manifest.torch_dtype)


def fill(manifest: Manifest, rows: Tensor, place: Place, in_place: bool) -> bool:
    """Encode rows [n, D]; False if it saw numbers that may not fit.

    Args:
        in_place: What `checks_itself` says of rows like these.
    """
    if not in_place:
        place.fill(encode_here(manifest, rows))
        return True
    if not manifest.format.scaled:
        return take_rows(rows, manifest.torch_dtype, place.pieces("rows"))
    rows, whole, threads = spread_out(manifest, rows), place.whole(), quantizing_threads(rows)
    if whole is not None:
        return _quantize(manifest, rows, whole, threads)
    fit = True
    for run in place.runs():
        part = rows[run.first - place.first : run.stop - place.first]
        whole = run.whole()
        if whole is not None:
            fit &= _quantize(manifest, part, whole, threads)
            continue
        held = {name: np.empty(spec.nbytes, np.uint8) for name, spec in manifest.tensors(len(part)).items()}
        fit &= _quantize(manifest, part, held, threads)
        run.fill({name: torch.from_numpy(data) for name, data in held.items()})
    return fit


def _quantize(manifest: Manifest, rows: Tensor, out: Mapping[str, np.ndarray], threads: int) -> bool:
    fit = quantize_rows(rows, manifest.format, out["rows"], out["scales"], threads)
    if fit and manifest.format.scale == "fp16":
        # The largest scale of a row must keep its digits; what rounds to the least that does may not.
        largest = torch.from_numpy(out["scales"]).view(torch.float16).view(len(rows), -1).amax(1)
        return bool((largest > torch.finfo(torch.float16).tiny).all())
    return fit
