"""`logra`: the parser, and errors as one line on stderr with an exit code.

0 done    1 error    2 wrong usage    130 interrupted
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import shlex
import sys
from collections.abc import Sequence

from logra_kernels.errors import LograError

VERBS = {
    "demo": "train a small model on Python's documentation and ask where its words come from",
    "plan": "what logging and asking will cost: disk, memory, time",
    "log": "write one projected gradient for each row of a data set into a store",
    "query": "find the stored rows that taught a model what it says",
    "info": "what a store holds; with --verify, whether it is intact",
    "index": "let queries find their best rows without reading the others",
    "merge": "make one store of several that were logged in the same way",
    "delete": "take rows out of a store, by their ids or by a column",
    "compact": "write a store's files again without its deleted rows",
    "quantize": "a store's rows in another number format, and what that costs them",
    "fsck": "whether every byte of a store is as it was written; with --repair, keep what is",
    "import": "make a store of rows that LogIX or Bergson has logged",
    "export": "a store's rows for NumPy, FAISS or Hugging Face datasets",
    "selftest": "check the numbers of every backend on this machine",
}

MODULES = {"import": "import_rows"}  # of verbs that are words of Python


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `logra` command and return its exit code; wrong usage exits by SystemExit(2) as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    args.command_line = shlex.join(["logra", *arguments])
    try:
        code = args.run(args)
        # Output that a closed pipe did not take must fail here, inside the handlers, not at interpreter exit.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print("logra: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None or args.debug:
            raise
        print(f"logra: error: {message}", file=sys.stderr)
        return 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="logra", description="Which training examples made the model say this, and what is each worth?"
    )
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb, summary in VERBS.items():
        child = verbs.add_parser(verb, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if verb == chosen:
            # Only the verb at hand is imported: `logra --help` stays fast and one broken verb stops no other.
            module = importlib.import_module(f"logra_kernels.cli.{MODULES.get(verb, verb)}")
            module.add_arguments(child)
            child.set_defaults(run=module.run)
        child.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return parser


def _message(error: Exception) -> str | None:
    """One line for the errors that a user can do something about; None for a fault of the program."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory; lower --batch-size or --max-length, the rows that are stored are kept"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        advice = {
            errno.ENOSPC: "; free some space and run the same command to go on",
            errno.EDQUOT: "; free some of the quota and run the same command to go on",
            errno.EFBIG: "; raise the file size limit (ulimit -f) and run the same command to go on",
        }
        return f"{error.strerror or error}{where}{advice.get(error.errno or 0, '')}"
    if isinstance(error, LograError | ValueError):
        return " ".join(str(error).split()) or type(error).__name__
    return None


if __name__ == "__main__":
    sys.exit(main())
