"""Scores that are kept as they are computed, so that a run that was stopped goes on, and a second one is free."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retention_gates.recipes.comparison.fingerprints import of_value
from retention_gates.recipes.loading.output_folder import claim_output

STORE, ANSWERS = "scores.jsonl", "answers.jsonl"  # of simulations, and of what was written
Unit = dict[str, Any]  # all that a score depends on: hashes of weights and tokens, contender, seed, versions
Records = list[dict[str, Any]]


class ResultStore:
    """One line of JSON for each unit of work: what it depends on, its records, and a hash of both.

    A last line that was cut off, as a killed run leaves it, is dropped; the file and its folder are made with the
    first result.

    Raises:
        ValueError: for any other line that isn't whole and ours.
    """

    def __init__(self, folder: str | Path, name: str = STORE):
        self.path = Path(folder) / name
        self.found: dict[str, Records] = {}
        self.whole = self.size = 0  # bytes of whole lines, and of the file
        if self.path.exists():
            self._read(self.path.read_bytes())

    def get(self, unit: Unit) -> Records | None:
        return self.found.get(_key(unit))

    def add(self, results: Sequence[tuple[Unit, Records]]) -> None:
        """Appends results; they are on the disk when this returns.

        Raises:
            ValueError: if another process has written to the file.
        """
        claim_output(self.path.parent)
        with open(self.path, "ab") as file:
            if file.tell() != self.size:
                raise ValueError(
                    f"{self.path} was written by another process in the meantime: start again, to go on from its "
                    "results, or name another folder."
                )
            file.truncate(self.whole)
            for unit, records in results:
                line = {"unit": unit, "records": records, "hash": of_value([unit, records])}
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.whole = self.size = file.tell()
        self.found |= {_key(unit): records for unit, records in results}

    def _read(self, content: bytes) -> None:
        *lines, torn = content.split(b"\n")
        self.whole, self.size = len(content) - len(torn), len(content)
        if torn:
            print(f"{self.path} ends in the middle of a line, as a stopped run leaves it: that result is dropped.")
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                unit, records = line["unit"], line["records"]
                intact = line["hash"] == of_value([unit, records])
            except (ValueError, KeyError, TypeError):
                intact = False
            if not intact:
                raise ValueError(
                    f"Line {number} of {self.path} is damaged or was not written by retention-gates: delete that line "
                    "to have its result computed again, or the file to start anew."
                )
            self.found[_key(unit)] = records


def _key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)
