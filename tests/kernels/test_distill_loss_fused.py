"""The fused distillation loss: in Triton's interpreter at small sizes, on a GPU at those of real heads."""

import os

import pytest
import torch
from distill_cases import losses_by_position, make_inputs

from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.distill_loss import distill_loss, naive

pytest.importorskip("triton")
from retention_gates.kernels.distill_loss import fused, logits

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
HEADS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "bias": {"logit_scale": 0.3, "bias": True},
    "all": {"logit_scale": 1.7, "softcap": 3.0, "bias": True},
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of words per row, and fused kernels on the CPU."""
    monkeypatch.setenv(VARIABLE, "fused")
    monkeypatch.setattr(logits, "BLOCK", 16)
    new_empty = torch.Tensor.new_empty

    def filled(self, *size, **options):  # what nothing writes shows
        result = new_empty(self, *size, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def head_of(name, weight):
    head = dict(HEADS[name])
    if head.pop("bias", False):
        head["bias"] = torch.linspace(-1, 1, len(weight), device=weight.device).to(weight.dtype)
    return head


@interpreted
@pytest.mark.parametrize(
    ("head", "dtype", "positions", "chunk_size"),
    [
        ("plain", torch.float64, 5, 4),
        ("softcap", torch.float64, 5, None),
        ("bias", torch.float64, 1, 3),
        ("all", torch.float64, 5, 2),
        ("plain", torch.float32, 5, 3),
        ("all", torch.float32, 3, None),
        ("plain", torch.float16, 5, 3),
        ("all", torch.float16, 3, None),
        ("all", torch.bfloat16, 3, None),
    ],
)
def test_error_is_at_most_twice_torchs(small_blocks, head, dtype, positions, chunk_size):
    inputs = make_inputs(positions, 8, 37, dtype=dtype)
    check_against_fp64(*inputs, head_of(head, inputs[2]), chunk_size)


def check_against_fp64(student, teacher, weight, targets, head, chunk_size=None):
    """Losses and gradient against whole logits in fp64, beside whole logits and autograd in the same dtype."""
    weights = dict(kl_weight=0.7, next_token_weight=1.3)
    mask = torch.arange(len(student), device=student.device) % 8 != 2
    has_target = targets != -100

    def reference(hidden, *arguments, **options):
        kl, next_token = losses_by_position(hidden, *arguments, targets, **options)
        kl, next_token = kl[mask], next_token[has_target]
        # times N as a gradient scaler would: torch's own fp16 gradient underflows without
        (gradient,) = torch.autograd.grad(len(hidden) * (0.7 * kl.mean() + 1.3 * next_token.mean()), hidden)
        return kl.detach(), next_token.detach(), gradient

    exact_head = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in head.items()}
    exact_student = student.detach().double().requires_grad_()
    exact = reference(exact_student, teacher.double(), weight.double(), **exact_head)
    plain = reference(student, teacher, weight, **head)
    loss = distill_loss(student, teacher, weight, targets, mask=mask, chunk_size=chunk_size, **weights, **head)
    (gradient,) = torch.autograd.grad(len(student) * loss.total, student)
    assert gradient.dtype == student.dtype
    # rounding of the sums over positions and blocks, in the dtype they are made in
    rounding = 32 * torch.finfo(loss.total.dtype).eps
    # torch's error is taken by position: in its mean, errors cancel by luck
    errors = [(theirs - reference).abs().double() for theirs, reference in zip(plain, exact, strict=True)]
    kl, next_token = exact[0].mean(), exact[1].mean()
    for name, ours, theirs, correct in (
        ("forward_kl", loss.forward_kl, errors[0].mean(), kl),
        ("next_token_loss", loss.next_token_loss, errors[1].mean(), next_token),
        ("total", loss.total, 0.7 * errors[0].mean() + 1.3 * errors[1].mean(), 0.7 * kl + 1.3 * next_token),
        ("gradient", gradient, errors[2].max(), exact[2]),
    ):
        assert (ours - correct).abs().max() <= 2 * theirs + rounding * correct.abs().max(), name


@interpreted
def test_shards_and_repetition(small_blocks):
    """Shards with a remainder each give what the whole head gives; two runs are bit-equal."""
    student, teacher, weight, targets = make_inputs(3, 8, 37)
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64)
    options = dict(softcap=3.0, chunk_size=2)
    whole = distill_loss(student, teacher, weight, targets, bias=bias, **options)
    gradients = [torch.autograd.grad(whole.total, student)[0]]
    for _ in range(2):
        loss = distill_loss(student, teacher, weight.split([17, 20]), targets, bias=bias.split([17, 20]), **options)
        for ours, expected in zip(loss, whole, strict=True):
            torch.testing.assert_close(ours, expected)
        gradients.append(torch.autograd.grad(loss.total, student)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch.equal(gradients[1], gradients[2])


@interpreted
def test_terms_without_weight_or_teacher(small_blocks):
    student, teacher, weight, targets = make_inputs(3, 8, 37)
    expected = naive.distill_loss(student, teacher, weight, targets)
    no_kl = distill_loss(student, teacher, weight, targets, kl_weight=0.0)
    alone = distill_loss(student, None, weight, targets, kl_weight=0.0)
    torch.testing.assert_close(no_kl.forward_kl, expected.forward_kl)  # reported all the same
    assert torch.equal(no_kl.total, no_kl.next_token_loss) and torch.equal(alone.total, no_kl.total)
    assert alone.forward_kl.item() == 0
    gradients = [torch.autograd.grad(loss.total, student)[0] for loss in (no_kl, alone)]
    assert torch.equal(*gradients) and gradients[0].any()
    same = distill_loss(student, student.detach(), weight, targets, next_token_weight=0.0)
    same.total.backward()
    assert same.forward_kl.item() == 0 and same.next_token_loss.item() > 0
    assert not student.grad.any()


@interpreted
def test_without_gradient_no_product_goes_back(small_blocks, monkeypatch):
    student, teacher, weight, targets = make_inputs(3, 8, 37)
    expected = distill_loss(student, teacher, weight, targets)
    assert not expected.forward_kl.requires_grad and not expected.next_token_loss.requires_grad
    monkeypatch.setattr(logits.ShardLogits, "multiply_back", None)
    with torch.no_grad():
        loss = distill_loss(student, teacher, weight.requires_grad_(), targets)
    assert not loss.total.requires_grad
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loss, expected, strict=True))


@interpreted
def test_other_dtypes_and_strides_of_hidden_states(small_blocks):
    """fp32 hidden states through an fp64 head, laid out the other way round."""
    student, teacher, weight, targets = make_inputs(3, 8, 37)
    columns = student.detach().float().t().contiguous().t().requires_grad_()
    loss = distill_loss(columns, teacher.float(), weight, targets)
    (gradient,) = torch.autograd.grad(loss.total, columns)
    expected = naive.distill_loss(columns, teacher.float(), weight, targets)
    assert {x.dtype for x in (*loss, gradient)} == {torch.float32}
    torch.testing.assert_close(loss.total, expected.total)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.total, columns)[0])


@interpreted
def test_compiles_into_one_graph(monkeypatch):
    """Dynamo and AOTAutograd trace the whole step; kernels run as they are."""
    monkeypatch.setenv(VARIABLE, "fused")
    student, teacher, weight, targets = make_inputs(2, 4, 17, dtype=torch.float32)

    def step(hidden):
        return distill_loss(2 * hidden, teacher, weight, targets, softcap=3.0).total * 3

    expected = torch.autograd.grad(step(student), student)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(student), student)[0], expected)


@interpreted
def test_registered_op_is_sound(small_blocks):
    student, teacher, weight, targets = make_inputs(2, 4, 17, dtype=torch.float32)
    arguments = (teacher, [weight], [], targets, None, 1.0, None, 1.0, 1.0, None, True)
    torch.library.opcheck(fused._distill_loss, (student, *arguments))


HALVES = (torch.bfloat16, torch.float16)
SIZES = [(dtype, 300, 151_936) for dtype in (*HALVES, torch.float32)]
SIZES += [(dtype, 257, 151_937) for dtype in (*HALVES, torch.float32)]
SIZES += [(dtype, 130, 262_144) for dtype in HALVES] + [(dtype, 33, 50_001) for dtype in HALVES]
SIZES += [(torch.float32, 1, 151_937)]  # one rounding to 16 bits may be lucky in torch and not here


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "positions", "vocabulary"), SIZES)
def test_sizes_of_real_heads(head, positions, vocabulary, dtype):
    inputs = make_inputs(positions, 256, vocabulary, dtype=dtype, device="cuda")
    _student, _, weight, _ = inputs
    weight.mul_(0.2)  # logits of the order of 3
    check_against_fp64(*inputs, head_of(head, weight), 128)
    check_against_fp64(*inputs, head_of(head, weight))


@pytest.mark.gpu
def test_two_runs_are_equal_and_hold_little():
    student, teacher, weight, targets = make_inputs(4096, 128, 151_937, dtype=torch.bfloat16, device="cuda")
    results = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = distill_loss(student, teacher, weight, targets)
        results.append((*loss, torch.autograd.grad(loss.total, student)[0]))
        assert torch.cuda.max_memory_allocated() - before < 2**30
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.gpu
def test_compiles_on_a_gpu():
    student, teacher, weight, targets = make_inputs(64, 64, 501, dtype=torch.bfloat16, device="cuda")

    def step(hidden):
        return distill_loss(2 * hidden, teacher, weight, targets).total * 3

    expected = torch.autograd.grad(step(student), student)[0]
    assert torch.equal(torch.autograd.grad(torch.compile(step, fullgraph=True)(student), student)[0], expected)


@pytest.mark.multi_gpu
def test_shards_on_several_devices():
    student, teacher, weight, targets = make_inputs(300, 64, 5001, dtype=torch.float32, device="cuda:0")
    whole = distill_loss(student, teacher, weight, targets)
    shards = [weight[:2000].to("cuda:1"), weight[2000:]]
    loss = distill_loss(student, teacher, shards, targets, chunk_size=128)
    torch.testing.assert_close(loss.total, whole.total)
    torch.testing.assert_close(*(torch.autograd.grad(each.total, student)[0] for each in (loss, whole)))
