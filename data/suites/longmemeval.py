"""LongMemEval: questions about a user, long after what they told in many chat sessions (arXiv 2410.10813).

The published score is the judgement of a large model. Here it is the share of the reference answer's words in the
answer, which compares memories with each other but not with published numbers; questions whose reference is a rubric
(preferences) or that have no answer (abstention) can't be scored so and are left out. The wording of the prompt is
ours.
"""

import json

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.scoring import word_recall

MAX_NEW_TOKENS = 500
KINDS = (
    "single-session-user", "single-session-assistant", "single-session-preference", "temporal-reasoning",
    "knowledge-update", "multi-session",
)  # fmt: skip
WITHOUT_ANSWER = "_abs"  # ends the id of a question that the chats do not answer


def read(record: Record, subset: str) -> list[SuiteExample]:
    """The question of a record, behind all its sessions; nothing if it can't be scored here."""
    kind = record.text("question_type")
    if kind not in KINDS:
        raise ValueError(f"longmemeval: field 'question_type' of {record.name} is {kind!r}; known: {', '.join(KINDS)}")
    answer = str(record.get("answer", (str, int, float))).strip()
    dates, sessions = record.get("haystack_dates", list), record.get("haystack_sessions", list)
    if len(dates) != len(sessions) or not sessions:
        raise ValueError(
            f"longmemeval: {record.name} has {len(dates)} 'haystack_dates' and {len(sessions)} 'haystack_sessions'; "
            "there should be as many of one as of the other"
        )
    if kind == "single-session-preference" or record.text("question_id").endswith(WITHOUT_ANSWER):
        return []
    told = sorted(zip(dates, sessions, strict=True), key=lambda pair: pair[0])
    history = "\n\n".join(f"Session of {date}:\n{_session(record, session)}" for date, session in told)
    prompt = (
        f"These are our earlier chats.\n\n{history}\n\nToday is {record.text('question_date')}. Answer the question "
        f"from what was said in them.\nQuestion: {record.text('question')}"
    )
    messages = ({"role": "user", "content": prompt},)
    return [SuiteExample(f"longmemeval/{kind}", messages, (answer,), MAX_NEW_TOKENS, word_recall)]


def _session(record: Record, session: object) -> str:
    if not isinstance(session, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in session
    ):
        raise ValueError(
            f"longmemeval: field 'haystack_sessions' of {record.name} holds no chat but {str(session)[:60]!r}"
        )
    return "\n".join(json.dumps({turn["role"]: turn["content"]}, ensure_ascii=False) for turn in session)


LONGMEMEVAL = Suite(
    "longmemeval",
    "xiaowu0162/longmemeval-cleaned",
    ("oracle", "s", "m"),
    "train",
    read,
    files={
        "oracle": "longmemeval_oracle.json",
        "s": "longmemeval_s_cleaned.json",
        "m": "longmemeval_m_cleaned.json",
    },
)
