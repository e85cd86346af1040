#!/usr/bin/env bash
# datasets 5.2.0, a shuffled stream that is stopped in epoch 1 and resumed: `state_dict()` holds the epoch, but
# `load_state_dict()` does not set it. A new data set that loads the state is still in epoch 0, finds that the state is
# of another epoch, and plays epoch 0 from its first row, without an error or a warning. After `set_epoch(1)` the same
# state gives the rows that were left.
#
# Seen: the state says 1; "loaded [1, 5, 2, 4, 3, 6, 0, 7]" (all of epoch 0), "epoch set [2, 7, 6, 3, 4]" (the rest of 1).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0
cat >"$work/see.py" <<'PY'
from itertools import islice

from datasets import Dataset


def stream():
    return Dataset.from_dict({"n": list(range(8))}).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4)


def rows(data):
    return [row["n"] for row in data]


whole, stopped = stream(), stream()
whole.set_epoch(1)
stopped.set_epoch(1)
read = rows(islice(iter(stopped), 3))
state = stopped.state_dict()
left = rows(whole)[3:]
assert read + left == rows(whole) and state["epoch"] == 1

loaded = stream()
loaded.load_state_dict(state)
assert rows(loaded) == rows(stream()) != left
print("loaded", rows(loaded))
again = stream()
again.set_epoch(1)
again.load_state_dict(state)
found = rows(again)
assert found == left
print("epoch set", found)
PY
found=$("$work/venv/bin/python" "$work/see.py" 2>/dev/null)
echo "$found"
expected=$'loaded [1, 5, 2, 4, 3, 6, 0, 7]\nepoch set [2, 7, 6, 3, 4]'
[ "$found" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
