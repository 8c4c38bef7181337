"""Turns pytest-benchmark's JSON into the compact results that are committed, one file for each op and machine.

    python -m pytest bench --benchmark-json=raw.json && python bench/record.py raw.json

A row holds times in microseconds, rates worked out from the median, the times of one torch product of the same flops
and of the compositions over this one's where the bench measures these in turn with it, and the naive composition's
time over this one's where both were measured, in turn if they were; a cell whose numbers were wrong has failed before
it was timed and is not there.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
RUN = ("machine", "commit", "torch", "triton")  # the same for every row of a file
CELL = ("shape", "dtype", "device", "threads")


def slug(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def row(info: dict, stats: dict, naive_median: float | None) -> dict:
    median = stats["median"]
    made = {key: info[key] for key in ("provider", *CELL)}
    made |= {f"{name}_us": round(stats[name] * 1e6, 1) for name in ("median", "min", "iqr")}
    made |= {"rounds": stats["rounds"], "gflops": round(info["flops"] / median / 1e9, 1)}
    made["gbytes_per_s"] = round(info["bytes"] / median / 1e9, 2)
    made |= {key: info[key] for key in ("gemm_share", "interleaved") if key in info}
    if naive_median is not None and info["provider"] != "naive":
        made["speedup"] = info.get("interleaved", {}).get("naive", round(naive_median / median, 2))
    return made


def compact(raw: dict) -> dict[str, dict]:
    """File name to contents, for every op and machine among the benchmarks that name both."""
    measured = [b for b in raw["benchmarks"] if {"op", "provider", *RUN, *CELL} <= b["extra_info"].keys()]
    naive = {}
    files: dict[str, list] = defaultdict(list)
    for bench in measured:
        info = bench["extra_info"]
        if info["provider"] == "naive":
            naive[info["op"], *(info[key] for key in CELL)] = bench["stats"]["median"]
        files[f"{info['op']}-{slug(info['machine'])}.json"].append(bench)
    made = {}
    for name, benches in files.items():
        first = benches[0]["extra_info"]
        rows = []
        for bench in benches:
            info = bench["extra_info"]
            rows.append(row(info, bench["stats"], naive.get((info["op"], *(info[key] for key in CELL)))))
        made[name] = {"op": first["op"], **{key: first[key] for key in RUN}, "rows": rows}
    return made


def text(contents: dict) -> str:
    """One line a row, so that a change of numbers is a readable diff."""
    head = json.dumps({key: value for key, value in contents.items() if key != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(r) for r in contents["rows"])
    return head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'


def main(path: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name, contents in compact(json.loads(Path(path).read_text())).items():
        (RESULTS / name).write_text(text(contents))
        print(f"bench/results/{name}: {len(contents['rows'])} rows")


if __name__ == "__main__":
    main(sys.argv[1])
