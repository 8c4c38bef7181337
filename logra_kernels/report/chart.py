"""Geometry of the page's charts. Positions are percentages of the width, so a chart fits any screen unscaled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from logra_kernels.report.model import Answer, Proof, spread


@dataclass(frozen=True)
class Axis:
    """A linear scale with round ticks; `low` and `high` are at 0% and 100%."""

    low: float
    high: float
    ticks: Sequence[float]

    def at(self, value: float) -> str:
        """Position of a value, as CSS and SVG take it."""
        return f"{100 * (value - self.low) / (self.high - self.low):.3f}%"

    def label(self, value: float) -> str:
        """A tick's number with as many decimals as the ticks need."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"

    @classmethod
    def around(cls, values: Sequence[float], ticks: int = 5) -> "Axis":
        """A scale that holds all values between round ends, with about `ticks` ticks."""
        low, high = min(values), max(values)
        width = (high - low) or abs(high) or 1.0
        magnitude = 10.0 ** math.floor(math.log10(width / ticks))
        step = next(m * magnitude for m in (1, 2, 5, 10) if width / (m * magnitude) <= ticks)
        first = math.floor(low / step)
        last = max(math.ceil(high / step), first + 1)
        return cls(first * step, last * step, [i * step for i in range(first, last + 1)])


@dataclass(frozen=True)
class Mark:
    """One arm in one line of the proof's chart: the mean, and the extremes over the seeds."""

    arm: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One line of the proof's chart: a query, or the mean over all of them."""

    name: str
    excerpt: str
    marks: Sequence[Mark]


def proof_lines(proof: Proof, answers: Sequence[Answer]) -> list[Line]:
    """The mean over the queries first, then every query with the beginning of its text."""
    texts = {answer.id: answer.prompt + answer.completion for answer in answers}
    arms = {"full": proof.full, "random": proof.random, "top": proof.top}
    lines = [Line("mean", "", [_mark(name, arm.means()) for name, arm in arms.items()])]
    for index, query in enumerate(proof.queries):
        lines.append(
            Line(
                query,
                " ".join(texts.get(query, "").split())[:60],
                [_mark(name, [losses[index] for losses in arm.losses]) for name, arm in arms.items()],
            )
        )
    return lines


def _mark(arm: str, values: Sequence[float]) -> Mark:
    return Mark(arm, sum(values) / len(values), min(values), max(values))


def diverging(values: Sequence[float]) -> tuple[str, list[tuple[str, str]]]:
    """Bars that grow from a common zero: the zero's position, and (start, width) of each bar."""
    low, high = min([0.0, *values]), max([0.0, *values])
    axis = Axis(low, high if high > low else low + 1.0, ())
    return axis.at(0.0), [(axis.at(min(0.0, v)), axis.at(low + abs(v))) for v in values]


def number(value: float, signed: bool = False) -> str:
    """Three significant digits, in full between 0.001 and a million, with the typographer's minus."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e6
    if plain:
        places = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:+,.{places}f}" if signed else f"{value:,.{places}f}"
    else:
        text = f"{value:+.2e}" if signed else f"{value:.2e}"
    return text.replace("-", "\N{MINUS SIGN}")


def with_spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean to three decimals, and plus-minus the standard deviation where there are several values."""
    center = sum(values) / len(values)
    deviation = spread(values)
    text = f"{center:+.3f}" if signed else f"{center:.3f}"
    text = text.replace("-", "\N{MINUS SIGN}")
    return text if deviation is None else f"{text} ± {deviation:.3f}"
