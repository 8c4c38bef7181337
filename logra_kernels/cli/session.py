"""What `logra log` and `logra query` share: the model they load and the facts that both must agree on."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from logra_kernels.errors import LograError

if TYPE_CHECKING:
    from torch import nn
    from tqdm import tqdm


DEFAULT_MAX_LENGTH = 512
DEFAULT_WINDOW = 128
_WINDOW_BYTES = 256 << 20
_LOSS = "next-token negative log-likelihood, summed over at most {} tokens"


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; auto takes a GPU where there is one")


def add_curvature_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--curvature",
        default="shrunk",
        metavar="KIND",
        help="H: shrunk (default), raw, diagonal, kronecker, corrected-kronecker, kfac, ekfac or identity",
    )


def of_rows(k: int, rows: int) -> str:
    """How much of the store the k best rows are; of all of them, agreement and recall say nothing."""
    from logra_kernels.store.reading.coarse import TOP, measured_top

    rule = f", a tenth but at most {TOP}" if k == measured_top(rows) else ""
    return f"k is {k:,} of {rows:,} rows{rule}"


def add_window_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--window",
        type=int,
        default=DEFAULT_WINDOW,
        metavar="N",
        help=f"make batches of like length among N rows at a time, or of those that {_WINDOW_BYTES >> 20} MB hold, so"
        f" that little is padding (default {DEFAULT_WINDOW}); up to the batch size: batches in the data's order",
    )


def window_rows(asked: int, batch_size: int, layers: Mapping[str, tuple[int, int]]) -> int:
    """How many rows wait for each other: whole batches, at least one; layers: name -> (k_out, k_in)."""
    return max(1, min(asked, _WINDOW_BYTES // _waiting_bytes(layers)) // batch_size) * batch_size


def window_bytes(asked: int, batch_size: int, layers: Mapping[str, tuple[int, int]]) -> int:
    """Their memory."""
    return window_rows(asked, batch_size, layers) * _waiting_bytes(layers)


def _waiting_bytes(layers: Mapping[str, tuple[int, int]]) -> int:
    """Of a row, in fp32."""
    return 4 * sum(k_out * k_in for k_out, k_in in layers.values())


def kinds(text: str) -> str | tuple[str, str]:
    """A projection's kind, or those of its two sides."""
    first, comma, second = text.partition(",")
    return (first, second) if comma else text


def device(name: str) -> str:
    """The torch device that the user asked for.

    Raises:
        LograError: There is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LograError(f"device {name!r} cannot be used here ({reason}); use --device cpu") from error
    return name


def max_length(model: nn.Module, asked: int | None) -> int:
    """Longest token sequence: what was asked for, else 512, or fewer where the model has fewer positions.

    Raises:
        LograError: More was asked for than the model's positions.
    """
    from logra_kernels.integrations.causal_lm import positions

    limit = positions(model)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and asked > limit:
        raise LograError(f"--max-length {asked} exceeds the model's {limit} positions; use at most {limit}")
    return asked


def shards(count: int) -> str:
    """A count with its noun."""
    return f"{count:,} shard{'' if count == 1 else 's'}"


def fingerprints(tokenizer: Any, longest: int) -> dict[str, str]:
    """Facts beside the weights without which two gradients are not comparable."""
    return {"tokenizer": _tokenizer_fingerprint(tokenizer), "loss": _LOSS.format(longest)}


def stored_max_length(facts: dict[str, str]) -> int | None:
    """The longest sequence that a store was logged with; None for a store that `logra log` did not write."""
    found = re.fullmatch(re.escape(_LOSS).replace(r"\{\}", r"(\d+)"), facts.get("loss", ""))
    return int(found[1]) if found else None


def progress_bar(total: int, initial: int, title: str) -> tqdm:
    """A bar on stderr with rows, rows/s and time left; in a log file it is a line every ten seconds."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit="row",
        unit_scale=False,
        dynamic_ncols=live,
        smoothing=0.0,  # the mean of all: long batches come first in each window
        mininterval=0.2 if live else 10.0,
        delay=0.0 if live else 10.0,
    )


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are settings of the last call and not of the vocabulary.
        spec = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        spec = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    spec["bos"] = tokenizer.bos_token_id
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:32]
