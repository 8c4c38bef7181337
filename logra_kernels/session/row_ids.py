"""Ids as a run takes them: strings, and whole numbers, which are known by their digits."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor


def row_ids(op: str, ids: Iterable[object]) -> list[str]:
    """Ids as the store keeps them.

    Args:
        op: Whose `ids` they are, for errors.
        ids: Strings or whole numbers: a list, or what a DataLoader makes of them, a tensor or array [N].

    Raises:
        ValueError: Something else, or one string alone.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) != 1:
        what = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor | np.ndarray) else repr(ids)
        raise ValueError(f"{op}: ids is {what}; it must be a list, one id a sample")
    return [_row_id(op, i) for i in (ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids)]


def _row_id(op: str, name: object) -> str:
    if isinstance(name, str):
        return str(name)
    single = isinstance(name, np.generic) or (isinstance(name, Tensor) and name.dim() == 0)
    number = name.item() if single else name  # type: ignore[attr-defined]
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(
            f"{op}: an id is {name!r}, a {type(name).__name__}; ids must be strings, or whole numbers, which are known"
            " by their digits"
        )
    return str(number)
