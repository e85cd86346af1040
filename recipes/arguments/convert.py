"""The arguments of `retention-gates convert`."""

import argparse
from pathlib import Path

OURS, THEIRS = "adapter", "trimkv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub name of what is converted")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder that is written; it must not exist yet")
    parser.add_argument(
        "--to",
        choices=(OURS, THEIRS),
        default=OURS,
        help="an adapter of ours, or the authors' form (default: adapter)",
    )
    parser.add_argument("--base-model", metavar="NAME", help="the base model (default: the one that SOURCE names)")
    theirs = parser.add_argument_group("only with --to trimkv")
    theirs.add_argument("--memory-size", type=int, metavar="M", help="entries per KV head, for config.json there")
    theirs.add_argument(
        "--global-capacity", action="store_true", help="say that the capacity loss was that of all heads together"
    )
    theirs.add_argument(
        "--drop-protected-tokens", action="store_true", help="convert though the runtime there protects no tokens"
    )
