"""What the demo prints: progress on stderr, results on stdout."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm import tqdm

from logra_kernels.report import Answer, Proof, Provider

_SHOWN_ROWS = 3
_SHOWN_PROVIDERS = 10


def progress(title: str) -> Callable[..., Any]:
    """A tqdm with a title; where stderr is a file it writes a line every ten seconds instead of redrawing."""
    live = sys.stderr.isatty()
    return partial(tqdm, desc=f"{title:<24}", dynamic_ncols=live, mininterval=0.2 if live else 10.0)


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar of training steps, moved by a function of the running loss."""
    with progress(title)(total=total, unit="step") as bar:

        def step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        yield step


def stage(text: str) -> None:
    """One line about what was done, at once also where stdout is a pipe."""
    print(text, flush=True)


def answer(found: Answer) -> None:
    """One query and its first rows."""
    width = shutil.get_terminal_size((110, 24)).columns
    print(f"\n{found.id}  {found.origin}, {found.loss / found.tokens:.3f} nats a token")
    print(f"    {_clip(found.prompt, width // 2 - 8)!r} -> " if found.prompt else "    ", end="")
    print(repr(_clip(found.completion, width - 12 - (len(found.prompt) + 6 if found.prompt else 0))))
    for rank, row in enumerate(found.top[:_SHOWN_ROWS], start=1):
        head = f"  {rank:>3}  {row.score:>7.3g}  {_clip(row.source, 26):<26}  "
        print(head + _clip(row.text, width - len(head)))


def providers(values: Sequence[Provider]) -> None:
    """The sources of highest value."""
    print("\nValue by module, summed over the queries (of highest value first)")
    for provider in values[:_SHOWN_PROVIDERS]:
        print(f"  {provider.value:>+10.4g}  {provider.source} ({provider.rows} passages)")


def proof(found: Proof) -> None:
    """Mean query loss under each arm."""
    from logra_kernels.report.chart import with_spread

    print("\nProof: the queries' mean loss in nats a token, after training again without some passages")
    for arm in (found.full, found.random, found.top):
        removed = ", ".join(str(n) for n in sorted(set(arm.removed)))
        change = "" if arm is found.full else f"   {with_spread(found.raises(arm), signed=True)}"
        print(f"  {arm.name:<26} {removed:>14} removed   {with_spread(arm.means())}{change}")
    seeds = len(found.full.losses)
    if found.holds():
        detail = f", in each of {seeds} seeds and beyond their spread" if seeds > 1 else ""
        print(f"  Removing the top passages hurts more than removing random ones{detail}.")
    else:
        print("  Removing the top passages does not hurt more than removing random ones, beyond the spread.")


def _clip(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: max(0, width - 3)] + "..."
