"""The arguments of `retention-gates calibrate`."""

import argparse
from pathlib import Path

from retention_gates.recipes.arguments.shared import add_model_arguments, add_text_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter_required=True)
    add_text_arguments(parser, rows=8, length=1024, rows_option="--rows", training_works=True)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write a copy of the adapter there (default: change it in place)"
    )
