"""Trains the gates of a frozen model to forget what its own forecasts do not need."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from retention_gates.compat import leave_to_ranks
from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.gate_outputs import Recording, record
from retention_gates.gates.adapter.model import RetentionGateModel, find_gated_model
from retention_gates.gates.adapter.modes import temporarily
from retention_gates.gates.attention.fading import Fading
from retention_gates.kernels.checks import LogBetaError
from retention_gates.kernels.distill_loss import distill_loss
from retention_gates.trainers import checkpoint
from retention_gates.trainers.adapter_dtype import store_as
from retention_gates.trainers.callbacks import Averages, JsonLinesLog, LogWhenSaving, ProgressLine, describe
from retention_gates.trainers.checks import check_arguments, check_model, check_packing, keep_differentiable
from retention_gates.trainers.config import RetentionTrainingArguments
from retention_gates.trainers.distributed.first_rank import on_first_rank
from retention_gates.trainers.distributed.layout import check_engine, engine_of, run_facts
from retention_gates.trainers.distributed.sequence_parallel import RowGroups
from retention_gates.trainers.distributed.sharding import gathered, whole
from retention_gates.trainers.evaluation.forward_passes import check_length
from retention_gates.trainers.evaluation.while_training import score_rows
from retention_gates.trainers.losses import capacity_loss
from retention_gates.trainers.output_head import OutputHead
from retention_gates.trainers.phases import PhaseClock, peak_memory
from retention_gates.trainers.pictures import portray, show
from retention_gates.trainers.rows import RowCollator, check_eval_rows, check_rows, forward_arguments, set_shares
from retention_gates.trainers.run_folder.inputs import inputs_of
from retention_gates.trainers.run_folder.resuming import find_start
from retention_gates.trainers.run_folder.writing_alone import writing_alone
from retention_gates.trainers.step_graph import WARM_UP_STEPS, StepGraph
from retention_gates.trainers.stop_if_diverged import (
    FiniteGradients,
    check_progress,
    check_update,
    naming_divergence,
)

Batch = dict[str, Any]  # tensors [B, T], and the numbers of `RowCollator`
Terms = dict[str, torch.Tensor]
EVEN = (1.0, 1.0)


class RetentionTrainer(Trainer):
    """transformers' Trainer with the retention objective, evaluation under eviction, and checkpoints that are whole.

    The teacher is the model itself with its gates off. Only gates are trained and only they are saved.

    Source: TRIM-KV, arXiv 2512.03324, section 3.3.

    Args:
        model: a PeftModel with retention gates: `get_peft_model(base, RetentionGateConfig())`.
        train_dataset: rows as `data.packing` makes them, or of equally many input_ids, such as a tokenised data set of
            Hugging Face; see `trainers.rows.RowCollator`.
        eval_dataset: token ids [R, T], one document each; what `evaluate` scores.

    Raises:
        ValueError: for a model or rows that gates cannot be trained on.
    """

    args: RetentionTrainingArguments
    model: PeftModel
    eval_dataset: Any

    def __init__(
        self,
        model: PeftModel,
        args: RetentionTrainingArguments,
        train_dataset: Any,
        eval_dataset: torch.Tensor | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ):
        check_model(model, args)
        keep_differentiable(model)
        self._sharded = engine_of(args) != "replicated"
        if args.objective == "end_to_end" and not self._sharded:
            check_packing(model)
        positions = getattr(text_config(find_gated_model(model).model), "max_position_embeddings", None)
        part, parts = args.process_index % args.ranks_per_row, args.ranks_per_row
        collator = RowCollator(positions, part, parts, args.longest_stretch)
        check_rows(train_dataset, collator)
        if eval_dataset is not None:
            check_eval_rows(eval_dataset, args.world_size)
            check_length(find_gated_model(model), eval_dataset.shape[1])
        check_arguments(args, model, train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[FiniteGradients(), LogWhenSaving(), JsonLinesLog(Path(str(args.output_dir))), *callbacks],
            optimizers=optimizers,
        )
        check_engine(args, self.accelerator)
        self._row_groups = RowGroups(self.accelerator, args.ranks_per_row)
        self.model_accepts_loss_kwargs = False  # each forward pass gives a mean, to be divided by a step's passes
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressLine())
        if not args.gradient_checkpointing:
            model.gradient_checkpointing_disable()  # an earlier run on this model may have left it on
        # DDP leaves the base alone: it is the same on all ranks, has no gradient, and no buffer that changes
        base = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        base += [name for name, _ in model.named_buffers()]
        leave_to_ranks(model, base)
        self._averages = Averages()
        self._clock = PhaseClock()
        self._inputs: dict[str, Any] = {}
        self._fading = Fading(gaussian=args.fade == "gaussian")
        self._graph: StepGraph | None = None
        self._eager_steps = 0
        self._last_pass: tuple[Batch, torch.Tensor] | None = None  # with its loss
        self._dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]

    # ---- the objective ----

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Distillation from the model without gates, plus what retained mass above memory_size costs."""
        assert not return_outputs, "rows are scored by evaluate(), under real eviction"
        self._averages.start_clock()
        loss, terms = self._objective(model, inputs)
        self._averages.add(terms, inputs["input_ids"].numel())
        self._last_pass = inputs, loss.detach()
        return loss

    def _objective(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, Terms]:
        """The loss, and what of it is logged."""
        for dropout in self._dropouts:
            dropout.eval()  # else teacher and student would differ by chance
        self._fading.stretch = inputs.get("stretch")
        match = self._match_layers if self.args.objective == "layerwise" else self._match_forecasts
        distillation, recording, terms = match(model, inputs)
        capacity = capacity_loss(
            recording.log_beta,
            self.args.memory_size,
            document_ids=recording.document_ids,
            normalisation=self.args.capacity_normalisation,
            scope=self.args.capacity_scope,
        )
        terms |= {"capacity_loss": capacity.loss.detach()} | describe(
            find_gated_model(self.model), recording, capacity
        )
        return distillation + self.args.capacity_weight * capacity.loss, terms

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass of one batch."""
        diverging = naming_divergence(model, self.state.global_step + 1, self._output_dir)
        with diverging, self._clock.phase("forward_and_backward"), self._as_in_training(model):
            return self._pass(model, inputs, num_items_in_batch)

    @contextmanager
    def _as_in_training(self, model: nn.Module) -> Iterator[None]:
        gated = find_gated_model(model)
        dropouts = temporarily(self._dropouts, training=False)  # off in each pass, and as before when it ends
        with gated.rows_split_over(self._row_groups.own), gated.fading_as(self._fading), dropouts:
            yield

    def _check_update(self, model: nn.Module) -> None:
        """Raises TrainingDiverged if the gates after the last update are worse by far on the rows that made it."""
        if self._last_pass is None:
            return
        (inputs, before), self._last_pass = self._last_pass, None
        after = torch.full_like(before, math.nan)
        with suppress(LogBetaError), torch.no_grad(), self._as_in_training(model), self.compute_loss_context_manager():
            after, _ = self._objective(model, inputs)
        both = self.accelerator.reduce(torch.stack([before, after]).float(), reduction="mean").tolist()
        ratio, history = self.args.divergence_ratio, self.state.log_history
        check_update(self.state.global_step, both, history, ratio=ratio, output_dir=self._output_dir)

    def _pass(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """As Trainer.training_step; with args.cuda_graph from the fourth one on as one graph."""
        if not self.args.cuda_graph:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        if inputs.pop("shares", EVEN) != EVEN:  # numbers would be captured as they are
            raise ValueError(
                "cuda_graph=True with gradient_accumulation_steps needs passes that count equally many forecasts, and "
                "in these rows documents end where they do: leave one of the two out."
            )
        del inputs["counts"]
        if self._graph is None and self._eager_steps == WARM_UP_STEPS:
            with self.compute_loss_context_manager():
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                self._graph = StepGraph(partial(self._objective, model), inputs, trained)
        if self._graph is None or not self._graph.fits(inputs):  # the last batch of an epoch may be a short one
            self._eager_steps += 1
            return super().training_step(model, inputs, num_items_in_batch)
        self._averages.start_clock()
        share = 1 / self.current_gradient_accumulation_steps
        loss, terms = self._graph.run(inputs, share)
        self._averages.add(terms, inputs["input_ids"].numel())
        self._last_pass = inputs, loss
        return loss * share

    def get_train_dataloader(self) -> DataLoader:
        with self._row_groups.dealt_rows():
            return super().get_train_dataloader()

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self.args.ranks_per_row

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The batches of one optimiser step, each with its `shares`."""
        with self._clock.phase("rows"):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.objective == "end_to_end":  # the other one counts rows only
            set_shares(batches, self.accelerator)
        return batches, None

    def _match_forecasts(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, Recording, Terms]:
        """kl_weight * KL(teacher, student) + next_token_weight * cross entropy, means over all rows of the step."""
        kl_share, next_token_share = inputs.get("shares", EVEN)
        tokens = forward_arguments(inputs)
        with torch.no_grad(), self.model.disable_adapter():
            teacher_hidden = self.model(**tokens)  # [B, T, C]
        with record(model) as recording:
            student_hidden = model(**tokens)  # [B, T, C]
        head = self._output_head
        with head.weights() as (weight, bias):  # the gradient is made in the forward pass
            distilled = distill_loss(
                student_hidden.flatten(0, 1),
                teacher_hidden.flatten(0, 1),
                weight,
                inputs["targets"].flatten(),
                mask=inputs["counted"].flatten(),
                bias=bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                kl_weight=self.args.kl_weight * kl_share,
                next_token_weight=self.args.next_token_weight * next_token_share,
                chunk_size=self.args.loss_chunk_size,
            )
        terms = {
            "forward_kl": distilled.forward_kl * kl_share,
            "next_token_loss": distilled.next_token_loss * next_token_share,
        }
        return distilled.total, recording, terms

    def _match_layers(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, Recording, Terms]:
        """kl_weight * the mean over layers of the relative error of the attention output."""
        with record(model, layerwise=True) as recording:
            model(**forward_arguments(inputs))  # every layer passes on the teacher's output: no gradient leaves it
        layer_error = torch.stack(recording.layer_losses).mean()
        return self.args.kl_weight * layer_error, recording, {"layer_error": layer_error.detach()}

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None  # transformers fills it in
        return Path(self.args.output_dir)

    @cached_property
    def _output_head(self) -> OutputHead:
        gated = find_gated_model(self.model)
        with gated.fading_as(Fading()):  # what checks has rows of its own
            if self._sharded:  # could not be checked before it was divided
                with gated.rows_split_over(None):
                    check_packing(self.model)
            return OutputHead.from_model(self.model)

    # ---- what a run tells ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a log of training steps, not of an evaluation or of the whole run
            logs = logs | self._averages.drain(self.accelerator)
            history, ratio = self.state.log_history, self.args.divergence_ratio
            check_progress(self.state.global_step, logs, history, ratio=ratio, output_dir=self._output_dir)
            logs |= self._clock.shares() | peak_memory(self.args.device)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores rows [R, T] under real eviction at each of eval_memory_sizes; means over rows: `eval_kl_64`."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("There is no eval_dataset: give the trainer one, or evaluate(eval_dataset=...).")
        check_eval_rows(rows, self.args.world_size)
        with self._clock.phase("evaluation"):
            scores = score_rows(self.model, rows, self.args, self.accelerator)
            portrait = portray(self.model, rows[0])
            if self.args.should_save:
                show(portrait, self.callback_handler.callbacks, self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, from the last checkpoint in output_dir with True, from the one named with a path.

        Raises:
            ValueError: if there is no whole checkpoint to resume from, if it was written by another kind of run, if
                output_dir holds checkpoints and none was asked for, or if another process is writing there.
        """
        with ExitStack() as held:
            on_first_rank(self.args, lambda: held.enter_context(writing_alone(self._output_dir)))
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._inputs = self._inputs or inputs_of(self.model, self.train_dataset, self.eval_dataset)
        barrier = self.accelerator.wait_for_everyone
        source = find_start(resume_from_checkpoint, self.args, self._run_facts(), barrier)
        if source is None:
            return self._checked(super().train(None, *args, **kwargs))
        state = TrainerState.load_from_json(str(source / TRAINER_STATE_NAME))
        if 0 < self.args.max_steps <= state.global_step:  # transformers would train one more step
            self._load_from_checkpoint(str(source))
            self.state = state
            if self.args.should_save:
                checkpoint.drop_old(self._output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._load_best_model()
            return TrainOutput(state.global_step, math.nan, {})
        return self._checked(super().train(str(source), *args, **kwargs))

    def _checked(self, output: TrainOutput) -> TrainOutput:
        self._check_update(self.model_wrapped)  # the last step's, if it has not been saved
        return output

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter to `folder` in adapter_dtype, as a whole or not at all."""
        barrier = self.accelerator.wait_for_everyone
        with checkpoint.whole_folder(folder, is_writer=self.args.should_save, barrier=barrier) as staging:
            self.save_model(str(staging))
            if self.args.should_save and self.args.adapter_dtype != "float32":
                store_as(staging, self.args.adapter_dtype)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, whole and in the same form whatever holds the model; every rank has to call."""
        of_gates = f".{RetentionGateModel.prefix}."
        gates = {name: parameter for name, parameter in self.model.named_parameters() if of_gates in name}
        with gathered(gates.values()):
            state = {name: whole(parameter).detach().cpu() for name, parameter in gates.items()}
        self._save(output_dir, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        assert output_dir is not None
        # save_embedding_layers="auto" would ask the Hub at every save whether the base's vocabulary has changed
        self.model.save_pretrained(
            output_dir, state_dict=state_dict, is_main_process=self.args.should_save, save_embedding_layers=False
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_update(model)
        with self._clock.phase("saving"):
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self.store_flos()
        output_dir, state = self._output_dir, self.state
        target = output_dir / f"checkpoint-{state.global_step}"
        if state.best_global_step:
            best = output_dir / f"checkpoint-{state.best_global_step}"
            if best == target or best.exists():
                state.best_model_checkpoint = str(best)
        barrier = self.accelerator.wait_for_everyone
        with checkpoint.whole_folder(target, is_writer=self.args.should_save, barrier=barrier) as staging:
            folder = str(staging)
            self.save_model(folder, _internal_call=True)
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
            if self.args.should_save:
                assert isinstance(state.stateful_callbacks, dict)
                for part in (*self.callback_handler.callbacks, self.control):
                    if isinstance(part, ExportableState):
                        state.stateful_callbacks[type(part).__name__] = part.state()
                state.save_to_json(str(staging / TRAINER_STATE_NAME))
            barrier()
            if self.args.should_save:
                checkpoint.write_manifest(staging, self._run_facts())
        if self.args.should_save:
            checkpoint.drop_old(self._output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _run_facts(self) -> dict[str, Any]:
        base_model = self.model.peft_config[self.model.active_adapter].base_model_name_or_path
        return run_facts(self.args, base_model) | {"inputs": self._inputs}
