"""python -m bench.accuracy --study {digits,fmnist,patches}: the table, and bench/results/accuracy-<study>.json."""

from __future__ import annotations

import argparse
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from . import methods, peers, session, table
from .data import load
from .gradients import Case
from .lds import ceiling
from .setting import STUDIES
from .truth import truth


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=__doc__)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--methods", default="*", help="globs on method names, comma between; 'kfac/*,raw/pca64/*'")
    parser.add_argument("--checkpoints", type=int, help="score only the first few models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has the peers' packages")
    parser.add_argument("--out", type=Path, help="the JSON file; default bench/results/accuracy-<study>.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    setting = STUDIES[options.study]
    data = load(setting)
    say(f"{setting.study}: {setting.subsets} subsets x {setting.seeds} seeds, setting {setting.key}")
    began = time.perf_counter()
    found = truth(setting, data, progress=lambda n: say(f"  {n} models retrained, {time.perf_counter() - began:.0f} s"))
    globs = options.methods.split(",")
    formulas = methods.registry().values() if setting.positions is None else ()  # which have one position a sample
    known = [*formulas, *session.registry(setting).values()]
    chosen = [m for m in known if any(fnmatchcase(m.name, glob) for glob in globs)]
    rows = {method.name: table.Row.of(method) for method in chosen}
    for index in range(options.checkpoints or setting.checkpoints):
        case = Case(setting, data, found.weights, index)
        space = None
        for method in chosen:
            if space != (method.projection, method.k):
                case.forget()
                space = (method.projection, method.k)
            began = time.perf_counter()
            scores = method(case)
            rows[method.name].add(scores, found, time.perf_counter() - began)
            say(f"  model {index} {method.name} {rows[method.name].lds[-1].mean():.3f}")
        others = peers.scores(case, options.peers, say) if setting.positions is None else {}
        for name, (scores, seconds) in others.items():
            rows.setdefault(name, table.Row.peer(name)).add(scores, found, seconds)
    agreement = ceiling(found)
    table.show(list(rows.values()), float(agreement.mean()))
    default = Path(__file__).parents[1] / "results" / f"accuracy-{setting.study}.json"
    table.write(options.out or default, setting, list(rows.values()), agreement)
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
