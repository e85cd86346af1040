"""The arguments of a training run."""

import difflib
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import cast, get_args

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from retention_gates.trainers.adapter_dtype import DTYPES
from retention_gates.trainers.distributed.layout import accumulation_steps, check_devices, check_launch, started_ranks
from retention_gates.trainers.distributed.sequence_parallel import ranks_per_row
from retention_gates.trainers.losses import CapacityNormalisation, CapacityScope

OBJECTIVES = ("end_to_end", "layerwise")
FADES = ("exponential", "gaussian")
EVAL_BUDGETS = ("uniform", "calibrated")
EVAL_METRICS = ("kl", "nll", "full_nll", "agreement")  # each of them for each of eval_memory_sizes: kl_64

# Options of TrainingArguments that this trainer would ignore, or that would break exact resume.
REFUSED = {
    "auto_find_batch_size": "choose per_device_train_batch_size yourself, so that a run can be repeated",
    "ignore_data_skip": "a resumed run would see its first rows again, and go on differently from an unbroken one",
    "label_smoothing_factor": "the teacher's distribution is the target",
    "neftune_noise_alpha": "teacher and student must see the same embeddings",
    "push_to_hub": "push the finished adapter instead",
    "resume_from_checkpoint": "pass it to train(), or resume=true on the command line",
    "save_only_model": "a checkpoint without the optimiser cannot be resumed; the adapter is saved anyway",
    "use_liger_kernel": "the loss is computed in chunks already",
}


@dataclass
class RetentionTrainingArguments(TrainingArguments):
    """Arguments of `RetentionTrainer`; the defaults are those found to work for the gates of small and large models.

    Raises:
        ValueError: for a value that no run can use, or an option of TrainingArguments that would be ignored.
    """

    objective: str = field(
        default="end_to_end",
        metadata={
            "help": "end_to_end: match the model's own forecasts. layerwise: match each attention layer's output on "
            "the model's own activations, with no backward pass through the model; 3 to 4 times cheaper."
        },
    )
    memory_size: int = field(
        default=64, metadata={"help": "Retained mass per KV head, in tokens, above which the capacity loss sets in."}
    )
    capacity_weight: float = field(default=1.0, metadata={"help": "Weight of the capacity loss."})
    capacity_normalisation: CapacityNormalisation = field(
        default="length",
        metadata={"help": "length: excess mass over the position, at all steps; excess: over the most it could be."},
    )
    capacity_scope: CapacityScope = field(
        default="head",
        metadata={
            "help": "head: each KV head's mass is held against memory_size. model: the mean over all heads is: "
            "some may hold more where others hold less, as calibrated budgets let them."
        },
    )
    fade: str = field(
        default="exponential",
        metadata={
            "help": "How keys fade in training attention. exponential: by age * log_beta, as in the paper. gaussian: "
            "by the square of it, late and then at once, which is closer to being held and then evicted."
        },
    )
    largest_memory_size: int | None = field(
        default=None,
        metadata={
            "help": "Train for memories between memory_size and this one: in a row, all tokens are seen up to "
            "largest_memory_size / memory_size times longer than their gates say; which row how long follows from its "
            "tokens. Only memory_size unless given."
        },
    )
    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of forward_kl, or of the layerwise error with objective=layerwise."}
    )
    next_token_weight: float = field(
        default=None,  # type: ignore[assignment]  # filled in
        metadata={"help": "Weight of the next-token loss, 1.0 unless given; end_to_end only."},
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Positions whose logits exist at a time, those of 0.9 GiB unless given; end_to_end only."},
    )
    eval_memory_sizes: list[int] = field(
        default_factory=lambda: [64, 128],
        metadata={"help": "Mean entries per KV head of the evaluations under real eviction."},
    )
    eval_budgets: str = field(
        default="uniform",
        metadata={"help": "How those entries are divided: uniform, or calibrated on the evaluation rows each time."},
    )

    adapter_dtype: str = field(
        default="float32",
        metadata={
            "help": "float32, float16 or bfloat16: how the finished adapter is stored. Gates always work in fp32."
        },
    )

    # What TRIM-KV's loss wants of the optimiser, found by trying.
    max_steps: int = field(default=300, metadata={"help": "Optimiser steps."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per device and forward pass."})
    rows_per_step: int | None = field(
        default=None,
        metadata={"help": "Rows per optimiser step on all ranks; gradient_accumulation_steps follows from it."},
    )
    ranks: int | None = field(default=None, metadata={"help": "Processes the run must have; any number if not given."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Rows per device in evaluation."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps of linear warm-up, or their share if below 1."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the gates' matrices."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of Adam."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute layers in the backward pass; end_to_end only, where yes unless given or cuda_graph."
        },
    )
    cuda_graph: bool = field(
        default=False,
        metadata={
            "help": "Replay forward and backward pass as one CUDA graph, several times faster where the model is so "
            "small that the GPU waits for the host; one GPU, no gradient checkpointing."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Must stay False: gates reach the loss past the model's output."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows have what the loss needs and no more."})
    dataloader_pin_memory: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Pin the memory of rows; yes where there is an accelerator."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    divergence_ratio: float = field(
        default=10.0,
        metadata={"help": "Stop at a loss worse than at first and so many times the lowest one."},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are NaN."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: str | list[str] | None = field(
        default_factory=lambda: ["tensorboard"] if find_spec("tensorboard") else [],
        metadata={"help": "Where logs go beside log.jsonl; tensorboard where it is installed."},
    )

    def __post_init__(self) -> None:
        _check_choice("objective", self.objective, OBJECTIVES)
        _check_choice("capacity_normalisation", self.capacity_normalisation, get_args(CapacityNormalisation))
        _check_choice("capacity_scope", self.capacity_scope, get_args(CapacityScope))
        _check_choice("fade", self.fade, FADES)
        _check_choice("eval_budgets", self.eval_budgets, EVAL_BUDGETS)
        _check_choice("adapter_dtype", self.adapter_dtype, DTYPES)
        _check_count("memory_size", self.memory_size)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be from 0 to {2**32 - 1}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check_count(name, getattr(self, name))
        for name in ("loss_chunk_size", "rows_per_step", "ranks"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.largest_memory_size is not None:
            _check_count("largest_memory_size", self.largest_memory_size)
            if self.largest_memory_size < self.memory_size:
                raise ValueError(
                    f"largest_memory_size={self.largest_memory_size} is below memory_size={self.memory_size}: give a "
                    "larger one, or leave it out."
                )
        if not self.eval_memory_sizes:
            raise ValueError("eval_memory_sizes=[] leaves nothing to evaluate: name at least one memory size.")
        for size in self.eval_memory_sizes:
            _check_count("eval_memory_sizes", size)
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not for training gates: {reason}.")
        if self.ddp_find_unused_parameters:
            raise ValueError(
                "ddp_find_unused_parameters=True would take gates for unused: they reach the loss past the model's "
                "output. Leave it out."
            )
        self._check_length_of_run()
        self._check_best_model()
        self._settle_objective()
        for name in (
            "capacity_weight",
            "kl_weight",
            "next_token_weight",
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
        ):
            _check_weight(name, getattr(self, name))
        if self.save_total_limit is not None and self.save_total_limit < 0:
            raise ValueError(f"save_total_limit={self.save_total_limit} must be 0 or more; 0 or none: all are kept.")
        for name in ("logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0: steps, or their share of the run if below 1.")
        if not self.divergence_ratio > 1:
            raise ValueError(f"divergence_ratio={self.divergence_ratio!r} must be above 1, such as 10.")
        if self.kl_weight == 0 and self.next_token_weight == 0:
            raise ValueError("kl_weight and next_token_weight are both 0: only forgetting would be rewarded.")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = "agreement" in self.metric_for_best_model
        check_devices(self.use_cpu)
        self._settle_row_groups()
        self._settle_accumulation()
        is_given = self.accelerator_config is not None
        try:
            super().__post_init__()
        except (ValueError, OSError):
            raise
        except Exception as error:
            problem = str(error) or type(error).__name__
            raise ValueError(f"transformers refuses these training arguments: {problem}") from error
        check_launch(self.ranks, self.world_size)
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = self.device.type != "cpu"
        if not is_given:  # else the host would wait for the step before, each time that rows are copied to the device
            cast(AcceleratorConfig, self.accelerator_config).non_blocking = self.dataloader_pin_memory

    @property
    def longest_stretch(self) -> float:
        """The most times longer than its gate says that a token is seen."""
        return 1.0 if self.largest_memory_size is None else self.largest_memory_size / self.memory_size

    @property
    def row_groups(self) -> int:
        """The number of ranks, or of groups of ranks that share rows, with rows of their own."""
        return self.world_size // self.ranks_per_row

    def _settle_row_groups(self) -> None:
        self.ranks_per_row = ranks_per_row(self.parallelism_config, started_ranks())
        self.parallelism_config = None  # Accelerate would have DeepSpeed split the rows
        alone = {"objective": self.objective == "layerwise", "cuda_graph": self.cuda_graph}
        alone["torch_compile"] = self.torch_compile
        for name in [name for name, is_on in alone.items() if is_on and self.ranks_per_row > 1]:
            raise ValueError(
                f"sp_size={self.ranks_per_row} with {name}={getattr(self, name)!r}: rows are split over ranks with "
                "objective='end_to_end' alone, neither compiled nor captured. Leave one of the two out."
            )

    def _settle_accumulation(self) -> None:
        if self.rows_per_step is None:
            return
        groups = started_ranks() // self.ranks_per_row
        steps = accumulation_steps(self.rows_per_step, self.per_device_train_batch_size, groups)
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts rows_per_step="
                f"{self.rows_per_step}, which needs {steps}: leave gradient_accumulation_steps out."
            )
        self.gradient_accumulation_steps = steps

    def _check_length_of_run(self) -> None:
        default = TrainingArguments.num_train_epochs
        if self.max_steps > 0 and self.num_train_epochs != default:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs!r} would be ignored, since max_steps={self.max_steps} "
                "decides: leave num_train_epochs out and set max_steps."
            )

    def _check_best_model(self) -> None:
        if not self.load_best_model_at_end:
            return
        measured = [f"{name}_{size}" for name in EVAL_METRICS for size in self.eval_memory_sizes]
        if (self.metric_for_best_model or "").removeprefix("eval_") not in measured:
            raise ValueError(
                f"load_best_model_at_end=True with metric_for_best_model={self.metric_for_best_model!r}, which no "
                f"evaluation measures: set metric_for_best_model to one of {', '.join(measured)}."
            )

    def _settle_objective(self) -> None:
        """Fills in what depends on the objective and refuses what it would ignore."""
        end_to_end = self.objective == "end_to_end"
        checkpointing = getattr(self, "activation_checkpointing", None)  # the newer name in transformers
        if checkpointing is None:
            checkpointing = self.gradient_checkpointing
        if not end_to_end:
            if checkpointing:
                raise ValueError(
                    "gradient_checkpointing=True has nothing to recompute with objective='layerwise', which has no "
                    "backward pass through the model: leave it out."
                )
            if self.next_token_weight:
                raise ValueError(
                    f"next_token_weight={self.next_token_weight!r} needs objective='end_to_end': the layerwise one "
                    "never looks at the model's forecasts."
                )
        if self.cuda_graph and (checkpointing or self.torch_compile):
            other = "gradient_checkpointing" if checkpointing else "torch_compile"
            raise ValueError(f"cuda_graph=True and {other}=True do not go together: leave one of them out.")
        checkpointing = end_to_end and not self.cuda_graph if checkpointing is None else bool(checkpointing)
        if self.next_token_weight is None:
            self.next_token_weight = 1.0 if end_to_end else 0.0
        self.gradient_checkpointing = checkpointing
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = checkpointing
        # an older and a newer name in transformers
        names = [n for n in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs") if hasattr(self, n)]
        for name in names:
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a mapping, such as {{determinism_check: none}}."
                )
        given = {key: value for name in names for key, value in (getattr(self, name) or {}).items()}
        if given.get("use_reentrant"):
            raise ValueError(
                f"{names[0]}={given!r}: the reentrant form would lose the gradient of what is recorded in a layer. "
                "Leave use_reentrant out."
            )
        for name in names:
            setattr(self, name, {"use_reentrant": False, **given})


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0)
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}; the nearest is {near[0]!r}.")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")


def _check_weight(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} must be a finite number, 0 or more.")
