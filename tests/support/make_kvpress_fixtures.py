"""Writes tests/fixtures/kvpress.safetensors: what the presses of kvpress 0.5.5 make of one small attention layer.

Run it in an environment of its own, because kvpress pins an older transformers than this project's:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5
    kvpress/bin/python tests/support/make_kvpress_fixtures.py

Stored are the layer's queries, keys and values after RoPE, the model's rotary frequencies, and of each press its
scores [H, T], or what it prunes.
"""

from pathlib import Path

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    TOVAPress,
)
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

FILE = Path(__file__).parents[1] / "fixtures" / "kvpress.safetensors"
TOKENS, HEADS, GROUP, HEAD_DIM = 48, 2, 2, 8


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=6,
        attn_implementation="sdpa",
    )
    module = LlamaAttention(config, layer_idx=0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.rotary_emb = LlamaRotaryEmbedding(config)  # as kvpress sets it
    hidden = torch.randn(1, TOKENS, 32)
    cos, sin = module.rotary_emb(hidden, torch.arange(TOKENS)[None])
    with torch.no_grad():
        query, key, value = (
            proj(hidden).view(1, TOKENS, -1, HEAD_DIM).transpose(1, 2)
            for proj in (module.q_proj, module.k_proj, module.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        logits = query @ key.repeat_interleave(GROUP, dim=1).transpose(2, 3) * HEAD_DIM**-0.5
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        attentions = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        stored = {"query": query[0], "key": key[0], "value": value[0], "frequencies": module.rotary_emb.inv_freq}
        presses = {
            "h2o": ObservedAttentionPress(),
            "tova": TOVAPress(),
            "snapkv": SnapKVPress(window_size=32, kernel_size=7),
            "keydiff": KeyDiffPress(),
            "key_norm": KnormPress(),
            "lagkv": LagKVPress(n_sink=4, lag_size=8),
            "expected_attention": ExpectedAttentionPress(n_future_positions=512, n_sink=4),
        }
        for name, press in presses.items():
            kwargs = {"position_embeddings": (cos, sin)}
            stored[name] = press.score(module, hidden, key, value, attentions, kwargs)[0].contiguous()

        # 20 of 48 entries per head, moved between the heads; a fifth of 20 is each head's own, and with its long keys
        # the second head is left with little more
        adaptive = AdaKVPress(KnormPress(compression_ratio=1 - 20 / TOKENS), alpha_safeguard=0.2)
        longer = key * torch.tensor([1.0, 3.0])[None, :, None, None]
        stored["adaptive"] = KnormPress().score(module, hidden, longer, value, None, {})[0]
        adaptive.compress(module, hidden, longer, value, None, {})
        _, heads, positions = module.masked_key_indices
        pruned = torch.zeros(HEADS, TOKENS, dtype=torch.bool)
        pruned[heads, positions] = True
        stored["adaptive_pruned"] = pruned

        # a mean of 64 entries over 6 layers, beside a window of one
        pyramid = PyramidKVPress(compression_ratio=1 - 64 / 1000, window_size=1, beta=20)
        budgets = []
        for layer in range(6):
            module.layer_idx = layer
            budgets.append(pyramid.get_layer_budget(module, 1000))
        stored["pyramid"] = torch.tensor(budgets)
    FILE.parent.mkdir(exist_ok=True)
    temporary = FILE.with_suffix(".tmp")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in stored.items()}, temporary)
    temporary.replace(FILE)
    print(f"{FILE}: {FILE.stat().st_size} bytes; pyramid {budgets}")


if __name__ == "__main__":
    main()
