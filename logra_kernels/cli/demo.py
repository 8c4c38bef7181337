"""`logra demo`: the main job on text that every machine has."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from logra_kernels import demo

    demo.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from logra_kernels import demo

    return demo.run(args)
