"""Fuzzers: each makes one random case from a seed, and raises where a promise is broken."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

Case = Callable[[random.Random], None]
NUMBERS = [0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308]
VALUES = [None, True, "", "x" * 500, [], {}, [[]] * 50, {"a": {"b": []}}, *NUMBERS]


def cache(folder: Path) -> Case:
    """A cache layer holds and shows what plain Python does, to the entry."""
    from cache_cases import check_run, random_run

    return lambda rng: check_run(random_run(rng))


def simulation(folder: Path) -> Case:
    """One pass through a simulated cache holds what a bounded cache holds when it reads token by token."""
    from gated_models import gated_model, step_by_step, token_ids

    from retention_gates import BoundedCache
    from retention_gates.gates.policies import POLICIES
    from retention_gates.gates.simulation.simulated_cache import SimulatedCache

    model = gated_model(num_hidden_layers=2)
    names = sorted(name for name, policy in POLICIES.items() if name != "citrus")

    @torch.no_grad()
    def case(rng: random.Random) -> None:
        tokens = rng.randint(3, 60)
        options = {
            "memory_size": rng.randint(4, 24), "policy": rng.choice(names), "buffer_size": rng.randint(1, 4),
            "protected_tokens": rng.randint(0, 2), "seed": rng.randrange(2**31),
        }  # fmt: skip
        ids = token_ids(rng.randint(1, 2), tokens, seed=rng.randrange(2**31))
        bounded, simulated = BoundedCache(model, **options), SimulatedCache(model, **options)
        expected = [step_by_step(model, ids[:, :-1], bounded)]
        held = [[layer.positions(head).tolist() for head in range(2)] for layer in bounded.gated_layers]
        expected.append(step_by_step(model, ids[:, -1:], bounded))
        found = model(input_ids=ids, past_key_values=simulated).logits
        torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-3, atol=1e-4)
        for layer, heads in zip(simulated.gated_layers, held, strict=True):
            for head, rows in enumerate(heads):
                for row, positions in enumerate(rows):  # what the last token sees
                    seen = (layer.eviction_times[row, head] >= tokens).nonzero().flatten().tolist()
                    assert [*sorted(p for p in positions if p >= 0), tokens - 1] == seen, (options, head, row)

    return case


def memory_file(folder: Path) -> Case:
    """A damaged memory file is refused with a ValueError, or loads into a cache that can go on."""
    from gated_models import gated_model, step_by_step, token_ids

    from retention_gates import BoundedCache

    model = gated_model(num_hidden_layers=2)
    originals = []
    for options in ({}, {"policy": "h2o"}, {"budgets": "global"}, {"cache_dtype": "int8"}):
        memory = BoundedCache(model, memory_size=12, **options)
        with torch.no_grad():
            model(input_ids=token_ids(1, 40), past_key_values=memory)
        originals.append(folder / f"memory{len(originals)}")
        memory.save(originals[-1])

    def case(rng: random.Random) -> None:
        path = folder / "damaged"
        path.write_bytes(damaged_safetensors(rng, rng.choice(originals).read_bytes()))
        try:
            loaded = BoundedCache.load(model, path)
        except ValueError:
            return
        with torch.no_grad():
            assert step_by_step(model, token_ids(loaded.gated_layers[0].batch_size, 3), loaded).isfinite().all()
        assert sum(map(sum, loaded.budgets)) == loaded.memory_size * len(loaded.budgets) * len(loaded.budgets[0])

    return case


def adapter(folder: Path) -> Case:
    """A damaged adapter is refused with a ValueError or loads with its own weights; no code in it runs."""
    from retention_gates.recipes.upkeep.adapter_mutations import MUTATIONS
    from retention_gates.recipes.upkeep.fuzz_adapter import make_adapter, try_mutation

    original, work = folder / "original", folder / "work"
    work.mkdir()
    base = make_adapter(original, hidden_size=64, width=32)
    names = list(MUTATIONS)
    for loader in ("commands", "peft"):
        try_mutation("nothing", 0, original, base, loader, work)  # what all need is imported once

    def case(rng: random.Random) -> None:
        name, seed, loader = rng.choice(names), rng.randrange(2**31), rng.choice(["commands", "peft"])
        outcome = try_mutation(name, seed, original, base, loader, work)
        assert outcome.fault is None, f"{name}, seed {seed}, loaded by {loader}: {outcome.fault}"

    return case


def rows(folder: Path) -> Case:
    """Rows that can be read are read, and targets are what the assistant would write."""
    from row_cases import check_chat, check_file

    def case(rng: random.Random) -> None:
        check_file(rng, folder)
        check_chat(rng)

    return case


def checkpoint(folder: Path) -> Case:
    """Of two checkpoints of which the last is damaged, the last whole one is found, or none with a ValueError."""
    from tiny_training import trainer_of

    from retention_gates.trainers.checkpoint import last_checkpoint, read_manifest

    trainer_of(folder, save_strategy="steps").train()
    out = folder / "out"
    written = {path.name: read_manifest(path) for path in out.glob("checkpoint-*")}
    assert len(written) == 2

    def case(rng: random.Random) -> None:
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        hurt = rng.sample(sorted(copy.glob("checkpoint-*")), k=rng.randint(1, 2))
        for one in hurt:
            for file in rng.sample(sorted(p for p in one.iterdir() if p.is_file()), k=rng.randint(1, 2)):
                damage_file(rng, file)
        try:
            found = last_checkpoint(copy)
        except ValueError:
            assert len(hurt) == 2  # the other one is whole
            return
        assert found is not None
        assert read_manifest(found)["files"] == written[found.name]["files"]

    return case


def kills(folder: Path) -> Case:
    """A training run that is killed at any moment and resumed ends as the run that nobody killed."""
    from tiny_run import make_run

    from retention_gates.recipes.bench.kill_resume import kill_and_resume

    options = {"per_device_train_batch_size": 1, "save_steps": 2, "logging_steps": 2, "disable_tqdm": True}
    options |= {"max_steps": 6, "eval_strategy": "no"}

    def case(rng: random.Random) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as run:
            config = make_run(Path(run), layers=2, objective="end_to_end", **options)
            kill_and_resume(config, kills=4, ranks=1, seed=rng.randrange(2**31), overrides=[])

    return case


# name -> what makes a case of it, and how many checks a case counts for
FUZZERS: dict[str, tuple[Callable[[Path], Case], int]] = {
    "cache": (cache, 1),
    "simulation": (simulation, 1),
    "memory_file": (memory_file, 1),
    "adapter": (adapter, 1),
    "checkpoint": (checkpoint, 1),
    "rows": (rows, 1),
    "kills": (kills, 4),
}


def damage_file(rng: random.Random, file: Path) -> None:
    """Removes, cuts, lengthens or alters a file, or puts other JSON into it."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(["remove", "cut", "grow", "turn", "json", "folder"])
    if kind in ("remove", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        return
    if kind == "cut":
        content = content[: rng.randrange(len(content) + 1)]
    elif kind == "grow":
        content += os.urandom(rng.randint(1, 20))
    elif kind == "turn" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "json":
        content = bytearray(random_json(rng, content))
    file.write_bytes(content)


def random_json(rng: random.Random, content: bytes) -> bytes:
    """The JSON with one value replaced or one key gone; other JSON, or brackets without an end."""
    try:
        value = json.loads(content)
    except ValueError:
        value = rng.choice(VALUES)
    if rng.random() < 0.2:
        return b"[" * rng.choice([10, 100_000])
    if isinstance(value, dict) and value and rng.random() < 0.8:
        place, key = value, rng.choice(list(value))
        while isinstance(place[key], dict) and place[key] and rng.random() < 0.7:
            place = place[key]
            key = rng.choice(list(place))
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
    else:
        value = rng.choice(VALUES)
    return json.dumps(value).encode()


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Bytes turned anywhere or in the header, a cut, or a header with another value in it."""
    size = int.from_bytes(content[:8], "little")
    kind = rng.choice(["turn", "turn in header", "cut", "size", "header", "description"])
    changed = bytearray(content)
    if kind == "turn":
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == "turn in header":
        changed[8 + rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        changed = changed[: rng.randrange(len(changed))]
    elif kind == "size":
        changed[:8] = rng.choice([0, 1, size - 1, size + 1, 2**40, 2**63]).to_bytes(8, "little")
    else:
        header = json.loads(content[8 : 8 + size])
        if kind == "header":
            text = random_json(rng, json.dumps(header).encode())
        else:
            (key,) = (name for name in header["__metadata__"] if name != "format")
            header["__metadata__"][key] = random_json(rng, header["__metadata__"][key].encode()).decode()
            text = json.dumps(header).encode()
        changed = bytearray(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return bytes(changed)
