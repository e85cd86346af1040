"""Tells whether this process was started as the command or as a program that imports the package."""

import sys
from pathlib import Path
from typing import NoReturn

PROGRAM = "retention-gates"
PACKAGE = Path(__file__).parent


def is_command() -> bool:
    """Whether it runs `retention-gates`, `python -m retention_gates` or a file of recipes."""
    if not sys.argv:  # Python inside another program
        return False
    started = Path(sys.argv[0])
    if started.name == "-m":  # Python has not found the module yet
        return any(word.removeprefix("-m").split(".")[0] == PACKAGE.name for word in sys.orig_argv)
    return started.stem == PROGRAM or (
        started.is_file() and started.resolve().is_relative_to((PACKAGE / "recipes").resolve())
    )


def stop(error: Exception) -> NoReturn:
    """Ends the command as every mistake of its user does: one line, exit code 2."""
    print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from error
