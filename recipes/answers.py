"""Writes the base model's own answers to the questions of a data set, as chats that gates can be trained on.

    retention-gates answers openai/gsm8k --subset main --text-field question --output out/maths --batch-size 256 \\
        --model Qwen/Qwen2.5-Coder-1.5B-Instruct \\
        --instruction "Reason step by step and put the final answer into \\boxed{}."

writes answers.jsonl, one chat a line with the work that it belongs to, which a training run takes as it is:
{source: out/maths/answers.jsonl, chat_field: messages, work_field: work}. Answers that had not ended, or are blank,
lie beside it in left_out.jsonl and, with --solution-field, the data set's own answers in solutions.jsonl. A command
that was stopped goes on where it was; more samples or a higher limit add to what is there. An answer depends on its
question, the seed and the number of the sample, not on what else is answered.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from retention_gates.data.files import check_text
from retention_gates.data.sources import Document, load_documents
from retention_gates.data.suites.encoding import chat_prompt
from retention_gates.gates.adapter.base_identity import fingerprint
from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.cache.bounded_cache import BoundedCache
from retention_gates.recipes.loading.line_file import LineFile, json_lines
from retention_gates.recipes.loading.models import load_model, load_tokenizer
from retention_gates.recipes.loading.output_folder import check_output, claim_output, write_text
from retention_gates.trainers.evaluation.answer_batches import answer_prompts, ending_tokens
from retention_gates.trainers.evaluation.written import check_sample_room, check_samples, loops

ANSWERS, LEFT_OUT, FACTS = "answers.jsonl", "left_out.jsonl", "answers.json"
SOLUTIONS = "solutions.jsonl"
KEYS = ("work", "question", "sample", "messages")


@dataclass(frozen=True)
class Question:
    """A chat that ends with a user's turn."""

    work: str
    messages: list[dict[str, Any]]
    prompt_ids: list[int]
    digest: str  # of the messages
    place: str  # where it stands in the data set


def main(options: argparse.Namespace) -> None:
    _check(options)
    check_output(options.output)
    tokenizer = load_tokenizer(options.model, gguf_file=options.gguf_file)
    questions = load_questions(options, tokenizer)
    solutions = load_solutions(options, questions)
    check_sample_room(options.samples, len(questions))
    model = load_model(options.model, None, gguf_file=options.gguf_file, device=options.device, dtype=options.dtype)
    base = find_gated_model(model).model
    _check_fit(questions, options, getattr(text_config(base), "max_position_embeddings", None))
    facts = {
        "model": options.model,
        "gguf_file": options.gguf_file,
        "weights": fingerprint(base, getattr(text_config(base), "rope_parameters", None)),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    _check_facts(options.output / FACTS, facts)
    folder = claim_output(options.output)
    write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    if solutions:
        write_text(folder / SOLUTIONS, json_lines(solutions))
    answers, left_out = LineFile(folder / ANSWERS, KEYS), LineFile(folder / LEFT_OUT, KEYS)
    clock = time.monotonic()
    written, tokens = _write(model, tokenizer, questions, options, answers, left_out)
    order = {question.digest: place for place, question in enumerate(questions)}
    for file in (answers, left_out):
        file.rewrite(sorted(file.objects, key=lambda each: _place(each, order)))  # not as the answers happened to end
    print(
        f"{written} answers of {tokens:,} tokens were written in {time.monotonic() - clock:.0f} s. {folder / ANSWERS} "
        f"has {len(answers.objects)}; {len(left_out.objects)} had not ended or were blank and are in {LEFT_OUT}."
    )


def _write(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    options: argparse.Namespace,
    answers: LineFile,
    left_out: LineFile,
) -> tuple[int, int]:
    """Writes the answers that the files don't have; gives how many, and their tokens."""
    known = {(each["question"], each["sample"]) for each in [*answers.objects, *left_out.objects]}
    asks = [(question, sample) for question in questions for sample in range(options.samples)]
    missing = [(question, sample) for question, sample in asks if (question.digest, sample) not in known]
    tokens, endings = 0, ending_tokens(model)
    longest = max(len(question.prompt_ids) for question in questions) + options.max_new_tokens

    def cache_of() -> BoundedCache:
        # with an entry for every token nothing is evicted, and steps of a fixed size are captured on a GPU
        return BoundedCache(model, longest, policy="streaming_llm", budgets="uniform")

    with tqdm(total=len(asks), initial=len(asks) - len(missing), desc="answering", unit="answer") as bar:
        try:
            for number, ids in answer_prompts(
                model,
                [question.prompt_ids for question, _ in missing],
                cache_of=cache_of,
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=[_seed(options.seed, question, sample) for question, sample in missing],
            ):
                question, sample = missing[number]
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                chat = [*question.messages, {"role": "assistant", "content": text}]
                record = {"work": question.work, "question": question.digest, "sample": sample, "tokens": len(ids)}
                why = _why_left_out(text, ids, endings)
                if why is None:
                    answers.add(record | {"messages": chat})
                else:
                    left_out.add(record | {"why": why, "messages": chat})
                tokens += len(ids)
                bar.update()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch-size {options.batch_size} needs more memory than the device has ({str(error)[:80]}...): "
                "give a smaller one, and the command goes on from the answers that it has."
            ) from error
        finally:
            answers.flush()
            left_out.flush()
    return len(missing), tokens


def _place(record: dict[str, Any], order: dict[str, int]) -> tuple[int, str, int]:
    return order.get(record["question"], len(order)), record["question"], record["sample"]


def load_questions(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The questions, in the data set's order or drawn by the seed; one that stands there twice is asked once."""
    documents = load_documents(
        options.questions,
        split=options.split,
        subset=options.subset,
        text_field=options.text_field,
        chat_field=options.chat_field,
        work_field=options.work_field,
        limit=options.limit,
        seed=None if options.limit is None else options.seed,
    )
    found: dict[str, Question] = {}
    too_long = 0
    for document in documents:
        messages = _asked(document, options.instruction)
        digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
        ids = chat_prompt(messages, tokenizer, document.place or document.work)
        if options.longest_question is not None and len(ids) > options.longest_question:
            too_long += 1
            continue
        work = digest if options.work_field is None else document.work
        found.setdefault(digest, Question(work, messages, ids, digest, document.place))
    if too_long:
        print(f"{too_long} of {len(documents)} questions have more than {options.longest_question} tokens: left out.")
    if not found:
        raise ValueError(f"{options.questions} has no question to answer: raise --longest-question, or name another.")
    return list(found.values())


def load_solutions(options: argparse.Namespace, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Chats of the questions with the data set's own answers, where it has any; none if they are not asked for."""
    if options.solution_field is None:
        return []
    documents = load_documents(
        options.questions, split=options.split, subset=options.subset, text_field=options.solution_field
    )
    texts = {document.place: str(document.text).strip() for document in documents}
    return [
        {
            "work": question.work,
            "question": question.digest,
            "messages": [*question.messages, {"role": "assistant", "content": texts[question.place]}],
        }
        for question in questions
        if question.place in texts
    ]


def _asked(document: Document, instruction: str | None) -> list[dict[str, Any]]:
    """The chat up to the user's last turn, with the instruction behind it."""
    if document.messages is None:
        messages = [{"role": "user", "content": str(document.text).strip()}]
    else:
        users = [place for place, message in enumerate(document.messages) if message["role"] == "user"]
        if not users:
            raise ValueError(
                f"{document.place or document.work} has no user's turn to answer: name another column with "
                "--chat-field."
            )
        messages = [dict(message) for message in document.messages[: users[-1] + 1]]
    if instruction:
        messages[-1]["content"] = f"{messages[-1]['content']}\n\n{instruction}"
    return messages


def _why_left_out(text: str, ids: Sequence[int], endings: Sequence[int]) -> str | None:
    if ids[-1] not in endings:
        return "loops" if loops(ids) else "had not ended"
    return None if text.strip() else "blank"


def _seed(seed: int, question: Question, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {question.digest} {sample}".encode()).digest()[:8], "big")


def _check(options: argparse.Namespace) -> None:
    for name in ("batch_size", "max_new_tokens", "limit", "longest_question"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be 1 or more.")
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed} must be 0 or more.")
    if options.instruction is not None:
        check_text(options.instruction, "--instruction")
    try:
        check_samples(options.samples, options.temperature)
    except ValueError as error:
        raise ValueError(f"--samples {options.samples} --temperature {options.temperature:g}: {error}") from error


def _check_fit(questions: Sequence[Question], options: argparse.Namespace, positions: int | None) -> None:
    longest = max(questions, key=lambda question: len(question.prompt_ids))
    length = len(longest.prompt_ids)
    if positions is not None and length + options.max_new_tokens > positions:
        raise ValueError(
            f"The longest question has {length} tokens and its answer may have {options.max_new_tokens}, but the "
            f"model has {positions} positions: leave long ones out with --longest-question, or lower --max-new-tokens."
        )


def _check_facts(path: Any, facts: dict[str, Any]) -> None:
    """Raises ValueError if the answers in the folder were written otherwise."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in facts if before[name] != facts[name])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): give another --output.") from error
    if changed:
        told = ", ".join(f"{name} was {before[name]!r} and is {facts[name]!r} now" for name in changed)
        raise ValueError(f"The answers in {path.parent} were written otherwise: {told}. Give another --output.")
