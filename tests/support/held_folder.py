"""A folder that another process writes to.

Called as a script, `held_folder.py FOLDER`, it holds the folder, says so in a line, and waits to be killed;
`held_folder.py FOLDER SEED TIMES` counts in the file `counter` of it.
"""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retention_gates.trainers.run_folder.writing_alone import FolderTaken, writing_alone


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen]:
    """The process; it is killed when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def count(folder: Path, seed: int, times: int) -> None:
    """Adds 1 to the number in a file so many times, reading and writing it in two steps, when the folder is free."""
    rng, counter = random.Random(seed), folder / "counter"
    while times:
        try:
            with writing_alone(folder):
                number = int(counter.read_text())
                time.sleep(rng.uniform(0, 0.002))
                counter.write_text(str(number + 1))
                times -= 1
        except FolderTaken as error:
            assert "(pid " in str(error) or "started just now" in str(error)
            time.sleep(rng.uniform(0, 0.001))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(count(Path(sys.argv[1]), *map(int, sys.argv[2:])))
    with writing_alone(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
