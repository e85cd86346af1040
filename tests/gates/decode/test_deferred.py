"""What a model does with its layers' results is computed in their launches, and what else reads them is right."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from gated_models import gated_model, token_ids
from tape import Tape, TapeRecorder
from torch import nn

from retention_gates import BoundedCache
from retention_gates.gates.decode import step as decode_step
from retention_gates.gates.decode.deferred import Deferred
from retention_gates.gates.decode.watch import Watch


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("RETENTION_GATES_KERNELS", "fused")  # on a CPU in Triton's interpreter


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(24, eps=1e-6, dtype=torch.float16)
        self.first, self.second = (nn.Linear(24, 40, bias=bias, dtype=torch.float16) for bias in (False, True))
        self.down = nn.Linear(40, 24, dtype=torch.float16)


def swiglu(block, x):
    y = block.norm(x)
    return x + block.down(F.silu(block.first(y)) * block.second(y))


def the_other_way_round(block, x):
    y = block.norm(x)
    return block.down(block.first(y) * F.silu(block.second(y))) + x


def product_without_silu(block, x):
    return block.down(block.first(x) * block.second(x)) * 2.0


def silu_of_both(block, x):
    return F.silu(block.first(x)) * F.silu(block.second(x))


def with_and_without_silu(block, x):
    y = block.first(x)
    active = F.silu(y)
    return active + y + F.silu(block.second(x)) * 2.0


def a_number_and_a_row_added(block, x):
    return block.first(x) + 1.0, block.down(x @ block.first.weight.T) + x[:1]


def two_sums(block, x):
    return block.first(x) + block.second(x)


def changed_before_it_is_read(block, x):
    x = x.clone()
    y = block.first(x)
    x.zero_()
    return F.silu(y) * 2.0


def changed_in_place(block, x):
    y = block.first(x)
    active = F.silu(y)
    y = y + torch.ones_like(x[:, :1])
    y.mul_(2.0)
    return active + y


def halves_of_one_layer(block, x):
    up, gate = block.second(x).chunk(2, dim=-1)
    return block.down(torch.cat([up * F.silu(gate), gate], dim=-1)) + x


def thirds_of_one_layer(block, x):
    one, two, three = block.second(x).split(16, dim=-1)
    return F.silu(one) * two, three * 2.0


def rows_of_one_layer(block, x):
    return [each * 2.0 for each in block.second(x).split(3)][1]


def half_changed_in_place(block, x):
    up, gate = block.second(x).chunk(2, dim=-1)
    up.mul_(F.silu(gate))
    return up


def heads_of_a_norm(block, x):
    return block.norm(x.unflatten(0, (1, -1))).transpose(0, 1)


FUNCTIONS = [
    swiglu, the_other_way_round, product_without_silu, silu_of_both, with_and_without_silu, a_number_and_a_row_added,
    two_sums, halves_of_one_layer, thirds_of_one_layer, rows_of_one_layer, changed_before_it_is_read, changed_in_place,
    half_changed_in_place, heads_of_a_norm,
]  # fmt: skip


def watched(function):
    """A block, what it reads, what the function gives, and the layers that were seen."""
    block, x, watch = Block(), torch.randn(5, 24).half(), Watch()
    with watch.watching(block):
        plain = function(block, x)
    return block, x, plain, watch.found(block)


def replaced(function, inference=False):
    """What the function gives, and gives with its layers replaced, and the operators that ran then."""
    with torch.inference_mode(inference), torch.no_grad():
        block, x, plain, found = watched(function)
        with Tape() as tape, found.replaced():
            result = function(block, x)
            result = [each * 1 if isinstance(each, Deferred) else each for each in _tuple(result)]
    names = Counter(call[0].name().split("::")[1].split(".")[0] for call in tape.calls)
    return _tuple(plain), result, names, found


def only_silu(block, x):
    return F.silu(block.first(x))


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gives_the_same(function, inference):
    plain, result, _, found = replaced(function, inference)
    assert found.deferred
    for one, other in zip(result, plain, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("function", [swiglu, the_other_way_round])
def test_a_feed_forward_layer_is_two_launches_and_a_norm(function):
    names = replaced(function)[2]
    assert names["small_batch_linear"] == 2 and names["rms_norm"] == 1
    assert not names["silu"] + names["mul"] + names["add"]


@torch.no_grad()
def test_a_result_read_after_the_step_is_an_error():
    block, x, _, found = watched(only_silu)
    with found.replaced():
        late = block.first(x)
        assert isinstance(late, Deferred) and late.shape == (5, 40)
        now = block.second(x)
        assert not isinstance(now, Deferred)  # nobody was seen to read it
    with pytest.raises(RuntimeError, match="pass graph=False"):
        late + 1


def changed_by_a_view(y, half):
    half.add_(1.0)
    return y * 2.0


def changed_by_a_view_of_a_view(y, half):
    half[:2].zero_()
    return y + y


def changed_before_its_view(y, half):
    y.add_(1.0)
    return F.silu(half)


@torch.no_grad()
@pytest.mark.parametrize("change", [changed_by_a_view, changed_by_a_view_of_a_view, changed_before_its_view])
def test_a_result_and_its_view_of_which_one_has_changed(change):
    """They share memory for the model and not here, so that reading the other is an error."""

    def step(block, x):
        y = block.first(x)
        return change(y, y.chunk(2, dim=-1)[0])

    block, x, _, found = watched(step)
    found.deferred.add(block.first)  # whatever was seen to read it
    with found.replaced(), pytest.raises(RuntimeError, match="pass graph=False"):
        step(block, x) * 1.0


@torch.no_grad()
def test_a_kernel_launched_past_the_dispatcher_finds_the_numbers():
    block, x, _, found = watched(only_silu)
    with found.replaced():
        deferred = block.first(x)
        place = deferred.data_ptr()
        read = deferred * 1.0
        assert place == deferred.work.compute().data_ptr()
        torch.testing.assert_close(read, F.linear(x, block.first.weight), rtol=4e-3, atol=4e-3)


@torch.no_grad()
def test_a_compiled_step_computes_layers_together():
    block, x, plain, found = watched(swiglu)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    with found.replaced(is_compiled=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(block, x), plain, rtol=4e-3, atol=4e-3)


@torch.no_grad()
def test_what_a_compiler_leaves_to_python_defers_nothing():
    block, x, plain, found = watched(swiglu)
    with found.replaced(is_compiled=True):
        torch.testing.assert_close(swiglu(block, x), plain, rtol=4e-3, atol=4e-3)
        assert not isinstance(block.first(x), Deferred)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_launches_of_a_captured_step(monkeypatch, family, device):
    """Of a layer: two norms, four of linear layers, one that rotates, one that evicts and attention's."""

    class Counting(TapeRecorder):
        def capture(self, step):
            with Tape() as tape:
                output = step()
            names.update(call[0].name().split("::")[1].split(".")[0] for call in tape.calls)
            return output, tape.replay

    names = Counter()
    monkeypatch.setitem(decode_step.RECORDERS, device, Counting)
    layers = 3
    model = gated_model(family, num_hidden_layers=layers).half().to(device)
    ids = token_ids(2, 9).to(device)
    cache = BoundedCache(model, 6)
    model.generate(input_ids=ids, past_key_values=cache, do_sample=False, max_new_tokens=4)
    assert names["small_batch_linear"] == 4 * layers + 1 and names["rms_norm"] == 2 * layers + 1
    assert names["rotary"] == names["gate_evict"] == names["ragged_decode_attention"] == layers
    assert not names["silu"] and names["add"] + names["mul"] < layers + 3  # angles and positions, once in a step
