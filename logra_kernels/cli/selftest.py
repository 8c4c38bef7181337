"""`logra selftest`: every backend's numbers on this machine."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, help="of the random inputs; a failing check names its own")


def run(args: argparse.Namespace) -> int:
    """Print the table of all checks; 1 where a number is wrong."""
    from logra_kernels import selftest

    checks = selftest.run(args.seed)
    print(selftest.render(checks))
    return int(any(check.failed for check in checks))
