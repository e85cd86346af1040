"""The command `retention-gates`."""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from retention_gates.process import PROGRAM

# command -> (its module in recipes, whose arguments are in recipes/arguments, and one line of help)
COMMANDS = {
    "train": ("train", "train gates on a base model, as a YAML file says"),
    "evaluate": ("evaluate", "compare policies and memory sizes with the full cache"),
    "generate": ("generate", "generate text with a bounded memory"),
    "answers": ("answers", "write the base model's own answers to questions, to train gates on"),
    "calibrate": ("calibrate", "measure each head's share of the memory and store it in the adapter"),
    "inspect": ("inspect_gates", "draw what the gates have learnt"),
    "serve": ("serve", "serve a model under the OpenAI API, each chat with a bounded memory"),
    "push": ("push", "upload an adapter and its model card to the Hub"),
    "convert": ("convert", "turn the authors' released gates into an adapter, or an adapter into their form"),
}
SHIPPED = "shipped"  # the adapter that comes with the package for the base model


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; of recipes, only the given command's arguments are imported, so that help costs nothing."""
    parser = _Parser(
        prog=PROGRAM, description="A KV cache of fixed size for any Hugging Face decoder.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=help_line, description=help_line[:1].upper() + help_line[1:] + ".", allow_abbrev=False
        )
        if name == command:
            importlib.import_module(f"retention_gates.recipes.arguments.{module}").add_arguments(subparser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code: 0, 2 for a user's mistake, 130 after ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser(arguments[0] if arguments else None).parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # what libraries announce to programmers is nothing that the user of a command can act upon
            warnings.simplefilter("ignore", FutureWarning)
            if getattr(options, "strict_base", False):
                from retention_gates.gates.adapter.base_identity import BaseMismatchWarning

                warnings.simplefilter("error", BaseMismatchWarning)
            if getattr(options, "adapter", None) == SHIPPED:
                shipped = importlib.import_module("retention_gates.checkpoints.shipped")
                model = getattr(options, "model", None)
                is_copy = model is not None and os.path.isdir(
                    model
                )  # whose name is a path; weights are compared later
                options.adapter = str(shipped.shipped_adapter(None if is_copy else model))
            if os.environ.get("RANK", "0") == "0":
                _show_log("retention_gates.kernels")
            try:
                importlib.import_module(f"retention_gates.recipes.{COMMANDS[options.command][0]}").main(options)
            finally:
                importlib.import_module("retention_gates.recipes.loading.output_folder").release_outputs()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        from tqdm import tqdm

        # print would go on in the line of a progress bar that the error has stopped
        tqdm.write(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _show_log(name: str) -> None:
    """Writes what this logger says, from INFO on, to stderr; between the lines of a progress bar."""
    logger = logging.getLogger(name)
    if not any(isinstance(handler, _BesideProgress) for handler in logger.handlers):
        logger.addHandler(_BesideProgress())
    logger.setLevel(logging.INFO)


def _is_users_mistake(error: Exception) -> bool:
    from safetensors import SafetensorError

    return isinstance(error, (ValueError, OSError, SafetensorError))


class _BesideProgress(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{PROGRAM}: {self.format(record)}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message}; {self.prog} --help shows what is allowed\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from retention_gates import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()
