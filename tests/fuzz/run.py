"""Runs all fuzzers for some minutes, on all cores, and prints seeds, cases and faults.

    make fuzz MINUTES=10
    make fuzz ARGS="--only cache --cases 100000"
    make fuzz ARGS="--only adapter --seed 3 --first 117 --cases 1"    # one case again

Exit code 1 if there was any fault. The seed is new at every start; a case depends on the seed and its number alone.
"""

import argparse
import gc
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

MOST_FAULTS = 20  # of a fuzzer; then it stops
FOLDER = Path(__file__).resolve().parent


def fuzz(name: str, seed: int, first: int, cases: int | None, seconds: float) -> dict[str, Any]:
    """Runs cases of one fuzzer, until there are so many or the time is up; the first always runs."""
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "support")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    import torch
    import transformers
    from fuzzers import FUZZERS

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    make, checks = FUZZERS[name]
    faults, number = [], first
    with tempfile.TemporaryDirectory() as folder:
        case = make(Path(folder))
        gc.collect()
        gc.freeze()  # what all cases share is not walked again whenever a case collects its garbage
        began = time.monotonic()
        try:
            while number == first or time.monotonic() - began < seconds:
                if cases is not None and number >= first + cases:
                    break
                try:
                    case(random.Random(f"{seed} {number}"))
                except Exception:
                    faults.append((number, traceback.format_exc()))
                number += 1
                if len(faults) >= MOST_FAULTS:
                    break
        finally:
            gc.unfreeze()
    return {"name": name, "cases": (number - first) * checks, "faults": faults, "seconds": time.monotonic() - began}


def main(arguments: Sequence[str] | None = None) -> int:
    names = ["cache", "simulation", "memory_file", "adapter", "checkpoint", "rows", "kills"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all fuzzers together (default: 10)")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--seed", type=int, help="of all cases (default: another at every start)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--cases", type=int, help="of each fuzzer, however long they take (default: by the time)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    cores = min(len(os.sched_getaffinity(0)), len(options.only))
    seconds = float("inf") if options.cases else 60 * options.minutes * cores / len(options.only)
    print(f"seed {seed}: {', '.join(options.only)} on {cores} cores", flush=True)
    failed = False
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        given = [(name, seed, options.first, options.cases, seconds) for name in options.only]
        for future in [pool.submit(fuzz, *each) for each in given]:
            result = future.result()
            name, faults = result["name"], result["faults"]
            counts = f"{result['cases']:8} cases {len(faults):4} faults"
            print(f"{name:12} {counts} {result['seconds']:7.0f} s", flush=True)
            for number, text in faults:
                print(f"  fault: --only {name} --seed {seed} --first {number} --cases 1\n{text}", flush=True)
            failed |= bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
