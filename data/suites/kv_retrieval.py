"""Key-value retrieval: the value of one key among many of random identifiers ("Lost in the Middle", arXiv 2307.03172).

Identifiers cannot be guessed or shortened, so that a memory either holds the pair that is asked for or fails. The
score is the published one, whether the value stands in the answer. The data, records with `ordered_kv_records`, `key`
and `value`, is in the repository nelson-liu/lost-in-the-middle and not on the Hub. The question stands behind the
pairs, as there; its wording is ours, so that scores are to be compared within one report.
"""

import json

from retention_gates.data.suites.base import Record, Suite, SuiteExample
from retention_gates.data.suites.scoring import contains_any

MAX_NEW_TOKENS = 100
HOME = "https://github.com/nelson-liu/lost-in-the-middle, folder kv_retrieval_data"


def read(record: Record, subset: str) -> list[SuiteExample]:
    """A JSON object, one pair a line, and the key whose value is asked for."""
    pairs, key, value = record.get("ordered_kv_records", (list, tuple)), record.text("key"), record.text("value")
    is_pair = [isinstance(pair, list | tuple) and [type(part) for part in pair] == [str, str] for pair in pairs]
    if not pairs or not all(is_pair) or (key, value) not in map(tuple, pairs):
        raise ValueError(
            f"kv_retrieval: field 'ordered_kv_records' of {record.name} must be pairs of texts, the one of 'key' and "
            f"'value' among them: {str(pairs)[:60]!r}"
        )
    lines = ",\n ".join(f"{json.dumps(name)}: {json.dumps(said)}" for name, said in pairs)
    prompt = (
        f"Here is a JSON object:\n\n{{{lines}}}\n\nWhich value does it give for this key? Answer with the value "
        f"alone.\n\nKey: {json.dumps(key)}"
    )
    messages = ({"role": "user", "content": prompt},)
    return [SuiteExample(f"kv_retrieval/{subset}", messages, (value,), MAX_NEW_TOKENS, contains_any)]


KV_RETRIEVAL = Suite("kv_retrieval", None, ("75_keys", "140_keys", "300_keys"), "test", read, home=HOME)
