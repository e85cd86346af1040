"""The arguments of `retention-gates train`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run: model, gate, data, training, ...")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="replaces values of the file; resume=true goes on with a run that was stopped",
    )
