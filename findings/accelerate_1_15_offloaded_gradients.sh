#!/usr/bin/env bash
# accelerate 1.15.0, a module under `cpu_offload`: its parameters ask for gradients (`requires_grad` stays true) and a
# backward pass through it runs, but the gradients are gone when it ends, without an error or a warning. The parameters
# that an optimizer holds are those on the meta device; backward filled those that a hook had put in their places for
# the forward pass. Modules beside it get theirs, so the loss may fall while the offloaded part is never trained.
#
# Seen, torch 2.13.0, two linear layers of which the first is offloaded:
# "requires_grad [True, True, True, True] has grad [False, False, True, True]".
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet accelerate==1.15.0
cat >"$work/see.py" <<'PY'
import torch
from accelerate import cpu_offload

model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
cpu_offload(model[0], execution_device=torch.device("cpu"))
model(torch.ones(1, 2)).sum().backward()
asked = [parameter.requires_grad for parameter in model.parameters()]
print("requires_grad", asked, "has grad", [parameter.grad is not None for parameter in model.parameters()])
PY
found=$("$work/venv/bin/python" -W ignore "$work/see.py")
echo "$found"
expected="requires_grad [True, True, True, True] has grad [False, False, True, True]"
[ "$found" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
