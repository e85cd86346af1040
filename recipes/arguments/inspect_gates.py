"""The arguments of `retention-gates inspect`."""

import argparse
from pathlib import Path

from retention_gates.recipes.arguments.shared import add_model_arguments, add_text_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter_required=True)
    add_text_arguments(parser, rows=4, length=512, rows_option="--rows")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="text file whose tokens are shown (default: a passage of --text)"
    )
    parser.add_argument(
        "--memory-size", type=int, default=64, metavar="M", help="entries kept per KV head, in the mean (default: 64)"
    )
    parser.add_argument(
        "--budgets", help="uniform, calibrated or pyramid (default: calibrated if the adapter has been, else uniform)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")
