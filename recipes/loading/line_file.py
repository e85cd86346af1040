"""A file of JSON lines that grows while a command runs, and outlives a command that is killed."""

import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from retention_gates.recipes.loading.output_folder import write_text

SECONDS = 1.0  # between two writes: each waits for the disk


class LineFile:
    """Objects that are on the disk a second after they are added.

    Args:
        keys: what each object has at least.

    A last line that was cut off, as a killed run leaves it, is dropped.

    Attributes:
        objects: those of the file, then those that were added.

    Raises:
        ValueError: for any other line that is no JSON object with these keys.
    """

    def __init__(self, path: Path, keys: Collection[str]):
        self.path = path
        self.objects: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []
        self.written = time.monotonic()
        content = path.read_bytes() if path.exists() else b""
        *lines, torn = content.split(b"\n")
        self.whole = len(content) - len(torn)
        for number, text in enumerate(lines, start=1):
            try:
                found = json.loads(text)
            except ValueError:
                found = None
            if not isinstance(found, dict) or not set(keys) <= found.keys():
                raise ValueError(
                    f"Line {number} of {path} is damaged: delete that line to have it written anew, or the file to "
                    "start again."
                )
            self.objects.append(found)

    def add(self, found: dict[str, Any]) -> None:
        self.objects.append(found)
        self.pending.append(found)
        if time.monotonic() - self.written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added."""
        if self.pending:
            with open(self.path, "ab") as file:
                file.truncate(self.whole)
                file.write(json_lines(self.pending).encode())
                file.flush()
                os.fsync(file.fileno())
                self.whole = file.tell()
            self.pending = []
        self.written = time.monotonic()

    def rewrite(self, objects: list[dict[str, Any]]) -> None:
        """Replaces the file by one with these objects."""
        write_text(self.path, json_lines(objects))
        self.objects, self.pending, self.whole = objects, [], self.path.stat().st_size


def json_lines(objects: list[dict[str, Any]]) -> str:
    """Each object in a line of its own."""
    return "".join(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in objects)
