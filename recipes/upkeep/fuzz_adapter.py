"""Damages an adapter in a thousand ways and loads each: a clear error or the same weights, and nothing else.

    python recipes/upkeep/fuzz_adapter.py --mutations 1000 --seed 0

Each damaged adapter is loaded twice: as the commands do, and with PeftModel.from_pretrained alone. An outcome is a
fault if code in a file was run, if weights differ from the original ones, if the base model is not as it was after an
error, if the error is no ValueError, or if the memory grew by more than twice the files' size and SLACK_MIB. Exit code
1 if there is any. What PEFT does before it knows that an adapter is ours (parse JSON, look up peft_type) is counted
apart.
"""

import argparse
import collections
import ctypes
import gc
import random
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from retention_gates.compat import attention_implementation
from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.gates.adapter.model import RetentionGateModel
from retention_gates.recipes.loading.models import adapter_config
from retention_gates.recipes.upkeep.adapter_mutations import CANARY, CONFIG, MUTATIONS, WEIGHTS

SLACK_MIB = 12  # of Python's objects and what allocators keep; a config of the largest size allowed parses into 11
REFUSED, SAME, LEFT_TO_PEFT = "refused with a ValueError", "loaded with the same weights", "left to PEFT"


@dataclass(frozen=True)
class Outcome:
    mutation: str
    loader: str
    result: str
    growth_mib: float  # of the resident memory, at its highest
    fault: str | None


def make_adapter(folder: Path, hidden_size: int = 512, width: int = 1024) -> Any:
    """Saves an untrained adapter for a small random model, and gives the model without it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    config = LlamaConfig(hidden_size=hidden_size, intermediate_size=hidden_size, **sizes)
    base = AutoModelForCausalLM.from_config(config).eval()
    gated = get_peft_model(base, RetentionGateConfig(gate_width=width))
    gated.save_pretrained(str(folder), save_embedding_layers=False)
    return gated.unload()


def try_mutation(name: str, seed: int, adapter: Path, base: Any, loader: str, work: Path) -> Outcome:
    """Damages a copy of the adapter and loads it. Args: loader: "commands" or "peft"."""
    rng = random.Random(f"{name} {seed}")
    folder, canary = work / "adapter", work / CANARY
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    MUTATIONS[name](rng, folder)
    size = sum((folder / file).stat().st_size for file in (CONFIG, WEIGHTS) if (folder / file).is_file())
    _reset_peak()
    before = _peak_mib()
    result, fault = _load(folder, adapter, base, loader)
    growth = _peak_mib() - before
    if canary.exists():
        canary.unlink()
        fault = "code in a file was run"
    allowed = 2 * max(size, (adapter / WEIGHTS).stat().st_size) / 2**20 + SLACK_MIB
    parsed_by_peft = loader == "peft" and name.startswith("large config")
    if fault is None and growth > allowed and not parsed_by_peft:
        fault = f"the memory grew by {growth:.0f} MiB, where {allowed:.0f} are allowed"
    return Outcome(name, loader, result, growth, fault)


def _load(folder: Path, adapter: Path, base: Any, loader: str) -> tuple[str, str | None]:
    state = _state(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if loader == "commands":
                adapter_config(str(folder))
            model = PeftModel.from_pretrained(base, folder)
    except ValueError:
        return REFUSED, None if _state(base) == state else "the base model is not as it was after an error"
    except (KeyError, TypeError, RecursionError, OSError) as error:
        at_home = _state(base) == state
        if loader == "peft" and at_home and _raised_before_ours(error):
            return f"{LEFT_TO_PEFT}: {type(error).__name__}", None
        return type(error).__name__, f"{type(error).__name__} is no ValueError: {str(error)[:200]}"
    if not isinstance(model.base_model, RetentionGateModel):
        model.unload()
        return f"{LEFT_TO_PEFT}: another method", None if loader == "peft" else "another method was loaded"
    fault = _difference(model, adapter)
    model.unload()
    gc.collect()
    return SAME, fault if _state(base) == state else "the base model is not as it was after unload"


def _raised_before_ours(error: BaseException) -> bool:
    """Whether PEFT raised it while it read the peft_type, before any code of ours was asked."""
    frame, names = error.__traceback__, []
    while frame is not None:
        names.append((frame.tb_frame.f_code.co_filename, frame.tb_frame.f_code.co_name))
        frame = frame.tb_next
    ours = [file for file, _ in names if "retention_gates" in file and not file.endswith("fuzz_adapter.py")]
    return not ours


def _difference(model: Any, adapter: Path) -> str | None:
    expected, got = load_file(adapter / WEIGHTS), get_peft_model_state_dict(model, save_embedding_layers=False)
    if expected.keys() != got.keys():
        return "other weights were loaded: names"
    wrong = [key for key in expected if not torch.equal(expected[key], got[key])]
    return f"other weights were loaded: {wrong[0]}" if wrong else None


def _state(base: Any) -> tuple:
    """Gives the base model's tensors, and the attention it names."""
    return tuple((name, type(module)) for name, module in base.named_modules()), attention_implementation(base.config)


def _reset_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide what is taken now
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def summary(outcomes: list[Outcome], size_mib: float) -> str:
    lines = [f"{len(outcomes)} loads of {len(outcomes) // 2} damaged adapters ({size_mib:.1f} MiB undamaged)"]
    for loader in ("commands", "peft"):
        mine = [outcome for outcome in outcomes if outcome.loader == loader]
        lines.append(f"{loader}:")
        for result, count in collections.Counter(outcome.result for outcome in mine).most_common():
            lines.append(f"  {count:5d} {result}")
        worst = max(mine, key=lambda outcome: outcome.growth_mib)
        control = max((o.growth_mib for o in mine if o.mutation == "nothing"), default=0.0)
        lines.append(
            f"  highest growth of memory {worst.growth_mib:.1f} MiB ({worst.mutation}); undamaged {control:.1f} MiB"
        )
    faults = [outcome for outcome in outcomes if outcome.fault]
    lines.append(f"faults: {len(faults)}")
    lines += [f"  {outcome.mutation} ({outcome.loader}): {outcome.fault}" for outcome in faults[:20]]
    return "\n".join(lines)


def run(mutations: int, seed: int, hidden_size: int = 512, width: int = 1024) -> tuple[list[Outcome], float]:
    """Outcomes of both loaders for so many mutations, all kinds taking turns; and the adapter's size in MiB."""
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("The peak of the memory is read from /proc/self, which only Linux has.")
    with tempfile.TemporaryDirectory() as temporary:
        adapter, work = Path(temporary, "original"), Path(temporary, "work")
        work.mkdir()
        base = make_adapter(adapter, hidden_size, width)
        names = list(MUTATIONS)
        for loader in ("commands", "peft"):  # the first load imports and allocates what all need
            _load(adapter, adapter, base, loader)
        gc.collect()
        gc.freeze()  # what stays alive need not be walked before each of a thousand measurements
        try:
            outcomes = [
                try_mutation(names[i % len(names)], seed + i // len(names), adapter, base, loader, work)
                for i in range(mutations)
                for loader in ("commands", "peft")
            ]
        finally:
            gc.unfreeze()
        return outcomes, (adapter / WEIGHTS).stat().st_size / 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Damages an adapter in many ways and loads each.")
    parser.add_argument("--mutations", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    outcomes, size = run(options.mutations, options.seed)
    print(summary(outcomes, size))
    return 1 if any(outcome.fault for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
