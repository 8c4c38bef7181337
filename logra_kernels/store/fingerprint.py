"""Whether a store and its user speak of the same thing."""

from collections.abc import Mapping

from logra_kernels.errors import StoreMismatch


def differences(stored: Mapping[str, str], given: Mapping[str, str]) -> list[str]:
    """One phrase for each entry that differs or is missing on either side; empty when all agree."""
    found = []
    for name in dict.fromkeys((*stored, *given)):
        if name not in given:
            found.append(f"{name}: the store has {stored[name]!r}, yours is missing")
        elif name not in stored:
            found.append(f"{name}: the store has none, yours is {given[name]!r}")
        elif stored[name] != given[name]:
            found.append(f"{name}: the store has {stored[name]!r}, yours is {given[name]!r}")
    return found


def check_fingerprints(store: str, stored: Mapping[str, str], given: Mapping[str, str]) -> None:
    """
    Raises:
        StoreMismatch: Lists every difference.
    """
    found = differences(stored, given)
    if found:
        bits = "model" in stored and stored["model"] != given.get("model", stored["model"])
        raise StoreMismatch(
            f"{store} was written for something else: {'; '.join(found)};"
            f"{' a model in another dtype counts as another one;' if bits else ''}"
            " use what it was written with, or log a new store"
        )
