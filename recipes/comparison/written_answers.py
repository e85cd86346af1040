"""Suites of the Hub and tasks of lm-eval, answered with each memory and the full cache.

    retention-gates evaluate --adapter out/adapter --suites gsm8k ruler/4096 --memory-size 512 --output out/answers
    retention-gates evaluate --adapter out/adapter --lm-eval gsm8k,arc_easy --memory-size 512 --output out/lm_eval

writes results.jsonl (a header, then one object per question, contender and sample), report.md, report.html,
summary.jsonl (every mean, as benchmarks write theirs) and answers.jsonl, from which a run that was stopped goes on.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from retention_gates.checkpoints.evaluation_files import REPORT, RESULTS, without_folders
from retention_gates.data.suites import EncodedQuestion, encode_questions, load_suite
from retention_gates.gates.adapter.base_identity import display_name
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.recipes.comparison.answer_store import AnswerStore
from retention_gates.recipes.comparison.lm_eval_model import check_installed, run_lm_eval
from retention_gates.recipes.loading.models import base_name, check_gates_trained, load_model, load_tokenizer
from retention_gates.recipes.loading.output_folder import check_output, claim_output, write_text
from retention_gates.recipes.loading.provenance import machine_and_versions
from retention_gates.recipes.loading.rows import calibration_rows
from retention_gates.recipes.report import evaluation_report
from retention_gates.recipes.report.answers_page import answers_page
from retention_gates.trainers.evaluation.contenders import FULL_CACHE, MEASURED, Contender, contenders, name_of
from retention_gates.trainers.evaluation.kept_mass import with_measured_budgets
from retention_gates.trainers.evaluation.paired_statistics import Summary, aggregate, mean_over_samples
from retention_gates.trainers.evaluation.written import Ask, Effort, check_samples, compare_generations

SUMMARY, PAGE = "summary.jsonl", "report.html"
POLICIES = ("retention", "streaming_llm", "random", "key_norm")
REFERENCE = "streaming_llm"
CALIBRATION_ROWS, CALIBRATION_LENGTH = 8, 1024  # of measured budgets


def wanted(options: argparse.Namespace) -> bool:
    """Whether written answers were asked for."""
    return bool(options.suites or options.lm_eval)


def main(options: argparse.Namespace) -> None:
    """Answers, scores and writes the report."""
    began, clock = datetime.now(UTC), time.monotonic()
    if options.output is None:
        raise ValueError("Name a folder for the results: --output.")
    check_output(options.output)
    policies = options.policies or [name for name in POLICIES if name != "retention" or options.adapter]
    _check(options, policies)

    contenders(policies, options.memory_size, options.budgets or ["uniform"])  # a misspelt name should not wait
    questions = []
    for suite in options.suites:
        title, _, source = suite.partition("=")
        questions += load_suite(title, source=source or None, limit=options.limit)
    name = base_name(options.model, options.adapter)
    tokenizer = load_tokenizer(name, gguf_file=options.gguf_file)
    encoded = encode_questions(questions, tokenizer, longest_prompt=options.longest_prompt)
    rows = None
    if options.calibrate_on is not None:
        rows = calibration_rows(options.calibrate_on, tokenizer, CALIBRATION_ROWS, CALIBRATION_LENGTH, options.seed)
    model = load_model(name, options.adapter, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    calibrated = bool(find_gated_model(model).active_config.budget_shares)
    budgets = options.budgets or (["uniform", "calibrated"] if calibrated else ["uniform"])
    chosen = contenders(policies, options.memory_size, budgets)
    if rows is not None:
        chosen = with_measured_budgets(
            model, chosen, rows, lambda policy: print(f"measuring the kept mass of {policy}", file=sys.stderr)
        )
    efforts: list[Effort] = []
    records = _answer(model, tokenizer, encoded, chosen, options, efforts)
    reference = REFERENCE if REFERENCE in policies and "uniform" in budgets else None
    header: dict[str, Any] = {
        "model": name,
        "gguf_file": options.gguf_file,
        "adapter": options.adapter,
        "suites": options.suites,
        "lm_eval": options.lm_eval,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "samples": options.samples,
        "temperature": options.temperature,
        "longest_prompt": options.longest_prompt,
        "tokens_left_out": sum(question.cut for question in encoded),
        "seed": options.seed,
        "calibrate_on": options.calibrate_on,
        **machine_and_versions(model),
        "time": began.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "efforts": [_told(effort) for effort in efforts if effort.answers],
    }
    summaries = aggregate(mean_over_samples(records), reference=reference)
    text = markdown(header, summaries, reference)
    folder = claim_output(options.output)
    write_text(folder / RESULTS, evaluation_report.json_lines(header, records))
    write_text(folder / REPORT, text)
    write_text(folder / SUMMARY, summary_lines(header, summaries))
    title = display_name(name, options.gguf_file)
    page = answers_page(title, facts_of(header), summaries, records, by_task_and_row(encoded))
    write_text(folder / PAGE, page)
    files = [RESULTS, REPORT, SUMMARY, PAGE]
    print(text)
    print(f"written: {', '.join(str(folder / file) for file in files)}")


def markdown(header: dict[str, Any], summaries: "Sequence[Summary]", reference: str | None) -> str:
    """One table for all tasks: mean score ± its standard error, and how often a contender beats the reference."""
    lines = [
        "# Written answers with a bounded memory",
        "",
        *(f"- {line}" for line in facts_of(header)),
        "",
        "| task | entries per head | policy | budgets | score | questions | better / worse than "
        f"{reference or 'the reference'} | p of that |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for summary in sorted(summaries, key=lambda s: (s.task, s.memory_size or 0)):
        score = summary.scores["score"]
        error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
        pairing = score.pairing
        cells = [
            summary.task,
            "all" if summary.memory_size is None else str(summary.memory_size),
            summary.policy,
            summary.budgets or "",
            f"{score.mean:.3f}{error}",
            str(summary.rows),
            "" if pairing is None else f"{pairing.wins} / {pairing.losses}",
            "" if pairing is None else f"{pairing.p_value:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "± is the standard error over questions; p that of a two-sided sign test.", ""]
    if header["efforts"]:
        lines += [
            "| entries per head | policy | budgets | answers | tokens | seconds |",
            "|---:|---|---|---:|---:|---:|",
        ]
    for effort in header["efforts"]:
        cells = ["all" if effort["memory_size"] is None else str(effort["memory_size"]), effort["policy"]]
        cells += [effort["budgets"] or "", str(effort["answers"]), str(effort["tokens"]), f"{effort['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def facts_of(header: dict[str, Any]) -> list[str]:
    """Lists what was run, a line each; names are in backticks."""
    name = without_folders(header["model"])
    file = f" (`{header['gguf_file']}`)" if header["gguf_file"] else ""
    drawn = "the likeliest token each time"
    if header["temperature"]:
        drawn = f"mean of {header['samples']} to each question, drawn at temperature {header['temperature']:g}"
    return [
        f"model: `{name}`{file}; adapter: {header['adapter'] or 'none, gates untrained'}",
        f"suites: {', '.join(header['suites']) or 'none'}; lm-eval: {header['lm_eval'] or 'none'}; "
        f"records of each: {header['limit'] or 'all'}; tokens of prompts left out: {header['tokens_left_out']}",
        f"answers: {drawn}; {header['batch_size']} at a time; seed {header['seed']}",
        f"run: retention-gates {header['retention_gates']}, {header['device']}, {header['dtype']}; "
        f"{header['time']}, {header['seconds']:.0f} s",
    ]


def by_task_and_row(questions: Sequence[EncodedQuestion]) -> dict[tuple[str, int], EncodedQuestion]:
    """Questions by their task and their place among those of the task, as records name them."""
    rows: Counter[str] = Counter()
    found = {}
    for question in questions:
        found[question.task, rows[question.task]] = question
        rows[question.task] += 1
    return found


def summary_lines(header: dict[str, Any], summaries: Sequence[Summary]) -> str:
    """Every mean and the seconds of each contender, as benchmarks write theirs; `limit` is the full cache's mean."""
    model = display_name(header["model"], header["gguf_file"])
    drawn = f" T={header['temperature']:g} samples={header['samples']}" if header["temperature"] else ""
    machine = {"gpu": header["device"]} | {name: header[name] for name in ("torch", "triton", "commit", "time")}
    full = {s.task: s.scores["score"].mean for s in summaries if s.policy == FULL_CACHE}
    measured = [
        {
            "bench": "written_answers",
            "case": f"{s.task} {model} M={s.memory_size or 'all'} n={s.rows}{drawn}",
            "contender": s.policy if s.budgets is None else f"{s.policy}/{s.budgets}",
            "value": s.scores["score"].mean,
            "unit": "accuracy",
            "spread": s.scores["score"].standard_error,
            "limit": full.get(s.task),
        }
        for s in summaries
    ]
    measured += [
        {
            "bench": "answer_seconds",
            "case": f"{'+'.join(map(_name, header['suites']))} {model} M={e['memory_size'] or 'all'} "
            f"n={e['answers']} batch={header['batch_size']}{drawn}",
            "contender": e["policy"] if e["budgets"] is None else f"{e['policy']}/{e['budgets']}",
            "value": e["seconds"],
            "unit": "s",
            "spread": None,
            "limit": None,
        }
        for e in header["efforts"]
    ]
    objects = [each | {"peak_mib": None, "error": None} | machine for each in measured]
    return "".join(json.dumps(each, allow_nan=False) + "\n" for each in objects)


def _name(suite: str) -> str:
    """Of a suite that may be read from a local file."""
    return suite.partition("=")[0]


def _told(effort: Effort) -> dict[str, Any]:
    numbers = {"answers": effort.answers, "tokens": effort.tokens, "seconds": round(effort.seconds, 2)}
    return name_of(effort.contender) | numbers


def _check(options: argparse.Namespace, policies: Sequence[str]) -> None:
    if options.tasks:
        raise ValueError("--tasks is scored without writing answers: evaluate it in a run of its own.")
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be 1 or more.")
    try:
        check_samples(options.samples, options.temperature)
    except ValueError as error:
        raise ValueError(f"--samples {options.samples} --temperature {options.temperature:g}: {error}") from error
    if options.lm_eval and (options.samples, options.temperature) != (1, 0.0):
        raise ValueError("--samples and --temperature are for --suites; lm-eval's tasks say themselves how they draw.")
    if (MEASURED in (options.budgets or [])) != (options.calibrate_on is not None):
        raise ValueError(
            "--budgets measured and --calibrate-on SOURCE go together: measured budgets are found on texts that are "
            "not scored."
        )
    if min(options.memory_size) < 1:
        raise ValueError(f"--memory-size {min(options.memory_size)} must be 1 or more.")
    if options.lm_eval:  # before anything is loaded
        check_installed()
    check_gates_trained(list(policies), options.adapter)


def _answer(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    questions: "Sequence[EncodedQuestion]",
    chosen: "Sequence[Contender]",
    options: argparse.Namespace,
    efforts: list[Effort],
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    if questions:
        facts = {name: getattr(options, name) for name in ("seed", "temperature", "max_new_tokens")}
        store = AnswerStore(options.output, model, questions, **facts)
        total = len(questions) * (1 + len(chosen)) * options.samples
        with tqdm(total=total, desc="answering", unit="answer", smoothing=0.05) as bar:

            def known(ask: Ask) -> dict[str, Any] | None:
                record = store.known(ask)
                bar.update(record is not None)
                return record

            def found(ask: Ask, record: dict[str, Any]) -> None:
                store.add(ask, record)
                bar.update()

            try:
                records += compare_generations(
                    model,
                    tokenizer,
                    questions,
                    chosen,
                    batch_size=options.batch_size,
                    samples=options.samples,
                    temperature=options.temperature,
                    max_new_tokens=options.max_new_tokens,
                    seed=options.seed,
                    known=known,
                    found=found,
                    spent=efforts.append,
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"--batch-size {options.batch_size} needs more memory than the device has ({str(error)[:80]}...): "
                    "give a smaller one, and the run goes on from the answers that it has."
                ) from error
            finally:
                store.flush()
        if len(records) > (new := sum(effort.answers for effort in efforts)):
            print(f"{len(records) - new} of {len(records)} answers were there already; {new} were written.")
    if options.lm_eval:
        records += run_lm_eval(
            model,  # type: ignore[arg-type]
            tokenizer,
            [task.strip() for task in options.lm_eval.split(",") if task.strip()],
            chosen,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            max_new_tokens=options.max_new_tokens,
            include_path=options.include_path,
            chat=options.chat,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    return records
