"""The arguments of `retention-gates answers`."""

import argparse
from pathlib import Path

from retention_gates.recipes.arguments.shared import add_device_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "questions",
        metavar="SOURCE",
        help="file, folder or glob (.jsonl, .json, .parquet, .txt, .md), or a Hub data set",
    )
    parser.add_argument("--model", required=True, help="base model that answers: Hub name or folder")
    parser.add_argument("--gguf-file", metavar="NAME", help="the file inside --model that holds the weights as GGUF")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for answers.jsonl")
    add_device_arguments(parser)
    data = parser.add_argument_group("questions")
    data.add_argument("--split", help="split of a Hub data set (default: train)")
    data.add_argument("--subset", help="configuration of a Hub data set that has several")
    field = data.add_mutually_exclusive_group()
    field.add_argument("--text-field", metavar="COLUMN", help="column with the question (default: text)")
    field.add_argument(
        "--chat-field", metavar="COLUMN", help="column with chats, which are answered up to the user's last turn"
    )
    data.add_argument(
        "--work-field", metavar="COLUMN",
        help="column that names the work of a question, as train splits by works (default: each question is a work)",
    )  # fmt: skip
    data.add_argument(
        "--solution-field", metavar="COLUMN",
        help="column with the data set's own answers, which become chats of the same works in solutions.jsonl",
    )  # fmt: skip
    data.add_argument("--instruction", metavar="TEXT", help="put behind every question, as a paragraph of its own")
    data.add_argument("--limit", type=int, metavar="N", help="random questions, by --seed (default: all)")
    data.add_argument(
        "--longest-question", type=int, metavar="T", help="tokens; longer ones are left out (default: none are)"
    )
    group = parser.add_argument_group("answers")
    group.add_argument("--batch-size", type=int, default=16, metavar="B", help="written at a time (default: 16)")
    group.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="of each (default: 1024)")
    group.add_argument("--samples", type=int, default=1, metavar="N", help="to each question (default: 1)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="answers are drawn above 0 (default: 0, the likeliest token each time)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the draws and of --limit (default: 0)")
