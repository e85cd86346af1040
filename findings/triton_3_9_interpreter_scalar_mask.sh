#!/usr/bin/env bash
# Triton's interpreter: a mask that joins a comparison of a scalar with one of a block. A scalar comparison keeps the
# scalar's integer type inside the interpreter, so that the joined mask is made of integers. Triton 3.8.0 takes it as
# a mask; 3.9.0 raises "mask has unsupported dtype" at the store. Compiled for a GPU the same kernel has an ordinary
# mask in both.
#
# Seen, torch 2.13.0: "3.8.0 [1.0, 1.0, 0.0, 0.0]" and "3.9.0 mask has unsupported dtype".
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$work/see.py" <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch, triton
import triton.language as tl


@triton.jit
def write(flag, out):
    column = tl.arange(0, 4)
    tl.store(out + column, 1.0, mask=(tl.load(flag) != 0) & (column < 2))


out = torch.zeros(4)
try:
    write[(1,)](torch.ones(1, dtype=torch.bool), out)
    print(triton.__version__, out.tolist())
except Exception as error:
    print(triton.__version__, "mask has unsupported dtype" if "mask has unsupported dtype" in str(error) else error)
PY
for expected in "3.8.0 [1.0, 1.0, 0.0, 0.0]" "3.9.0 mask has unsupported dtype"; do
    "$work/venv/bin/pip" install --quiet "triton==${expected%% *}"
    found=$("$work/venv/bin/python" "$work/see.py" 2>/dev/null | tail -n 1)
    echo "$found"
    [ "$found" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
done
