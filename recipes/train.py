"""Trains the gates of a base model as a YAML file says, and saves them as an adapter.

    retention-gates train recipes/runs/smollm2_demo.yaml training.max_steps=200
    accelerate launch recipes/train.py recipes/runs/smollm2_demo.yaml training.max_steps=200

Both are the same run. Killed at any moment, the same command with `resume=true` behind it goes on.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path

import torch
import yaml
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from retention_gates.data.balance import BalancedRows
from retention_gates.data.mixture import TrainingRows
from retention_gates.data.packing import sample_windows
from retention_gates.data.reading import Reading, read_tokens
from retention_gates.data.sources import split_by_work
from retention_gates.data.tokens import TokenDocument, document_prefix
from retention_gates.gates.adapter.base_identity import display_name
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.adapter.placement import check_room
from retention_gates.recipes.loading import config_file
from retention_gates.recipes.loading.models import check_dtype, load_base, load_base_config, load_tokenizer
from retention_gates.recipes.loading.output_folder import check_output, claim_output, write_text
from retention_gates.recipes.loading.run_config import RunConfig, differences, load_config
from retention_gates.recipes.report.training_summary import SUMMARY, summarise
from retention_gates.trainers.calibration import measure_shares
from retention_gates.trainers.checkpoint import last_checkpoint, read_manifest
from retention_gates.trainers.distributed.first_rank import on_first_rank
from retention_gates.trainers.distributed.layout import check_same_run, engine_of, run_facts
from retention_gates.trainers.distributed.sequence_parallel import check_heads, check_row_length
from retention_gates.trainers.evaluation.forward_passes import check_length
from retention_gates.trainers.trainer import RetentionTrainer

BYTES_PER_TOKEN = 24  # ids, positions and labels
RUN_FILE = "run.yaml"
ADAPTER = "adapter"
# What may be changed when a run is resumed: it has no effect on what is learnt. How rows are spread over ranks and
# passes may, too: a checkpoint notes how many make a step, and no other number goes on from it.
CHANGEABLE = (
    *("disable_tqdm", "dataloader_num_workers", "logging_steps", "report_to", "save_steps", "save_total_limit"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "rows_per_step", "ranks"),
    "parallelism_config",
)


def main(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    output_dir = Path(str(config.training.output_dir))

    def check() -> None:
        check_run(output_dir, config)
        check_checkpoint(output_dir, config)

    def begin() -> None:
        claim_output(output_dir)
        check_run(output_dir, config)  # again: another run may have begun and ended since
        write_run(output_dir, config)

    on_first_rank(config.training, check)
    trainer, calibration_rows, readings = build(config)
    on_first_rank(config.training, begin)
    resuming = config.resume and any(output_dir.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resuming)
    if calibration_rows is not None:
        find_gated_model(trainer.model).active_config.budget_shares = measure_shares(trainer.model, calibration_rows)
    trainer.save_adapter(output_dir / ADAPTER)
    if config.training.process_index == 0:
        assert config.model.name is not None
        base_model = display_name(config.model.name, config.model.gguf_file)
        summary = summarise(output_dir, config.given, base_model, readings, config.training.world_size)
        write_text(output_dir / SUMMARY, summary)
        print(
            f"The adapter is in {output_dir / ADAPTER}, a summary in {output_dir / SUMMARY}, the run's log in "
            f"{output_dir / 'log.jsonl'}."
        )


def check_run(output_dir: Path, config: "RunConfig") -> None:
    """Raises ValueError unless the run may write to output_dir: a new folder, or the same run with resume=true."""
    check_output(output_dir)
    if not (output_dir / RUN_FILE).exists():
        return
    if not config.resume:
        raise ValueError(
            f"{output_dir} holds a training run already: resume=true goes on with it, another training.output_dir "
            "starts a new one."
        )
    before = config_file.read(output_dir / RUN_FILE, ("model", "data", "training"))
    changed = [key for key in differences(before, config.given) if key not in [f"training.{c}" for c in CHANGEABLE]]
    if changed:
        raise ValueError(
            f"{output_dir} was started with other values of {', '.join(changed)} (see {RUN_FILE} there): resume with "
            "the same command, or start a new run in another training.output_dir."
        )


def check_checkpoint(output_dir: Path, config: "RunConfig") -> None:
    """Raises ValueError, before the model is loaded, if the run cannot go on from the checkpoint that is there."""
    checkpoint = last_checkpoint(output_dir) if config.resume else None
    if checkpoint is not None:
        check_same_run(checkpoint, read_manifest(checkpoint), run_facts(config.training, config.model.name))


def write_run(output_dir: Path, config: "RunConfig") -> None:
    write_text(output_dir / RUN_FILE, yaml.safe_dump(config.given, sort_keys=False))


@dataclass
class Texts:
    """Token documents to train and to test on, the latter empty where nothing is set aside; and what was read."""

    tokenizer: "PreTrainedTokenizerBase"
    train: "list[TokenDocument]"
    test: "list[TokenDocument]"
    readings: "list[Reading]"


def build(
    config: "RunConfig", texts: Texts | None = None, base: "PreTrainedModel | None" = None
) -> "tuple[RetentionTrainer, torch.Tensor | None, list[Reading]]":
    """The trainer, with its data and model, rows [R, T] to calibrate on, and what was read; writes nothing.

    Several runs may share `texts` and, one after the other, a `base` without gates; both are loaded if not given.
    """

    args, data = config.training, config.data
    if args.max_steps < 1:
        raise ValueError(f"training.max_steps={args.max_steps} must be 1 or more: rows are drawn for so many steps.")
    evaluates = args.eval_strategy != "no"
    assert config.model.name is not None
    check_dtype(config.model.dtype, args.device)
    if config.model.quantization is not None and engine_of(args) != "replicated":
        raise ValueError(
            f"model.quantization={config.model.quantization} with {engine_of(args)}: quantised weights stay whole on "
            "each GPU. Use recipes/runs/accelerate/ddp.yaml, or leave quantization out."
        )
    if args.ranks_per_row > 1:
        check_row_length(data.row_length, args.ranks_per_row)
        check_heads(load_base_config(config.model.name, config.model.gguf_file), args.ranks_per_row)
    check_rows_of_a_step(config)
    texts = texts or load_texts(config)
    tokenizer = texts.tokenizer
    rows_needed = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.row_groups
    rows = TrainingRows(
        texts.train, data.row_length, args.seed, data.task_share, data.tasks, tokenizer, length=rows_needed
    )
    balanced = BalancedRows(
        rows,
        rows_per_step=rows_needed // args.max_steps,
        rows_per_pass=args.train_batch_size,
        ranks=args.row_groups,
    )
    args.train_sampling_strategy = "sequential"  # the rows come shuffled

    def windows(documents: "list[TokenDocument]", count: int, length: int) -> "torch.Tensor":
        return sample_windows(documents, length, count, seed=args.seed, prefix_ids=document_prefix(tokenizer))

    if evaluates and not texts.test:
        raise ValueError(
            "Evaluation while training (training.eval_strategy) needs text that is not trained on: set "
            "data.test_fraction or data.test_works."
        )
    evaluation, calibration = config.evaluation, config.calibration
    eval_rows = windows(texts.test, evaluation.rows, evaluation.row_length) if evaluates else None
    calibration_rows = windows(texts.train, calibration.rows, calibration.row_length) if calibration.rows else None
    base = base or load_base(
        config.model.name,
        gguf_file=config.model.gguf_file,
        device=args.device,
        dtype=config.model.dtype,
        stay=engine_of(args) != "replicated",
        quantization=config.model.quantization,
    )
    check_rows_of_a_pass(config, base)
    set_seed(args.seed)
    model = get_peft_model(base, config.gate)
    if calibration_rows is not None:  # measured at the end of the run, too late to be refused
        check_length(find_gated_model(model), calibration.row_length)
    return RetentionTrainer(model, args, balanced, eval_dataset=eval_rows), calibration_rows, texts.readings


def check_rows_of_a_step(config: "RunConfig") -> None:
    """Raises ValueError for more rows than can be counted, or than the machine has room for in one step."""
    args = config.training
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.row_groups
    if args.max_steps * rows > sys.maxsize:
        raise ValueError(
            f"training.max_steps={args.max_steps} of {rows} rows each are more rows than can be counted: choose at "
            f"most {sys.maxsize // rows:,} steps."
        )
    each = config.data.row_length * BYTES_PER_TOKEN
    rows_here = args.train_batch_size * args.gradient_accumulation_steps
    named = "training.per_device_train_batch_size times gradient_accumulation_steps"
    check_room(named, rows_here, partial(mul, each), torch.device("cpu"), "for the ids of a step's rows")


def check_rows_of_a_pass(config: "RunConfig", base: "PreTrainedModel") -> None:
    """Raises ValueError for more rows than the device has room for in one forward pass."""
    args = config.training
    hidden = 2 * base.config.get_text_config(decoder=True).hidden_size * base.dtype.itemsize  # with gates and without
    each = config.data.row_length * (hidden + BYTES_PER_TOKEN) // args.ranks_per_row
    named = "training.per_device_train_batch_size"
    check_room(named, args.train_batch_size, partial(mul, each), args.device, "for the hidden states of its rows")


def load_texts(config: "RunConfig") -> Texts:
    """Reads and tokenises what the run trains on, and what it sets aside."""
    assert config.model.name is not None
    tokenizer = load_tokenizer(config.model.name, gguf_file=config.model.gguf_file)
    data, is_first = config.data, config.training.process_index == 0
    documents: list[TokenDocument] = []
    readings = []
    for source in data.sources:
        drawn = source.limit is not None or source.token_budget is not None
        seed = config.training.seed if drawn else None
        found, reading = read_tokens(tokenizer=tokenizer, **vars(source), seed=seed, progress=is_first)
        documents += found
        readings.append(reading)
        if is_first:
            print(reading, file=sys.stderr)
    if data.test_fraction is None and data.test_works is None:
        return Texts(tokenizer, documents, [], readings)
    train, test = split_by_work(
        documents, test_fraction=data.test_fraction, test_works=data.test_works, seed=data.split_seed
    )
    return Texts(tokenizer, train, test, readings)


if __name__ == "__main__":
    from retention_gates.cli import main as command

    sys.exit(command(["train", *sys.argv[1:]]))
