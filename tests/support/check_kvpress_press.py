"""Whether kvpress keeps the same entries with our press as a BoundedCache holds; in two environments, not in CI.

    python tests/support/check_kvpress_press.py write FOLDER     # where this package is installed
    python tests/support/check_kvpress_press.py check FOLDER     # where kvpress is, with PYTHONPATH=src

The first makes a tiny model with gates and records what a BoundedCache holds after a prompt. The second reads the same
prompt with RetentionPress, compares, and lets kvpress's pipeline answer.
"""

import argparse
import json
from pathlib import Path

import torch

TOKENS, SIZES = 40, (8, 12, 30)  # of the prompt; entries kept
PROMPT = "the old king sings and the queen sleeps under a red castle "


def write(folder: Path) -> None:
    from peft import PeftModel
    from tiny_adapter import make_files
    from transformers import AutoModelForCausalLM

    from retention_gates import BoundedCache

    files = make_files(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files.model), str(files.adapter)).eval()
    ids = prompt_ids(folder)
    held = {}
    for size in SIZES:
        cache = BoundedCache(model, size, budgets="uniform")
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        held[size] = [
            [layer.positions(head)[0].tolist() for head in range(len(layer.rule.budgets))]
            for layer in cache.gated_layers
        ]
    (folder / "held.json").write_text(json.dumps(held), encoding="utf-8")
    print(f"written: {folder / 'held.json'}")


def check(folder: Path) -> None:
    from importlib.metadata import version

    from kvpress import AdaKVPress, DecodingPress
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

    from retention_gates.recipes.kvpress_press import RetentionPress

    held = json.loads((folder / "held.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    adapter = str(folder / "adapter")
    ids = prompt_ids(folder)
    everything = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=everything)
    for size in SIZES:
        kept = DynamicCache()
        with torch.no_grad(), RetentionPress(compression_ratio=1 - (size + 0.5) / TOKENS, adapter=adapter)(model):
            model(input_ids=ids, past_key_values=kept)
        for layer, heads in enumerate(held[str(size)]):
            for head, positions in enumerate(heads):
                expected = everything.layers[layer].keys[0, head, [p for p in positions if p >= 0]]
                found = kept.layers[layer].keys[0, head]
                assert len(found) == size == len(expected), (size, layer, head, len(found), len(expected))
                # the press keeps entries in order of their scores
                same = (found[:, None] == expected[None]).all(-1)
                assert same.any(0).all() and same.any(1).all(), (size, layer, head, positions)
        print(f"{size} of {TOKENS} entries: the same in {len(held[str(size)])} layers")

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", bos_token="<|endoftext|>")
    answer = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    questions = {"question": "the queen", "max_new_tokens": 8}
    full = answer(PROMPT * 4, **questions)["answer"]
    assert answer(PROMPT * 4, press=RetentionPress(0.0, adapter=adapter), **questions)["answer"] == full
    bounded = answer(PROMPT * 4, press=RetentionPress(0.8, adapter=adapter), **questions)["answer"]
    adaptive = answer(PROMPT * 4, press=AdaKVPress(RetentionPress(0.8, adapter=adapter)), **questions)["answer"]
    print(f"answers: full {full!r}, 20% {bounded!r}, 20% divided between heads {adaptive!r}")
    decoding = DecodingPress(RetentionPress(adapter=adapter), compression_interval=2, target_size=8)
    try:
        answer(PROMPT * 4, press=decoding, **questions)
    except ValueError as error:
        assert "gates look at every token when it is created" in str(error)
    else:
        raise AssertionError("a DecodingPress should be refused")
    print(f"kvpress {version('kvpress')}, transformers {version('transformers')}: all as expected")


def prompt_ids(folder: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder / "model").encode(PROMPT * 5, add_special_tokens=False)
    return torch.tensor([ids[:TOKENS]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("write", "check"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    {"write": write, "check": check}[options.step](options.folder)
