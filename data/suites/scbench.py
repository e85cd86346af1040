"""SCBench: several questions about one long context (arXiv 2412.10319).

Every question is an example of its own, asked after the earlier questions and their true answers, as in the
benchmark's multi-turn mode. Where a task needs an instruction, its wording is ours, so that scores are close to the
published ones but not the same protocol. The tasks that retrieve functions from repositories, `scbench_repoqa` and
`scbench_repoqa_and_kv`, are left out: their score parses code in several languages.
"""

from retention_gates.data.suites.base import Message, Record, Scorer, Suite, SuiteExample
from retention_gates.data.suites.scoring import (
    character_f1,
    choice,
    contains_any,
    contains_share,
    first_number,
    rouge_l,
)

# task -> (scorer, tokens of the longest answer, instruction before the context)
TASKS: dict[str, tuple[Scorer, int, str]] = {
    "scbench_kv": (contains_any, 150, "Find the value of a key in this JSON object."),
    "scbench_prefix_suffix": (contains_any, 150, ""),
    "scbench_vt": (contains_share, 30, ""),
    "scbench_qa_eng": (contains_any, 40, "Read the book and answer questions about it in a few words."),
    "scbench_qa_chn": (character_f1, 40, "请阅读这本书，并简短地回答问题。"),
    "scbench_choice_eng": (choice, 40, "Read the book and answer questions about it by the letter of one option."),
    "scbench_many_shot": (contains_any, 10, ""),
    "scbench_mf": (first_number, 5, "Look at this list of numbers."),
    "scbench_summary": (rouge_l, 200, ""),
}
MIXED = "scbench_summary_with_needles"  # each turn names its task
MIXED_TASKS: dict[str, tuple[Scorer, int]] = {"scbench_summary": (rouge_l, 800), "scbench_passkey": (first_number, 15)}


def read(record: Record, subset: str) -> list[SuiteExample]:
    """All questions of a record, in order."""
    context = record.get("context", (str, list))
    instruction = "" if subset == MIXED else TASKS[subset][2]
    so_far: list[Message] = []
    examples = []
    for turn in record.records("multi_turns"):
        question, references = _question(turn, subset)
        if subset == MIXED:
            task = turn.text("task")
            if task not in MIXED_TASKS:
                raise ValueError(f"scbench: field 'task' of {turn.name} is {task!r}; known: {', '.join(MIXED_TASKS)}")
            scorer, longest = MIXED_TASKS[task]
            name = f"scbench/{MIXED.removeprefix('scbench_')}/{task.removeprefix('scbench_')}"
        else:
            scorer, longest, _ = TASKS[subset]
            name = f"scbench/{subset.removeprefix('scbench_')}"
        opening = [] if so_far else [part for part in (instruction, str(context)) if part]
        so_far.append({"role": "user", "content": "\n\n".join([*opening, question])})
        examples.append(SuiteExample(name, tuple(so_far), references, longest, scorer))
        so_far.append({"role": "assistant", "content": ", ".join(references)})
    return examples


def _question(turn: Record, subset: str) -> tuple[str, tuple[str, ...]]:
    question = turn.text("input")
    if subset == "scbench_mf":
        return question, (str(turn.get("answer", int)),)
    if subset != "scbench_choice_eng":
        return question, turn.texts("answer")
    options, answer = turn.texts("options"), turn.text("answer")
    if len(options) != 4:
        raise ValueError(f"scbench: field 'options' of {turn.name} has {len(options)} options and should have 4")
    letter = "ABCD"[options.index(answer)] if answer in options else answer
    if letter not in ("A", "B", "C", "D"):
        raise ValueError(f"scbench: field 'answer' of {turn.name} is {answer!r}, neither an option nor A to D")
    listed = "\n".join(f"{name}. {option}" for name, option in zip("ABCD", options, strict=True))
    return f"{question}\n{listed}", (letter,)


SCBENCH = Suite("scbench", "microsoft/SCBench", (*TASKS, MIXED), "test", read)
