"""Random runs of one cache layer, each compared with plain Python: what is held after every chunk, and the output."""

import math
import random
from typing import Any

import torch
from layer_calls import attend
from plain_eviction import PlainHead
from torch import nn

from retention_gates.gates.cache.slot_layer import SlotLayer
from retention_gates.gates.policies import POLICIES, NewTokens, ScoredPolicy
from retention_gates.gates.policies.eviction_rule import EvictionRule

OWNER = nn.Identity()
SCORED = sorted(name for name, policy in POLICIES.items() if isinstance(policy, ScoredPolicy))
CHUNKS = [1, 1, 1, 2, 7, 25]


def random_run(rng: random.Random) -> dict[str, Any]:
    """Draws what `check_run` takes, as the property test in tests/gates/cache draws it."""
    protected = [(0, rng.randint(0, 2))]
    if rng.random() < 0.5:
        start = rng.randint(0, 15)
        protected.append((start, start + rng.randint(1, 3)))
    least = sum(stop - start for start, stop in protected) + 1
    return {
        "budgets": tuple(rng.randint(least, 14) for _ in range(rng.randint(1, 3))),
        "protected": tuple(protected),
        "buffer_size": rng.randint(1, 4),
        "policy": rng.choice(SCORED),
        "chunks": rng.choices(CHUNKS, k=rng.randint(1, 20)),
        "padding": rng.randint(0, 10),
        "group": rng.randint(1, 3),
        "values": rng.randint(1, 8),
        "seed": rng.randrange(2**31),
    }


def check_run(run: dict[str, Any]) -> None:
    """Raises AssertionError where the layer holds or shows anything else than plain Python does."""
    budgets, chunks, buffer_size = run["budgets"], run["chunks"], run["buffer_size"]
    heads, tokens, group, policy = len(budgets), sum(chunks), run["group"], POLICIES[run["policy"]]
    generator = torch.Generator().manual_seed(run["seed"])
    # few values, so that products are often equal
    log_beta = -torch.randint(0, run["values"] + 1, (2, heads, tokens), generator=generator) / 7.0
    key, value = torch.randn(2, 2, heads, tokens, 4, generator=generator)
    query = torch.randn(2, heads * group, tokens, 4, generator=generator)
    padding = torch.tensor([0, min(run["padding"], tokens)])
    valid = torch.arange(tokens) >= padding[:, None]
    rule = EvictionRule(policy, budgets, buffer_size, run["protected"], run["seed"], layer=5)
    layer = SlotLayer(rule, OWNER)

    offset = torch.arange(tokens) - padding[:, None]
    score = policy.score(NewTokens(log_beta, key, value, offset, run["seed"], 5))
    recent = rule.recent(torch.device("cpu"))
    plain = [[PlainHead(budget, policy.linear_in_age, buffer_size) for budget in budgets] for _ in range(2)]
    visible = torch.zeros(2, heads, tokens, tokens, dtype=torch.bool)
    outputs, first = [], 0
    for length in chunks:
        now = slice(first, first + length)
        is_padded = bool(padding.any()) or run["seed"] % 2
        chunk = (log_beta[:, :, now], query[:, :, now], key[:, :, now], value[:, :, now])
        outputs.append(attend(layer, OWNER, *chunk, valid[:, now] if is_padded else None))
        for row in range(2):
            for head in range(heads):
                one = plain[row][head]
                one.recent = 0 if recent is None else int(recent[head])
                one.protected = {int(padding[row]) + i for start, stop in run["protected"] for i in range(start, stop)}
                seen = one.read(
                    score[row, head, now].tolist(), list(range(*now.indices(tokens))), valid[row, now].tolist()
                )
                for step, positions in zip(range(first, first + length), seen, strict=True):
                    visible[row, head, step, list(positions)] = True
                held = layer.positions(head)[row]
                assert held.shape == (budgets[head] + buffer_size - 1,)
                assert held.tolist() == sorted(one.held) + [-1] * (len(held) - len(one.held))
        first += length
        assert layer.get_seq_length() == first

    logits = query.unflatten(1, (heads, group)) @ key[:, :, None].transpose(-1, -2) * 0.5
    logits = logits.masked_fill(~visible[:, :, None], -math.inf)
    expected = (logits.softmax(-1).nan_to_num() @ value[:, :, None]).flatten(1, 2)
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, rtol=1e-4, atol=1e-5)
