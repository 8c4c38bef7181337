"""LogIX's configuration: the keys of its config.yaml, from a file, a dict or the defaults."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from logra_kernels.errors import LograError
from logra_kernels.ops import FORMATS

DEFAULT_FILE = "./config.yaml"
DTYPES = {"none": "fp32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}


@dataclass
class LoggingConfig:
    """How rows are kept.

    Args:
        flush_threshold, num_workers, cpu_offload: Taken and not needed: rows are committed shard by shard from a thread
            of their own, and curvature is made of the stored rows.
        log_dtype: "none" (fp32), "float32", "float16", "bfloat16" or "int8", which has scales here; or a dtype of
            `Run`'s own.

    Raises:
        ValueError: Another log_dtype.
    """

    flush_threshold: int = 1_000_000_000
    num_workers: int = 1
    cpu_offload: bool = False
    log_dtype: str = "none"

    def __post_init__(self) -> None:
        if self.dtype not in FORMATS:
            raise ValueError(
                f"logix: log_dtype is {self.log_dtype!r}; it must be one of {', '.join((*DTYPES, *FORMATS))}"
            )

    @property
    def dtype(self) -> str:
        """`Run`'s name of it."""
        return DTYPES.get(self.log_dtype, self.log_dtype)


@dataclass
class LoRAConfig:
    """How gradients are projected.

    Args:
        init: "random" (Kaiming uniform, as LogIX draws it, but from `seed`) or "pca".
        rank: Of each side; a side that is narrower keeps its own width.
        parameter_sharing, parameter_sharing_groups: Must be left as they are.
        seed: Of random factors.

    Raises:
        ValueError: Another init, a rank below 1, or parameter sharing.
    """

    init: str = "random"
    rank: int = 64
    parameter_sharing: bool = False
    parameter_sharing_groups: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.init not in ("random", "pca"):
            raise ValueError(f"logix: lora init is {self.init!r}; it must be 'random' or 'pca'")
        if self.rank < 1:
            raise ValueError(f"logix: lora rank is {self.rank}; it must be at least 1")
        if self.parameter_sharing:
            raise ValueError("logix: lora parameter_sharing is not had here: every layer has factors of its own")


@dataclass
class Config:
    """All of it. `Config.of` makes it from a file or a dict."""

    project: str
    root_dir: str = "./logix"
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def log_dir(self) -> str:
        """The project's directory."""
        return os.path.join(self.root_dir, self.project)

    @classmethod
    def of(cls, project: str, given: "str | os.PathLike | Mapping[str, Any] | Config | None" = None) -> "Config":
        """
        Args:
            project: The project's name.
            given: A YAML file, its contents as a dict, or None for the defaults, which also stand in for a file that
                is not there, with a warning unless it is LogIX's default, "./config.yaml".

        Raises:
            ValueError: Unknown keys or values.
            LograError: The file is no YAML, or PyYAML is not installed.
        """
        if isinstance(given, Config):
            return replace(given, project=project)
        if not isinstance(given, Mapping):
            given = {} if given is None else _read(given)
        if "influence" in given:
            raise ValueError("logix: config has a part 'influence'; give mode= and damping= to compute_influence_all")
        known = {**given, "project": project}
        for key, part in (("logging", LoggingConfig), ("lora", LoRAConfig)):
            if isinstance(known.get(key), Mapping):
                known[key] = _made(part, known[key], f"config {key}")
        return _made(cls, known, "config")


def _made(part: type, given: Mapping[str, Any], what: str) -> Any:
    names = [f.name for f in fields(part)]
    unknown = [str(key) for key in given if key not in names]
    if unknown:
        raise ValueError(f"logix: {what} has no key {unknown[0]!r}; it has {', '.join(names)}")
    return part(**given)


def _read(file: str | os.PathLike) -> Mapping[str, Any]:
    path = Path(file)
    if not path.exists():
        if path != Path(DEFAULT_FILE):
            warnings.warn(f"logix: the configuration {path} is missing, so the defaults are used", stacklevel=2)
        return {}
    try:
        import yaml
    except ImportError:
        raise LograError(f"logix: reading {path} needs PyYAML (pip install pyyaml); or give config= a dict") from None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise LograError(f"logix: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping | None):
        raise LograError(f"logix: {path} holds no table of keys; see LogIX's config.yaml")
    return found or {}
