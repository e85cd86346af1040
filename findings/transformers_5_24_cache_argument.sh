#!/usr/bin/env bash
# transformers 5.24.0 calls attention modules with `cache=`, 5.23.0 with `past_key_values=`. The old name still works for
# callers, because the modules' forward translates it; a wrapper around a module (a hook with kwargs, a PEFT layer) sees
# the new name only, and one that asks for `past_key_values` finds nothing, without an error or a warning.
#
# Seen, torch 2.13.0: "5.23.0 ['past_key_values']" and "5.24.0 ['cache']".
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
cat >"$work/see.py" <<'PY'
import torch, transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()
seen = []
model.model.layers[0].self_attn.register_forward_pre_hook(
    lambda module, args, kwargs: seen.extend(name for name, value in kwargs.items() if isinstance(value, DynamicCache)),
    with_kwargs=True,
)
model(torch.tensor([[1, 2]]), past_key_values=DynamicCache(config=model.config))
print(transformers.__version__, seen)
PY
for expected in "5.23.0 ['past_key_values']" "5.24.0 ['cache']"; do
    "$work/venv/bin/pip" install --quiet "transformers==${expected%% *}"
    found=$("$work/venv/bin/python" "$work/see.py" 2>/dev/null | tail -n 1)
    echo "$found"
    [ "$found" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
done
