"""Turns the gates that the method's authors have released into an adapter, or an adapter into their form.

    retention-gates convert ngocbh/TrimKV-Qwen3-4B-Math out/qwen3-4b-math
    retention-gates convert --to trimkv out/run/adapter out/for_trimkv --memory-size 512

SOURCE is a folder or a name on the Hub, user/name or user/name@revision. OUT is written as a whole or not at all.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retention_gates.checkpoints.card import CARD_NAME
from retention_gates.checkpoints.hub import download_adapter, split_revision
from retention_gates.checkpoints.trimkv import (
    THEIR_CONFIG,
    THEIR_WEIGHTS,
    export_gates,
    import_card,
    import_gates,
    read_config,
)
from retention_gates.gates.adapter.files import find_file
from retention_gates.recipes.arguments.convert import OURS, THEIRS
from retention_gates.recipes.loading.models import adapter_config, base_name


def main(options: argparse.Namespace) -> None:
    if options.to == OURS and (options.memory_size or options.global_capacity or options.drop_protected_tokens):
        raise ValueError("--memory-size, --global-capacity and --drop-protected-tokens belong to --to trimkv.")
    if options.to == THEIRS and (options.memory_size is None or options.memory_size < 1):
        raise ValueError(
            f"--memory-size {options.memory_size}: the authors' config.json says how many entries a KV head keeps, so "
            "give a number of 1 or more."
        )
    with new_folder(options.output) as folder:
        if options.to == OURS:
            _to_adapter(options, folder)
        else:
            _to_theirs(options, folder)
    print(f"written: {options.output}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `target` when the block ends without error, and never before."""
    if (target.is_dir() and any(target.iterdir())) or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} exists: name a new folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_adapter(options: argparse.Namespace, folder: Path) -> None:
    name, revision = (options.source, None) if Path(options.source).is_dir() else split_revision(options.source)
    config = find_file(name, THEIR_CONFIG, revision=revision)
    commit = None if Path(name).is_dir() else config.parent.name
    weights = find_file(name, THEIR_WEIGHTS, revision=commit)
    theirs = import_gates(config, weights, folder, base_model=options.base_model)
    (folder / CARD_NAME).write_text(import_card(theirs, name), encoding="utf-8")


def _to_theirs(options: argparse.Namespace, folder: Path) -> None:
    adapter = download_adapter(options.source)
    config = adapter_config(str(adapter))
    base_model = base_name(options.base_model, options.source)
    # as it was published: transformers would write it in its own version's words
    revision = config.revision if base_model == config.base_model_name_or_path else None
    base_config = read_config(find_file(base_model, THEIR_CONFIG, revision=revision))
    export_gates(
        adapter,
        base_config,
        folder,
        base_model=base_model,
        memory_size=options.memory_size,
        global_capacity=options.global_capacity,
        drop_protected_tokens=options.drop_protected_tokens,
    )
    if config.budget_shares is not None:
        print("The calibrated shares of the budget have no place in the authors' form and were left out.")
