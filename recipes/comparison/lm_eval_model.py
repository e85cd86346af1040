"""Tasks of lm-eval (the Language Model Evaluation Harness) with a cache of fixed size; needs the package lm-eval."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.gates.simulation.simulated_cache import SimulatedCache
from retention_gates.trainers.evaluation.contenders import Contender, name_of

INSTALLED = find_spec("lm_eval") is not None
if INSTALLED:
    from lm_eval.evaluator import simple_evaluate  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,import-untyped,unused-ignore]
else:  # everything but a model can be had without it
    HFLM = object


class BoundedCacheLM(HFLM):
    """An lm-eval model whose every batch has a bounded cache of its own, or the full cache of the base model.

    Answers are generated with a BoundedCache. Likelihoods come from one pass with a SimulatedCache, which sees what a
    token-by-token decode would. lm-eval pads these batches on the right: a later token changes nothing before it.

    Args:
        contender: the memory; None: the full cache, gates off.
        seed: of policies that draw by chance.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        contender: Contender | None,
        *,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        check_installed()
        if contender is not None and contender.pin:
            raise ValueError("The tasks of lm-eval have no spans to pin: give a contender with pin=False.")
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.contender, self.seed = contender, seed

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        with torch.no_grad():
            if self.contender is None:
                with self.model.disable_adapter():
                    return self.model(input_ids=inps, use_cache=False).logits
            return self.model(input_ids=inps, past_key_values=self._cache(SimulatedCache), use_cache=True).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        if self.contender is None:
            with self.model.disable_adapter():
                return super()._model_generate(context, max_length, stop, **options)
        return super()._model_generate(context, max_length, stop, past_key_values=self._cache(BoundedCache), **options)

    def _cache(self, kind: Any) -> Any:
        assert self.contender is not None
        contender = self.contender
        return kind(
            self.model, contender.memory_size, policy=contender.policy, budgets=contender.division, seed=self.seed
        )

    # What lm-eval would cut off with a warning is refused.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        longest = max(int(request.args[1].get("max_gen_toks", self.max_gen_toks)) for request in requests)
        if longest >= self.max_length:
            raise ValueError(
                f"Answers of up to {longest} tokens leave no room for a prompt in the model's {self.max_length} "
                "positions: ask for shorter ones with max_new_tokens, or take a model with a longer context."
            )
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is not None:
            self._check_length(ids.shape[1], left_truncate_len)
        return ids, mask

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            self._check_length(len(context) + len(continuation) - 1, self.max_length)
        return super()._loglikelihood_tokens(requests, *args, **options)

    def _check_length(self, tokens: int, most: int) -> None:
        if tokens > most:
            raise ValueError(
                f"A prompt has {tokens} tokens and the model has room for {most} of its {self.max_length} positions: "
                "leave this task out, give fewer few-shot examples, or take a model with a longer context."
            )


def check_installed() -> None:
    """Raises ValueError if the package lm-eval is not there."""
    if not INSTALLED:
        raise ValueError('lm-eval\'s tasks need its package: pip install "retention-gates[eval]".')


def run_lm_eval(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    chosen: Sequence[Contender],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int | None = None,
    include_path: str | Path | None = None,
    chat: bool = False,
    batch_size: int = 1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Scores each contender and the full cache: one record per document, metric and contender.

    A record's task is "TASK/METRIC", or "TASK/FILTER/METRIC" where the task filters answers; its `score` is the
    metric's value for this document, and `answer` what was written, if anything was. Metrics of a corpus as a whole,
    such as perplexity, have no value for one document and are left out.

    Args:
        limit: documents of each task, the first ones.
        num_fewshot: examples in front of each question; None: as many as the task wants.
        max_new_tokens: of every answer; None: what each task allows.
        include_path: a folder with more tasks in lm-eval's YAML form.
        chat: put each question into the tokenizer's chat template.

    Raises:
        ValueError: for an unknown task, or a prompt that is longer than the model's positions.
    """
    check_installed()
    if chat and not tokenizer.chat_template:
        raise ValueError("The model's tokenizer has no chat template: leave chat out.")
    if not tasks:
        raise ValueError("Name at least one task of lm-eval.")
    manager = _task_manager(tasks, include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm-eval has no task {unknown[0]!r}: `lm-eval ls tasks` lists them, and include_path adds a folder with "
            "your own."
        )
    records = []
    for contender in [None, *chosen]:
        lm = BoundedCacheLM(model, tokenizer, contender, batch_size=batch_size, seed=seed)
        results = simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=0,
            verbosity=logging.ERROR,
        )
        for task, samples in results["samples"].items():
            records += [record for sample in samples for record in _records(task, sample, contender)]
    return records


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> "TaskManager":
    """Knows the tasks of the folder and, unless these are enough, lm-eval's own: to look through those takes long."""
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(task in manager.all_tasks for task in tasks):
            return manager
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _records(task: str, sample: dict[str, Any], contender: Contender | None) -> list[dict[str, Any]]:
    """Records of one document and one filter."""
    answers = sample["filtered_resps"]
    answer = answers[0] if len(answers) == 1 and isinstance(answers[0], str) else None
    kind = task if sample["filter"] == "none" else f"{task}/{sample['filter']}"
    return [
        {"task": f"{kind}/{metric}", "row": sample["doc_id"], **name_of(contender)}
        | {"score": float(sample[metric]), "answer": answer}
        for metric in sample["metrics"]
        if isinstance(sample[metric], (int, float))
    ]
