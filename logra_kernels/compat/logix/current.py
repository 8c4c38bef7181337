"""The session that LogIX's module-level functions speak to."""

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from logra_kernels.compat.logix.config import DEFAULT_FILE, Config
from logra_kernels.compat.logix.session import LogIX

_current: LogIX | None = None


def init(project: str, config: str | os.PathLike | Mapping[str, Any] | Config | None = DEFAULT_FILE) -> LogIX:
    """A new session, which the module's functions speak to from now on; an earlier one's rows are committed.

    Args, raises:
        As `LogIX`.
    """
    global _current
    if _current is not None:
        _current._project.close()
    _current = LogIX(project, config)
    return _current


def _of_current(method: Callable) -> Callable:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if _current is None:
            raise RuntimeError("logix is not initialized; call logix.init(project) first")
        return method(_current, *args, **options)

    return call


add_lora = _of_current(LogIX.add_lora)
build_log_dataloader = _of_current(LogIX.build_log_dataloader)
build_log_dataset = _of_current(LogIX.build_log_dataset)
clear = _of_current(LogIX.clear)
compute_influence = _of_current(LogIX.compute_influence)
compute_influence_all = _of_current(LogIX.compute_influence_all)
compute_self_influence = _of_current(LogIX.compute_self_influence)
end = _of_current(LogIX.end)
eval = _of_current(LogIX.eval)
finalize = _of_current(LogIX.finalize)
get_log = _of_current(LogIX.get_log)
initialize_from_log = _of_current(LogIX.initialize_from_log)
log = _of_current(LogIX.log)
save = _of_current(LogIX.save)
save_lora = _of_current(LogIX.save_lora)
setup = _of_current(LogIX.setup)
start = _of_current(LogIX.start)
watch = _of_current(LogIX.watch)
watch_activation = _of_current(LogIX.watch_activation)
