"""A run goes on from a checkpoint only with the rows and the base model that it was written with."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_run import make_run
from tiny_training import Rows, gated, trainer_of

from retention_gates import cli
from retention_gates.data.document_facts import MOST_WORKS, document_facts
from retention_gates.data.tokens import TokenDocument
from retention_gates.trainers import checkpoint
from retention_gates.trainers.run_folder.inputs import SAMPLED, check_same_inputs, row_facts

# ---- what is noted ----

ids = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(lambda values: np.array(values, dtype=np.int32))
documents = st.lists(
    st.builds(
        lambda work, ids, marked: TokenDocument(work, ids, None if marked is None else ids > marked),
        st.sampled_from("ab"), ids, st.none() | st.integers(0, 2),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


def plainly(docs: list[TokenDocument]) -> list[tuple]:
    return [(doc.ids.tolist(), None if doc.targets is None else doc.targets.tolist()) for doc in docs]


@given(documents, documents)
def test_documents_have_the_same_digest_if_their_tokens_and_targets_are_the_same(one, other):
    facts = [document_facts(docs) for docs in (one, other)]
    assert (facts[0]["digest"] == facts[1]["digest"]) == (plainly(one) == plainly(other))
    assert facts[0]["tokens"] == sum(len(doc.ids) for doc in one)
    for work in {"a", "b"} & facts[0]["works"].keys() & facts[1]["works"].keys():
        parts = [plainly([doc for doc in docs if doc.work == work]) for docs in (one, other)]
        assert (facts[0]["works"][work] == facts[1]["works"][work]) == (parts[0] == parts[1])


def test_of_many_works_only_the_whole_is_noted():
    docs = [TokenDocument(f"work{i}", np.array([i])) for i in range(MOST_WORKS + 1)]
    assert len(document_facts(docs[:-1])["works"]) == MOST_WORKS
    assert document_facts(docs)["works"] == {} and document_facts(docs)["documents"] == MOST_WORKS + 1


@given(st.integers(1, 3 * SAMPLED), st.randoms())
def test_a_change_of_a_small_data_set_is_seen(count: int, rng: random.Random):
    rows = [{"input_ids": [i], "position_ids": [0], "labels": [i]} for i in range(count)]
    before = row_facts(rows)
    assert before is not None and before["rows"] == count
    ends = [rng.choice([0, count - 1]), rng.randrange(count)][: 1 + (count <= SAMPLED)]
    for index in ends:
        changed = [dict(row) for row in rows]
        changed[index]["labels"] = [-100]
        assert row_facts(changed)["digest"] != before["digest"]
    assert row_facts([*rows, rows[-1]]) != before


def test_rows_that_are_others_at_every_look_have_no_digest(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Fresh(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            drawn = torch.randint(3, 97, (48,))
            return super().__getitem__(index) | {"input_ids": drawn, "labels": drawn}

    trainer_of(tmp_path, rows=Fresh()).train()
    trainer_of(tmp_path, rows=Fresh()).train(resume_from_checkpoint=True)
    assert "whether the training rows are those of the run that wrote it" in caplog.text


# ---- in Python ----


def test_a_trainer_is_told_what_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    eval_rows = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(5))
    trainer_of(tmp_path, max_steps=3, eval_rows=eval_rows).train()

    def resume(**changes) -> None:
        trainer_of(tmp_path, max_steps=3, **{"eval_rows": eval_rows} | changes).train(resume_from_checkpoint=True)

    other = gated()
    other.get_base_model().model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"the base model \(digest .* then, .* now\) changed.*start anew in another"):
        resume(model=other)
    with pytest.raises(ValueError, match=r"the training rows \(64 rows, .* then, 63 rows, .* now\) changed"):
        resume(rows=Rows(63))
    with pytest.raises(ValueError, match=r"training rows .* and the evaluation rows \(digest .* changed"):
        resume(rows=Rows(labels=torch.full((48,), 5)), eval_rows=eval_rows + 1)
    resume()
    assert not caplog.messages


def test_an_older_checkpoint_goes_on_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer_of(tmp_path).train()
    out = tmp_path / "out"
    shutil.rmtree(out / "checkpoint-6")
    path = out / "checkpoint-3" / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["inputs"]
    manifest["digest"] = checkpoint._digest_of(manifest)
    path.write_text(json.dumps(manifest))
    trainer_of(tmp_path).train(resume_from_checkpoint=True)
    said = "does not say, or it cannot be told, whether the training rows and the evaluation rows and the base model"
    assert said in caplog.text
    assert "inputs" in checkpoint.read_manifest(out / "checkpoint-6")


def test_of_changes_the_works_are_named():
    before = {"documents": 2, "tokens": 900, "digest": "a", "works": {"w1": "1", "w2": "2"}}
    now = {"documents": 9, "tokens": 1200, "digest": "b", "works": {f"w{i}": str(max(i, 2)) for i in range(1, 10)}}
    said = (
        r"the training rows \(2 documents of 900 tokens then, 9 documents of 1,200 tokens now; new: 'w3', 'w4', 'w5', "
        r"'w6', 'w7' and 2 more; with other content: 'w1'\) changed"
    )
    with pytest.raises(ValueError, match=said):
        check_same_inputs(Path("x"), {"inputs": {"training rows": before}}, {"training rows": now})


# ---- on the command line ----


def edit(folder: Path) -> None:
    path = folder / "texts" / "work1.txt"
    path.write_text(path.read_text().replace("sea", "road", 1))


def add(folder: Path) -> None:
    (folder / "texts" / "work9.txt").write_text("the old sea " * 40)


def remove(folder: Path) -> None:
    (folder / "texts" / "work0.txt").unlink()


def edit_test_work(folder: Path) -> None:
    path = folder / "texts" / "work3.txt"
    path.write_text(path.read_text().replace("sea", "road"))


def replace_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, path, metadata={"format": "pt"})


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (
        edit,
        "the training rows (3 documents of 1,803 tokens then, 3 documents of 1,803 tokens now; with other content: ",
    ),
    (add, "4 documents of 1,924 tokens now; new: 'work9'"),
    (remove, "2 documents of 1,202 tokens now; gone: 'work0'"),
    (edit_test_work, "the evaluation rows (digest "),
    (replace_weights, "the base model (digest "),
]


def test_data_or_a_base_that_changed_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = make_run(tmp_path, layers=2, max_steps=2, save_steps=1, eval_steps=2)
    assert cli.main(["train", str(config)]) == 0
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change, said in CHANGES:
        for kept in ("texts", "model"):
            shutil.copytree(tmp_path / kept, tmp_path / f"{kept}-kept")
        change(tmp_path)
        assert cli.main(["train", str(config), "resume=true"]) == 2, change
        assert said in capsys.readouterr().err, change
        for kept in ("texts", "model"):
            shutil.rmtree(tmp_path / kept)
            (tmp_path / f"{kept}-kept").rename(tmp_path / kept)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert cli.main(["train", str(config), "resume=true"]) == 0
