"""Rows of one cache go on in another, as texts of different lengths that join a batch when they come."""

import pytest
import torch
from gated_models import gated_model, token_ids

from retention_gates import BoundedCache

LENGTHS = (5, 40, 1, 17)
MEMORY = 8


def alone(model, ids, steps, buffer_size=1):
    """Logits [steps, V] after the prompt and each of the tokens that follow it, and what is held at the end."""
    cache = BoundedCache(model, MEMORY, buffer_size=buffer_size)
    logits = [model(input_ids=ids[None, :-steps], past_key_values=cache).logits[:, -1]]
    for token in ids[-steps:-1]:
        logits += [model(input_ids=token[None, None], past_key_values=cache).logits[:, -1]]
    held = [layer.positions(head) - layer.start[:, None] for layer in cache.layers for head in range(2)]
    return torch.cat(logits), held


@pytest.mark.parametrize("buffer_size", [1, 3])
@torch.no_grad()
def test_rows_that_join_a_running_batch_go_on_as_if_alone(buffer_size):
    model, steps = gated_model(), 14
    texts = [token_ids(1, length + steps, seed)[0] for seed, length in enumerate(LENGTHS)]
    expected = [alone(model, text, steps, buffer_size) for text in texts]
    pool = BoundedCache(model, MEMORY, buffer_size=buffer_size)
    prompt = BoundedCache(model, MEMORY, buffer_size=buffer_size)
    model(input_ids=torch.zeros(4, 1, dtype=torch.int64), past_key_values=pool)
    size = pool.memory_bytes()
    logits: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in range(steps + 2 * len(texts)):
        row, odd = divmod(step, 2)
        if row < len(texts) and not odd:  # one more text every second step, one of them longer than the batch is
            prompt.reset()
            start = texts[row][None, : LENGTHS[row]]
            logits[row].append(model(input_ids=start, past_key_values=prompt).logits[:, -1])
            pool.copy_row(row, prompt)
        going = [row for row in range(len(texts)) if 0 < len(logits[row]) < steps]
        tokens, positions = torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)
        for row in going:
            positions[row] = LENGTHS[row] + len(logits[row]) - 1
            tokens[row] = texts[row][positions[row]]
        output = model(input_ids=tokens, position_ids=positions, past_key_values=pool).logits
        for row in going:
            logits[row].append(output[row])
            if len(logits[row]) == steps:
                held = [layer.positions(head) - layer.start[:, None] for layer in pool.layers for head in range(2)]
                for mine, wanted in zip(held, expected[row][1], strict=True):
                    # empty places differ, since the row's start is another
                    assert set(mine[row][mine[row] >= 0].tolist()) == set(wanted[wanted >= 0].tolist())
    for row, (wanted, _) in enumerate(expected):
        torch.testing.assert_close(torch.cat(logits[row]), wanted, rtol=1e-4, atol=1e-4)
    assert pool.memory_bytes() == size


@torch.no_grad()
def test_refusals():
    model, ids = gated_model(), token_ids(2, 20)

    def filled(pin=None, **options):
        cache = BoundedCache(model, MEMORY, **options)
        if pin is not None:
            cache.pin(*pin)
        model(input_ids=ids, past_key_values=cache)
        return cache

    one = filled()
    before = [layer.keys.clone() for layer in one.layers]
    for other, row, message in (
        (filled(), 2, "row=2 must be one of the cache's 2 rows"),
        (filled(), -1, "row=-1 must be"),
        (BoundedCache(model, MEMORY), 0, "other_row=0 must be one of the cache's 0 rows"),
        (filled(buffer_size=2), 0, "made and pinned in the same way"),
        (filled(pin=(0, 4)), 0, "made and pinned in the same way"),
        (filled(policy="h2o"), 0, "made and pinned in the same way"),
    ):
        with pytest.raises(ValueError, match=message):
            one.copy_row(row, other)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(one.layers, before, strict=True))


@torch.no_grad()
def test_rows_of_caches_that_begin_late_join_at_equal_columns():
    model, ids = gated_model(), token_ids(3, 30)

    def begun(column, rows, policy="h2o", **options):
        cache = BoundedCache(model, MEMORY, policy=policy, **options)
        cache.begin_at(column)
        model(input_ids=rows, past_key_values=cache)
        return cache

    one = begun(10, ids[:, :20])
    before = [layer.keys.clone() for layer in one.layers]
    for other, message in (
        (begun(0, ids[:1, :20]), "have read 30 and 20 columns, and policy='h2o' keeps numbers"),
        (begun(11, ids[:1, :20]), "have read 30 and 31 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            one.copy_row(1, other)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(one.layers, before, strict=True))
    with pytest.raises(ValueError, match=r"rows=\[1, 1\] must be different ones"):
        one.copy_rows([1, 1], begun(10, ids[:, :20]), [0, 1])
    one.copy_rows([2, 0], begun(21, ids[:2, :9]), [1, 0])
    alone = BoundedCache(model, MEMORY, policy="h2o")
    model(input_ids=ids[1:2, :9], past_key_values=alone)
    for joined, wanted in zip(one.gated_layers, alone.gated_layers, strict=True):
        assert torch.equal((joined.slot_positions - 21)[2].clamp(min=-1), wanted.slot_positions[0])
        torch.testing.assert_close(joined.state[2], wanted.state[0])
        assert joined.start.tolist() == [21, 10, 21]

    with pytest.raises(ValueError, match=r"begin_at\(3\): the cache has read 30 tokens"):
        one.begin_at(3)
    one.reset()
    one.begin_at(4)
    assert one.get_seq_length() == 4
    with pytest.raises(ValueError, match=r"begin_at\(5\) is for caches whose rows can be copied: budgets=\"global\""):
        begun(5, ids, policy="retention", budgets="global")
    with pytest.raises(ValueError, match="column=-1 must be an integer of at least 0"):
        begun(-1, ids)
