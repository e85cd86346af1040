"""Runs the train command again and again in forked processes, each killed at a chosen moment.

Called as a script: `killed_runs.py CONFIG.yaml SCENARIOS.json`. A scenario is a list of starts of the same command; a
start is `null` (it runs to its end) or says where the process kills itself: `{"function": "module:Class.name",
"call": 2, "when": "before" | "after"}`. Every start but the first has resume=true. Only the imports are shared by the
processes, so that a start costs a second instead of six.
"""

import importlib
import json
import os
import signal
import sys
import threading

import torch
from tqdm import tqdm

from retention_gates import cli
from retention_gates.recipes import train  # noqa: F401  what every start needs
from retention_gates.trainers import trainer  # noqa: F401


def kill_at(function: str, call: int, when: str) -> None:
    """Patches a function so that the process dies, as by kill -9, before or after its nth call."""
    module_name, _, path = function.partition(":")
    owner = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def patched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, patched)


def start(arguments: list[str], death: dict | None) -> int:
    """Runs the command in a process of its own; gives its exit code, or -9."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, and a killed one may leave it locked
        if death is not None:
            kill_at(**death)
        code = 1
        try:
            code = cli.main(["train", *arguments])
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main(config: str, scenarios: str) -> None:
    with open(scenarios, encoding="utf-8") as file:
        for name, starts in json.load(file).items():
            for index, death in enumerate(starts):
                overrides = [f"training.output_dir={os.path.join(os.path.dirname(config), name)}"]
                code = start([config, *overrides, *(["resume=true"] if index else [])], death)
                assert code == (0 if death is None else -signal.SIGKILL), f"{name}, start {index}: exit code {code}"


if __name__ == "__main__":
    main(*sys.argv[1:])
