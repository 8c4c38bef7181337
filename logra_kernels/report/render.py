"""Report -> one HTML file: template and style sheet in, nothing that a browser would have to fetch out."""

import os
from importlib import resources
from pathlib import Path

from logra_kernels.report import chart
from logra_kernels.report.model import Provider, Report

_SHOWN_PROVIDERS = 15


def render(report: Report, path: str | os.PathLike) -> Path:
    """Write a report as one self-contained HTML file and return its absolute path.

    Every text is escaped, and the page forbids itself to load or run anything. The file appears in one piece.

    Raises:
        ImportError: jinja2 is not installed.
        OSError: The file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("logra_kernels.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    proof = report.proof
    lines = chart.proof_lines(proof, report.answers) if proof else []
    shown, rest = _providers(report)
    zero, bars = chart.diverging([provider.value for provider in shown])
    html = template.render(
        report=report,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        chart=chart,
        lines=lines,
        axis=chart.Axis.around([v for line in lines for mark in line.marks for v in (mark.low, mark.high)] or [0.0]),
        providers=list(zip(shown, bars, strict=True)),
        provider_zero=zero,
        provider_rest=rest,
    )
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Surrogates and NUL come through json and files of any kind; HTML and UTF-8 have no place for them.
    data = html.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    temporary = target.with_name(target.name + ".part")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a page helps nobody, and takes what a full disk lacks
        raise
    return target


def _providers(report: Report) -> tuple[list[Provider], Provider | None]:
    """The sources that get a line each, and all others as one."""
    shown = list(report.providers[:_SHOWN_PROVIDERS])
    others = report.providers[_SHOWN_PROVIDERS:]
    if not others:
        return shown, None
    name = f"{len(others)} other {report.provider_noun}{'s' if len(others) > 1 else ''}"
    return shown, Provider(name, sum(p.rows for p in others), sum(p.value for p in others))
