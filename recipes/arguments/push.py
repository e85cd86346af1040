"""The arguments of `retention-gates push`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument(
        "repository", metavar="REPO", help="name on the Hub, as in user/adapter; made if there is none"
    )
    parser.add_argument("--private", action="store_true", help="only those you let in may see it")
    parser.add_argument("--revision", metavar="BRANCH", help="upload to this branch, made if there is none")
    parser.add_argument("--token", help="a token that may write (default: HF_TOKEN, or that of hf auth login)")
    parser.add_argument(
        "--base-model", metavar="NAME", help="the base model's name on the Hub, if the adapter names a folder"
    )
    parser.add_argument(
        "--licence", "--license", metavar="ID", help="of the gates, as the Hub calls it: apache-2.0, mit"
    )
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="DIR", help="folders that evaluate has written"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the card and upload nothing")
