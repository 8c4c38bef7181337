"""LogIX's names on top of `Run`: `import logra_kernels.compat.logix as logix`.

`session` says what is as in LogIX and what is not. `compat.logix.huggingface` and `compat.logix.lightning` are its
patches of transformers' Trainer and of Lightning, imported by themselves; `passes` says what differs in them.
"""

from logra_kernels.compat.logix import analysis, config, statistic, utils
from logra_kernels.compat.logix.config import Config, LoggingConfig, LoRAConfig
from logra_kernels.compat.logix.current import (
    add_lora,
    build_log_dataloader,
    build_log_dataset,
    clear,
    compute_influence,
    compute_influence_all,
    compute_self_influence,
    end,
    eval,
    finalize,
    get_log,
    init,
    initialize_from_log,
    log,
    save,
    save_lora,
    setup,
    start,
    watch,
    watch_activation,
)
from logra_kernels.compat.logix.scheduler import LogIXScheduler
from logra_kernels.compat.logix.session import LogIX

__all__ = [
    "Config",
    "LoRAConfig",
    "LogIX",
    "LogIXScheduler",
    "LoggingConfig",
    "add_lora",
    "analysis",
    "build_log_dataloader",
    "build_log_dataset",
    "clear",
    "compute_influence",
    "compute_influence_all",
    "compute_self_influence",
    "config",
    "end",
    "eval",
    "finalize",
    "get_log",
    "init",
    "initialize_from_log",
    "log",
    "save",
    "save_lora",
    "setup",
    "start",
    "statistic",
    "utils",
    "watch",
    "watch_activation",
]
