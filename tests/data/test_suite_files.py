"""Local files of suites: the repository's form of LongProc, and files that are compressed."""

import gzip
import json
from pathlib import Path

import pytest

from retention_gates.data.suites import load_suite

FIXTURES = Path(__file__).parent.parent / "fixtures" / "suites"
TEMPLATES = {
    "path_traversal": "Cities: {city_context}\nFrom {src_city} to {dst_city}, in {{braces}}.",
    "tom_tracking": "Story: {story}\nQuestion: {question}",
    "countdown": "Examples: {demonstration}\nNumbers: {nums}\nTarget: {target}",
}
RECORDS = {
    "path_traversal": [
        {
            "context_nl": "From Dale one can go to Elm by road.",
            "question_repr": ["Dale", "Elm"],
            "answer_nl": "From Dale, take a road to Elm.",
        }
    ],
    "tom_tracking": [
        {
            "story": "Step 0: Ida is in the hall.",
            "question": "Where is Ida?",
            "solution": "Ida:\n- Step 0: Ida is in the hall\nFinal Answer: hall",
        }
    ],
    "countdown": [
        {
            "nums": [n, 2, 3, 4],
            "target": n + 9,
            "solution_text": f"{n}+2={n + 2}\n{n + 2}+3={n + 5}\n{n + 5}+4={n + 9}",
            "demonstration": f"search of {n}",
        }
        for n in (1, 5, 6, 7)
    ],
}
RIGHT = {
    "path_traversal": "<Route>From Dale, take a road to Elm.</Route>",
    "tom_tracking": "- Step 0: Ida in hall",
    "countdown": "<Solution>1+2=3\n3+3=6\n6+4=10</Solution>",
}


def write(folder, kind, records=None, template=None, name="{}.prompts.yaml"):
    file = folder / f"{kind}_0.5k.json"
    file.write_text(json.dumps(RECORDS[kind] if records is None else records))
    said = json.dumps({"USER_PROMPT": TEMPLATES[kind]} if template is None else template)
    (folder / name.format(kind)).write_text(said)
    return str(file)


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("name", ["{}.prompts.yaml", "prompts.yaml"])
def test_longproc_in_the_form_of_its_repository(tmp_path, kind, name):
    first, *others = load_suite(f"longproc/{kind}_0.5k", source=write(tmp_path, kind, name=name))
    (message,) = first.messages
    expected = {
        "path_traversal": "Cities: From Dale one can go to Elm by road.\nFrom Dale to Elm, in {braces}.",
        "tom_tracking": "Story: Step 0: Ida is in the hall.\nQuestion: Where is Ida?",
        "countdown": "Examples: # Example\nNumbers: [6, 2, 3, 4]\nTarget: 15\n\nsearch of 6\n\n"
        "# Example\nNumbers: [7, 2, 3, 4]\nTarget: 16\n\nsearch of 7\nNumbers: [1, 2, 3, 4]\nTarget: 10",
    }
    assert message["content"] == expected[kind] and first.task == f"longproc/{kind}_0.5k"
    assert first.score(RIGHT[kind]) == 1.0 and first.score(RIGHT[kind][:-20]) == 0.0
    assert len(others) == (1 if kind == "countdown" else 0), "worked examples are not asked"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "countdown",
            {"records": RECORDS["countdown"][:2]},
            "2 of a file's records are worked examples, and there are 2",
        ),
        ("countdown", {"records": [{"nums": "x"}] * 3}, "has no field 'demonstration'|should be list"),
        ("tom_tracking", {"records": [{"story": "x"}]}, "has no field 'question'"),
        ("path_traversal", {"records": [{"context_nl": "x", "question_repr": ["a"]}]}, "must be two cities"),
        (
            "tom_tracking",
            {"template": {"USER_PROMPT": "{city}"}},
            "asks for 'city'; known are demonstration, question",
        ),
        ("tom_tracking", {"template": ["x"]}, "must have a text USER_PROMPT"),
        ("tom_tracking", {"name": "other.yaml"}, "need the wording of their prompts, tom_tracking.prompts.yaml or"),
    ],
)
def test_longproc_files_that_do_not_fit_are_refused(tmp_path, kind, changes, message):
    source = write(tmp_path, kind, **changes)
    with pytest.raises(ValueError, match=message):
        load_suite(f"longproc/{kind}_0.5k", source=source)


def test_kinds_that_need_more_files_are_refused(tmp_path):
    source = write(tmp_path, "tom_tracking")
    with pytest.raises(ValueError, match="is read of path_traversal, tom_tracking, countdown only"):
        load_suite("longproc/html_to_tsv_0.5k", source=source)


def test_compressed_files(tmp_path):
    plain = FIXTURES / "kv_retrieval__75_keys.jsonl"
    file = tmp_path / "kv-retrieval-75_keys.jsonl.gz"
    file.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_suite("kv_retrieval", source=str(file)) == load_suite("kv_retrieval", source=str(plain))
    listed = tmp_path / "list.json.gz"
    listed.write_bytes(gzip.compress(json.dumps([json.loads(line) for line in plain.open()]).encode()))
    assert load_suite("kv_retrieval", source=str(listed)) == load_suite("kv_retrieval", source=str(plain))
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], plain.read_bytes(), whole[:40] + b"\0" * 40 + whole[80:]):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match="kv-retrieval-75_keys.jsonl.gz' is damaged behind line|is not valid JSON"
        ):
            load_suite("kv_retrieval", source=str(file))
