"""Which layers share one block of a curvature, and where its columns lie in a row."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor

Groups = Mapping[str, Sequence[str]] | Sequence[str]
Columns = slice | Tensor  # what picks a block's columns out of rows [n, D]; a tensor where they are not side by side


def matching(layers: Sequence[str], groups: Groups) -> dict[str, list[str]]:
    """Group name -> its layers, in the order of `layers`.

    Args:
        layers: All there are.
        groups: {name: [glob patterns on layer names]}, or a list of patterns that are their groups' names.

    Raises:
        ValueError: A pattern matches no layer, or two groups share a layer.
    """
    if isinstance(groups, str):
        raise ValueError(f"groups: {groups!r} is one string; give a list of patterns, or names with lists of patterns")
    named = groups if isinstance(groups, Mapping) else {pattern: [pattern] for pattern in groups}
    owner: dict[str, str] = {}
    for group, patterns in named.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = [name for name in layers if fnmatchcase(name, pattern)]
            if not matched:
                some = ", ".join(list(layers)[:8])
                raise ValueError(
                    f"groups: {pattern!r} of {group!r} matches none of the {len(layers)} layers ({some}, ...)"
                )
            for name in matched:
                if owner.setdefault(name, group) != group:
                    raise ValueError(f"groups: layer {name!r} is in {owner[name]!r} and in {group!r}; let it be in one")
    return {group: [name for name in layers if owner.get(name) == group] for group in named}


def members_of(layers: Sequence[str], groups: Groups) -> dict[str, list[str]]:
    """Block name -> its layers: those of each group together, every other layer by itself.

    Raises:
        ValueError: As `matching`, or a group has the name of a layer that is not in it.
    """
    grouped = matching(layers, groups)
    owner = {layer: group for group, names in grouped.items() for layer in names}
    for group, names in grouped.items():
        if group in layers and group not in names:
            raise ValueError(f"groups: {group!r} is the name of a layer that is not in it; name the group otherwise")
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(owner.get(layer, layer), []).append(layer)
    return found


def columns_of(layers: Mapping[str, tuple[int, int]], members: Mapping[str, Sequence[str]]) -> dict[str, Columns]:
    """Block name -> its columns of a row that holds all layers (name -> (k_out, k_in)) side by side."""
    parts, end = {}, 0
    for name, (k_out, k_in) in layers.items():
        parts[name] = slice(end, end + k_out * k_in)
        end += k_out * k_in
    found: dict[str, Columns] = {}
    for block, names in members.items():
        own = [parts[name] for name in names]
        if all(a.stop == b.start for a, b in pairwise(own)):
            found[block] = slice(own[0].start, own[-1].stop)
        else:
            found[block] = torch.cat([torch.arange(part.start, part.stop, device="cpu") for part in own])
    return found


def width_of(columns: Columns) -> int:
    """d, how many columns there are."""
    return columns.stop - columns.start if isinstance(columns, slice) else len(columns)
