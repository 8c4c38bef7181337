"""What a study prints and keeps."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .lds import estimate, lds
from .methods import Method
from .session import Session
from .setting import Setting
from .truth import Truth

# what the others are compared with, query by query
REFERENCES = ("ekfac/none/0.1", "ekfac/none/1", "raw/pca64/0.1", "raw/orthonormal64/0.1")


@dataclass
class Row:
    """One method's LDS on every model and query."""

    name: str
    spec: dict
    lds: list[Tensor] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, method: Method | Session) -> Row:
        return cls(method.name, asdict(method))

    @classmethod
    def peer(cls, name: str) -> Row:
        package, what = name.split(":")
        curvature, damping = what.split("/")
        return cls(name, {"curvature": curvature, "projection": package, "k": 0, "damping": damping, "mode": "dot"})

    def add(self, scores: Tensor, truth: Truth, seconds: float) -> None:
        self.lds.append(lds(scores, truth))
        self.margin.append(lds(scores, truth, "margin"))
        self.seconds.append(seconds)

    def to_dict(self, references: dict[str, Row]) -> dict:
        values = torch.stack(self.lds)
        found = estimate(values)
        against = {}
        for name, other in references.items():
            if name != self.name and len(other.lds) == len(self.lds):
                gap = estimate(values - torch.stack(other.lds))
                against[name] = [round(gap.mean, 4), round(gap.se, 4)]
        return {
            "method": self.name,
            **self.spec,
            "lds": round(found.mean, 4),
            "se_models": round(found.se_models, 4),
            "se_queries": round(found.se_queries, 4),
            "each_model": [round(float(v.mean()), 4) for v in self.lds],
            "lds_margin": round(float(torch.stack(self.margin).mean()), 4),
            "seconds": round(sum(self.seconds) / len(self.seconds), 2),
            "difference": against,
        }


def show(rows: list[Row], ceiling: float) -> None:
    print("curvature              projection      k      damping mode        LDS   s.e.      s")
    for row in rows:
        found, spec = estimate(torch.stack(row.lds)), row.spec
        curvature = spec["curvature"] + (f"({spec['alpha']:g})" if spec.get("alpha", 1) != 1 else "")
        damping = "" if curvature == "identity" else str(spec["damping"])
        damping += " whole" if spec.get("whole") else ""
        print(
            f"{curvature:22s} {spec['projection']:12s} {spec['k'] or '':>4} {damping:>12s} {spec['mode']:8s}"
            f" {found.mean:6.3f} {found.se:6.3f} {sum(row.seconds) / len(row.seconds):6.1f}"
        )
    print(f"agreement of one seed with the mean of the others: {ceiling:.3f}")


def write(path: Path, setting: Setting, rows: list[Row], agreement: Tensor) -> None:
    """One line a method, so that a diff shows what moved; methods not run this time stay if the setting does."""
    references = {row.name: row for row in rows if row.name in REFERENCES}
    head = {
        "setting": {**setting.facts, "key": setting.key},
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "agreement_of_seeds": round(float(agreement.mean()), 4),
        "note": "lds: mean over models and queries; difference: [mean, standard error], paired by model and query",
    }
    commit = _commit()
    found = {row.name: {**row.to_dict(references), "commit": commit} for row in rows}
    before = json.loads(path.read_text()) if path.exists() else None
    if before is not None and before["setting"]["key"] == setting.key:
        found = {old["method"]: old for old in before["rows"]} | found
    lines = [json.dumps(row) for row in found.values()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()
