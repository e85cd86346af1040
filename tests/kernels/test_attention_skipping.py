"""Blocks that cannot weigh anything are skipped, and only those."""

import os

import pytest
import torch

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.retention_attention import fused, retention_attention
from retention_gates.kernels.retention_attention.skipping import NEGLIGIBLE, Bounds

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
TOKENS, DIM, SCALE = 300, 16, 0.25


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fused")


def make_inputs(batch=1, heads=1, group=2):
    """Gates that forget within some tokens, but for the first three tokens and number 130."""
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = {
        "query": random(batch, heads * group, TOKENS, DIM).half(),
        "key": random(batch, heads, TOKENS, DIM).half(),
        "value": random(batch, heads, TOKENS, DIM).half(),
        "log_beta": -torch.exp(0.5 * random(batch, heads, TOKENS) + 0.2),
    }
    inputs["log_beta"][..., :3] = 0
    inputs["log_beta"][..., 130] = -1e-3
    return inputs


def documents():
    ids = torch.arange(TOKENS)[None].repeat(2, 1) // 140
    ids[0, :7], ids[1, 250:], ids[1, 40:44] = -1, -1, -1
    return ids


@pytest.fixture
def visited(monkeypatch):
    """Blocks that were visited and that there are, one pair for each list that the kernels were given."""
    pairs = []
    original = Bounds._list

    def spy(self, *arguments, **options):
        lists, counts = original(self, *arguments, **options)
        pairs.append((int(counts.sum()), counts.numel()))
        return lists, counts

    monkeypatch.setattr(Bounds, "_list", spy)
    return pairs


def output_and_gradients(inputs, **options):
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output = retention_attention(**inputs, scale=SCALE, **options)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    return [output, *torch.autograd.grad(output, list(inputs.values()), gradient)]


@pytest.mark.parametrize(
    "options", [{}, {"document_ids": documents()}, {"sliding_window": 200, "softcap": 3.0}, {"gaussian": True}]
)
def test_what_is_skipped_changes_nothing(options, visited, monkeypatch):
    inputs = make_inputs(batch=2 if "document_ids" in options else 1)
    whole = output_and_gradients(inputs, **options)
    assert not visited
    monkeypatch.setattr(fused, "LEAST_TOKENS", 0)
    skipping = output_and_gradients(inputs, **options)
    assert len(visited) == 3  # forward, and both backward passes
    for expected, actual in zip(whole, skipping, strict=True):
        # a key that nobody sees any more has a gradient below what fp16 holds, or none
        torch.testing.assert_close(actual, expected, rtol=0, atol=2.0**-24)


@pytest.mark.parametrize("gaussian", [False, True])
def test_blocks_not_listed_are_negligible(gaussian):
    inputs = make_inputs()
    query, key, log_beta = (inputs[name] for name in ("query", "key", "log_beta"))
    rates = fused._rates(log_beta, SCALE, None, gaussian)
    bounds = fused._bounds(query, key, rates, None, None, None, SCALE, None, gaussian, DIM)
    assert bounds is None  # the rows are short
    rows = (fused._descriptor(query, 16, DIM), fused._descriptor(key, 16, DIM))
    bounds = Bounds(*rows, fused._vector_descriptor(rates, TOKENS, 16), None, None, SCALE, None, gaussian)

    index = torch.arange(TOKENS)
    age = index[:, None] - index
    fade = age * log_beta.double()[:, :, None]
    logits = query.double() @ key.double().mT * SCALE + (-fade.square() if gaussian else fade)
    weights = logits.masked_fill(age < 0, -torch.inf).softmax(-1)[0]  # [HQ, T, T]
    relative = weights / weights.amax(-1, keepdim=True)
    left_out = 0
    for lists, counts, for_keys in ((*bounds.key_blocks(32, 16), False), (*bounds.query_blocks(16, 32), True)):
        for block in range(counts.shape[1]):
            listed = lists[0, block, : counts[0, block]].tolist()
            assert listed == sorted(set(listed))
            size, other_size = (32, 16)
            own = slice(block * size, (block + 1) * size)
            for other in range(-(-TOKENS // other_size)):
                others = slice(other * other_size, (other + 1) * other_size)
                t, i = (others, own) if for_keys else (own, others)
                if i.stop <= t.start and other not in listed:
                    left_out += 1
                    assert relative[:, t, i].amax() < NEGLIGIBLE / TOKENS
                assert other not in listed or i.stop <= t.start  # the diagonal is not the lists' business
    assert left_out > 50
