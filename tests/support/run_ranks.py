"""Runs train commands one after the other, each on its number of gloo ranks; what they need is imported once.

Called as a script: `run_ranks.py RUNS.json [--sharded]`, a list of `{"ranks": 2, "arguments": [...], "environment":
{...}}`. With --sharded, engines run that Accelerate only starts on accelerators: without use_cpu it is told that its
processes have one each, and that it is the CPU. What shards, gathers and reduces is the engines' own code.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from retention_gates.recipes.bench.kill_resume import run_until, start_ranks


def main(runs_file: str) -> None:
    output = Path(runs_file).with_suffix(".output")
    for run in json.loads(Path(runs_file).read_text(encoding="utf-8")):
        os.environ |= run.get("environment", {})
        codes = run_until(start_ranks(run["arguments"], run["ranks"], output), lambda: False, 0, lambda: None)
        for name in run.get("environment", {}):
            del os.environ[name]
        assert codes == [0] * run["ranks"], f"{run} failed with {codes}:\n{output.read_text()[-3000:]}"


def take_the_cpu_for_an_accelerator() -> None:
    original = PartialState._prepare_backend

    def prepare(self, cpu=False, *args, **kwargs):
        return original(self, cpu, *args, **kwargs) if cpu else ("gloo", DistributedType.MULTI_GPU)

    PartialState._prepare_backend = prepare
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


if __name__ == "__main__":
    if "--sharded" in sys.argv:
        take_the_cpu_for_an_accelerator()
    main(sys.argv[1])
