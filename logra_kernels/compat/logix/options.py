"""What `setup` asks for, in either of LogIX's dialects.

{"grad": ["log", "covariance"]}, {"forward": ["covariance"], "backward": ["covariance"]}       since June 2024
{"log": "grad", "save": "grad", "statistic": {"grad": "covariance"}}, {"stat": "kfac"}         its paper's
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logra_kernels.compat.logix.statistic import CorrectedEigval, Covariance, Log, Mean, Variance

SIDES = ("forward", "backward", "grad")
PAPER = ("log", "save", "statistic", "stat")
PLUGINS = (Log, Mean, Variance, Covariance, CorrectedEigval)
WHOLE = {
    "raw": {"grad": [Log, Covariance]},
    "kfac": {"forward": [Covariance], "backward": [Covariance]},
    "ekfac": {"grad": [Log, CorrectedEigval]},
    "none": {},
}
INSTEAD = {
    Mean: "take it of the stored rows (session.store.blocks()), or with a hook of your own",
    Variance: "take it of the stored rows (session.store.blocks()), or with a hook of your own",
    Log: "only gradients are logged; take activations with a hook of your own",
    CorrectedEigval: "ask for it of 'grad'",
}


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        log: Whether gradients are logged.
        observe: Whether covariances of activations and output gradients are gathered.
        curvature: "raw" or "ekfac" where a statistic of gradients is asked for.
        save: What the paper's dialect says of it, if anything.
    """

    log: bool = True
    observe: bool = False
    curvature: str | None = None
    save: bool | None = None

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> "Options":
        """
        Raises:
            ValueError: A key, plugin or combination that is unknown or cannot be had; it says what to use instead.
        """
        unknown = [key for key in asked if key not in SIDES + PAPER]
        if unknown:
            raise ValueError(f"setup: unknown key {unknown[0]!r}; it must be one of {', '.join(SIDES + PAPER)}")
        sides: dict[str, list[str]] = {side: _names(asked.get(side)) for side in SIDES}
        for side in _names(asked.get("log")):
            _side("log", side)
            sides[side].append(Log)
        for statistic in (asked.get("statistic"), asked.get("stat")):
            for side, plugins in _statistic(statistic).items():
                sides[side] += _names(plugins)
        save = _save(asked["save"]) if "save" in asked else None
        for side, plugins in sides.items():
            for plugin in plugins:
                _check(side, plugin)
        statistics = [plugin for plugin in sides["grad"] if plugin != Log]
        curvature = {Covariance: "raw", CorrectedEigval: "ekfac"}[statistics[0]] if statistics else None
        if len(set(statistics)) > 1:
            raise ValueError("setup: 'grad' has both covariance and corrected_eigval; ask for one of them")
        observe = bool(sides["forward"] or sides["backward"])
        return cls(bool(sides["grad"]) or save is True, observe, curvature, save)


def _names(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _side(key: str, side: Any) -> None:
    if side not in SIDES:
        raise ValueError(f"setup: {key} is {side!r}; it must be of {', '.join(SIDES)}")


def _statistic(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        if value not in WHOLE:
            raise ValueError(f"setup: statistic is {value!r}; it must be one of {', '.join(WHOLE)}, or a dict")
        return WHOLE[value]
    for side in value:
        _side("statistic", side)
    return value


def _save(value: Any) -> bool:
    """Whether gradients are saved: True, "grad" and ["grad"] say so; False, None, "none" and [] do not."""
    if value is None or isinstance(value, bool):
        return bool(value)
    sides = [side for side in _names(value) if side != "none"]
    for side in sides:
        _side("save", side)
        if side != "grad":
            raise ValueError(f"setup: save is {side!r}; {INSTEAD[Log]}")
    return bool(sides)


def _check(side: str, plugin: Any) -> None:
    if plugin not in PLUGINS:
        raise ValueError(f"setup: {side!r} has an unknown plugin {plugin!r}; it must be one of {', '.join(PLUGINS)}")
    if plugin == Covariance or (side == "grad" and plugin in (Log, CorrectedEigval)):
        return
    raise ValueError(f"setup: {plugin!r} of {side!r} is not had here: {INSTEAD[plugin]}")
