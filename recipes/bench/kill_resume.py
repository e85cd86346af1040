"""Kills a training run again and again, at random moments, and checks that it ends as if nobody had.

    python recipes/bench/kill_resume.py CONFIG.yaml --kills 100 --ranks 2

CONFIG.yaml is any run of `retention-gates train` that a CPU finishes in seconds. It runs once without a kill, and then
again, each start going on from what the last one left, until so many starts have been killed: a random rank dies as by
kill -9, the others as a launcher ends them. Every run that reaches its end must have logged the same losses at the
same steps and saved the same adapter, bit for bit, as the unbroken one. Prints one line per run and where deaths fell.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from retention_gates import cli
from retention_gates.recipes import train  # noqa: F401  what every start needs is imported once, here
from retention_gates.trainers import trainer  # noqa: F401
from retention_gates.trainers.callbacks import LOG_NAME, UNREPEATABLE
from retention_gates.trainers.checkpoint import STAGING, checkpoints_in


def start_ranks(arguments: list[str], ranks: int, output: Path) -> list[int]:
    """Process ids of `ranks` processes that run the train command together over gloo, what they say in `output`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
            with output.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            torch.set_num_threads(1)
            # tqdm's own lock is shared by forked processes: one that is killed while it draws a bar leaves it locked
            tqdm.set_lock(threading.RLock())
            code = 1
            try:
                code = cli.main(["train", *arguments])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def run_until(pids: list[int], is_due: Callable[[], bool], victim: int, at_death: Callable[[], None]) -> list[int]:
    """Exit codes; once `is_due` the rank `victim` is killed, and 0.1 s later the others, as launchers do."""
    codes: dict[int, int] = {}
    killed = None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if killed is None and pids[victim] not in codes and is_due():
            os.kill(pids[victim], signal.SIGKILL)
            at_death()
            killed = time.monotonic()
        if killed is not None and time.monotonic() > killed + 0.1:
            for pid in pids:
                if pid not in codes:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    return [codes[pid] for pid in pids]


def random_death(rng: random.Random, duration: float, output_dir: Path) -> Callable[[], bool]:
    """Whether the moment has come: some time within `duration` seconds, or, one time in three, within a save."""
    if rng.random() < 1 / 3:
        which, saves, wait = rng.randint(1, 3), 0, rng.uniform(0, 0.01)
        is_saving = False

        def in_a_save() -> bool:
            nonlocal saves, is_saving
            was_saving, is_saving = is_saving, (output_dir / STAGING).exists()
            saves += is_saving and not was_saving
            if saves == which:
                time.sleep(wait)
            return saves == which

        return in_a_save
    deadline = time.monotonic() + rng.uniform(0, duration)
    return lambda: time.monotonic() >= deadline


def outcome(output_dir: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Gives the log of a run's steps and evaluations, and the adapter's file."""
    lines = [json.loads(line) for line in (output_dir / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line or any(key.startswith("eval_") for key in line)]
    told = [{key: value for key, value in line.items() if not key.startswith(UNREPEATABLE)} for line in steps]
    return told, (output_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def kill_and_resume(config: Path, *, kills: int, ranks: int, seed: int, overrides: list[str]) -> Counter[str]:
    """Where the deaths fell: before the first checkpoint, after one, or while something was being written.

    Raises:
        AssertionError: if a run fails by itself, or ends other than the unbroken one.
    """
    rng = random.Random(seed)
    folder = config.parent
    output = folder / "output.txt"

    def start(name: str, resume: bool, is_due: Callable[[], bool], at_death: Callable[[], None]) -> list[int]:
        options = [f"training.output_dir={folder / name}", *overrides, *(["resume=true"] if resume else [])]
        pids = start_ranks([str(config), *options], ranks, output)
        return run_until(pids, is_due, rng.randrange(ranks), at_death)

    began = time.monotonic()
    codes = start("unbroken", False, lambda: False, lambda: None)
    assert codes == [0] * ranks, f"the unbroken run failed with {codes}, see {output}"
    duration = time.monotonic() - began
    reference = outcome(folder / "unbroken")
    print(f"unbroken: {duration:.1f} s, {len(reference[0])} lines of log", flush=True)

    places: Counter[str] = Counter()
    run, starts = 0, 0
    while sum(places.values()) < kills:
        run_dir = folder / f"killed{run}"

        def note(run_dir: Path = run_dir) -> None:
            saved = "after a checkpoint" if checkpoints_in(run_dir) else "before the first checkpoint"
            places["while saving" if (run_dir / STAGING).exists() else saved] += 1

        codes = start(run_dir.name, starts > 0, random_death(rng, duration, run_dir), note)
        starts += 1
        if codes == [0] * ranks:
            assert outcome(run_dir) == reference, f"{run_dir} ended other than {folder / 'unbroken'}"
            print(f"{run_dir.name}: ended as the unbroken run after {starts} starts", flush=True)
            run, starts = run + 1, 0
        else:
            assert -signal.SIGKILL in codes, f"start {starts} of {run_dir} failed with {codes}, see {output}"
    if starts:  # the last one may live
        codes = start(run_dir.name, True, lambda: False, lambda: None)
        assert codes == [0] * ranks, f"the last start of {run_dir} failed with {codes}, see {output}"
        assert outcome(run_dir) == reference, f"{run_dir} ended other than {folder / 'unbroken'}"
        print(f"{run_dir.name}: ended as the unbroken run after {starts + 1} starts", flush=True)
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.kills < 1 or options.ranks < 1:
        sys.exit(f"--kills {options.kills} and --ranks {options.ranks} must be 1 or more.")
    places = kill_and_resume(
        options.config, kills=options.kills, ranks=options.ranks, seed=options.seed, overrides=options.overrides
    )
    print(f"{sum(places.values())} kills: " + ", ".join(f"{count} {where}" for where, count in places.most_common()))


if __name__ == "__main__":
    main()
