"""Command line of the demo. Nothing heavy is imported before the work starts, so that `--help` is quick."""

import argparse
import importlib.util

from logra_kernels.errors import LograError

# What the demo needs beyond the package's own dependencies, and where to get it.
_EXTRAS = ("transformers", "tokenizers", "jinja2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="model, store and report (default demo-out)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat all of it with N seeds (default 1)")
    parser.add_argument("--steps", type=int, default=None, metavar="N", help="of training (default: about 30 s worth)")
    parser.add_argument("--rank", type=int, default=16, metavar="K", help="keep K x K numbers a layer (default 16)")
    parser.add_argument("--removed", type=int, default=20, metavar="N", help="top rows a query to retrain without")
    parser.add_argument(
        "--modules",
        type=int,
        default=12,
        metavar="N",
        help="train on the N modules with most docstrings, which 30 s can teach (default 12; 0: all)",
    )
    parser.add_argument("--passages", type=int, default=None, metavar="N", help="use at most N passages (default all)")
    parser.add_argument("--no-proof", action="store_true", help="skip the retraining")
    parser.add_argument("--open", action="store_true", help="open the report in a browser")


def run(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code.

    Raises:
        LograError: An option makes no sense, a package is missing, or `--out` holds something else.
    """
    for name, least in (("seeds", 1), ("steps", 1), ("rank", 1), ("modules", 0), ("removed", 1), ("passages", 50)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise LograError(f"--{name} {value} must be at least {least}")
    absent = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if absent:
        raise LograError(f"the demo needs {', '.join(absent)}; pip install 'logra-kernels[demo]'")

    from logra_kernels.demo import main

    return main.run(args)
