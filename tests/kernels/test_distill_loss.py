"""Distillation loss against a case worked by hand and the losses that torch makes from whole logits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from distill_cases import make_inputs, whole_logits_loss

from retention_gates.kernels.distill_loss import WORTH_A_COPY, distill_loss, naive

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_by_hand():
    """Probabilities 1/2, 1/2 for the teacher and 1/4, 3/4 for the student; the target is the second word."""
    weight = torch.eye(2)
    teacher, student = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    loss = distill_loss(student, teacher, weight, torch.tensor([1]), kl_weight=2.0, next_token_weight=0.5)
    assert loss.forward_kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert loss.next_token_loss.item() == pytest.approx(math.log(4 / 3))
    assert loss.total.item() == pytest.approx(2 * loss.forward_kl.item() + 0.5 * loss.next_token_loss.item())
    loss.total.backward()
    # 2 (p_student - p_teacher) + (p_student - target) / 2
    torch.testing.assert_close(student.grad, torch.tensor([[-0.5 + 0.125, 0.5 - 0.125]]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 1024])
@pytest.mark.parametrize("positions", [1, 13])
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 2.0}, {"logit_scale": 0.3, "bias": True}, {"logit_scale": 1.7, "softcap": 3.0}]
)
def test_matches_whole_logits_in_fp64(device, chunk_size, positions, head):
    student, teacher, weight, targets = make_inputs(positions, device=device)
    head = dict(head)
    if head.pop("bias", False):
        head["bias"] = torch.linspace(-1, 1, len(weight), dtype=torch.float64, device=device)
    head["mask"] = torch.arange(positions, device=device) % 4 != 2
    expected_kl, expected_next_token = whole_logits_loss(student, teacher, weight, targets, **head)
    expected_total = 0.7 * expected_kl + 1.3 * expected_next_token
    (expected_gradient,) = torch.autograd.grad(3 * expected_total, student)

    weights = {"kl_weight": 0.7, "next_token_weight": 1.3, "chunk_size": chunk_size}
    loss = distill_loss(student, teacher, weight, targets, **head, **weights)
    (gradient,) = torch.autograd.grad(3 * loss.total, student)
    torch.testing.assert_close(loss.forward_kl, expected_kl.detach())
    torch.testing.assert_close(loss.next_token_loss, expected_next_token.detach())
    torch.testing.assert_close(loss.total.detach(), expected_total.detach())
    torch.testing.assert_close(gradient, expected_gradient)


def test_gradcheck():
    student, teacher, weight, targets = make_inputs(7)
    assert torch.autograd.gradcheck(
        lambda x: naive.distill_loss(x, teacher, weight, targets, logit_scale=0.8, softcap=2.0, chunk_size=3).total,
        (student,),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(device, dtype):
    """At most twice the error of torch's own path in the same dtype, whole logits and autograd, against fp64."""
    student, teacher, weight, targets = make_inputs(64, 32, 501, dtype=dtype, device=device)
    inputs = student.detach().double().requires_grad_(), teacher.double(), weight.double(), targets
    exact_kl, exact_next_token = whole_logits_loss(*inputs)
    (exact,) = torch.autograd.grad(exact_kl + exact_next_token, inputs[0])

    logits, teacher_logits = F.linear(student, weight).float(), F.linear(teacher, weight).float()
    kl = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean")
    next_token = F.cross_entropy(logits, targets)
    # scaled as a gradient scaler would, without which torch's own fp16 gradient loses its small parts
    (torch_gradient,) = torch.autograd.grad(64 * (kl + next_token), student)

    loss = distill_loss(student, teacher, weight, targets, chunk_size=17)
    assert {x.dtype for x in loss} == {torch.float32}
    (gradient,) = torch.autograd.grad(64 * loss.total, student)
    assert gradient.dtype == dtype
    rounding = 64 * torch.finfo(torch.float32).eps  # of the sums over 64 positions
    for ours, theirs, reference in (
        (loss.forward_kl, kl, exact_kl),
        (loss.next_token_loss, next_token, exact_next_token),
        (gradient / 64, torch_gradient / 64, exact),
    ):
        error, allowed = (ours - reference).abs().max(), 2 * (theirs - reference).abs().max()
        assert error <= allowed + rounding * reference.abs().max()


def test_fp16_gradient_does_not_underflow():
    """One position of 60,000 weighs 1.7e-5: its gradient times 1e-4 is below fp16, times 2^16 well inside."""
    student = torch.zeros(60_000, 2, dtype=torch.float16, requires_grad=True)
    teacher = torch.zeros_like(student)
    teacher.requires_grad_(False)[:, 0] = 2e-3
    weight = torch.eye(2, dtype=torch.float16)
    targets = torch.full((60_000,), -100)
    loss = distill_loss(student, teacher, weight, targets, next_token_weight=0.0)
    (loss.total * 2**16).backward()
    expected = (0.5 - 1 / (1 + math.exp(-2e-3))) * 2**16 / 60_000
    torch.testing.assert_close(student.grad[:, 0], torch.full((60_000,), expected).half(), rtol=2e-2, atol=0)


def test_same_hidden_states_have_no_divergence():
    student, _, weight, targets = make_inputs(13, dtype=torch.float32)
    loss = distill_loss(student, student.detach(), weight, targets, next_token_weight=0.0)
    loss.total.backward()
    assert loss.forward_kl.item() == 0 and loss.total.item() == 0
    assert not student.grad.any()
    assert loss.next_token_loss.item() > 0  # reported all the same


def test_no_teacher():
    student, teacher, weight, targets = make_inputs(13)
    alone = distill_loss(student, None, weight, targets, kl_weight=0.0)
    (gradient,) = torch.autograd.grad(alone.total, student)
    beside = distill_loss(student, teacher, weight, targets, kl_weight=0.0)
    assert torch.equal(alone.total, beside.total) and alone.forward_kl.item() == 0 and beside.forward_kl.item() > 0
    assert torch.equal(gradient, torch.autograd.grad(beside.total, student)[0])


def test_only_the_student_gets_a_gradient():
    student, teacher, weight, targets = make_inputs(5)
    teacher.requires_grad_(), weight.requires_grad_()
    loss = distill_loss(student, teacher, weight, targets)
    assert not loss.forward_kl.requires_grad and not loss.next_token_loss.requires_grad
    loss.total.backward()
    assert student.grad.any() and teacher.grad is None and weight.grad is None
    with torch.no_grad():
        unneeded = distill_loss(student, teacher, weight, targets)
    assert not unneeded.total.requires_grad and torch.equal(unneeded.total, loss.total.detach())


def test_no_tensor_holds_all_logits():
    """Every tensor made on the way, seen through the dispatcher, is at most one chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return result

    student, teacher, weight, targets = make_inputs(40, hidden_size=4, vocabulary=211, dtype=torch.float32)
    with Sizes() as whole:
        sum(whole_logits_loss(student, teacher, weight, targets)).backward()
    with Sizes() as chunked:
        distill_loss(student, teacher, weight, targets, chunk_size=8).total.backward()
    assert whole.largest >= 40 * 211
    assert chunked.largest <= 8 * 211


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(1, 5, 4)}, "student must be floating"),
        ({"teacher": torch.zeros(5, 3)}, "teacher must have shape"),
        ({"teacher": None}, "teacher is None but kl_weight is 1.0"),
        ({"weight": torch.zeros(7, 3)}, "weight must have shape"),
        ({"weight": torch.zeros(7, 4, device="meta")}, "weight is on meta"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets must have shape"),
        ({"targets": torch.zeros(5)}, "targets must be torch.int64"),
        ({"targets": torch.full((5,), 7)}, "targets holds 7: allowed are 0..6"),
        ({"targets": torch.full((5,), -1)}, "targets holds -1"),
        ({"targets": torch.full((5,), -100)}, "a row with no target"),
        ({"mask": torch.zeros(5)}, "mask must be torch.bool"),
        ({"mask": torch.zeros(5, dtype=torch.bool)}, "mask leaves forward_kl no position"),
        ({"bias": torch.zeros(4)}, "bias must have shape"),
        ({"bias": torch.zeros(7, dtype=torch.float64)}, "bias must be of weight's dtype"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"kl_weight": -1.0}, "kl_weight must be 0 or more"),
        ({"next_token_weight": math.nan}, "next_token_weight must be 0 or more"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "student": torch.zeros(5, 4),
        "teacher": torch.zeros(5, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(5, dtype=torch.int64),
    }
    distill_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        distill_loss(**(arguments | change))


def test_a_term_without_weight_needs_no_position():
    student, teacher, weight, targets = make_inputs(5)
    nothing = torch.full_like(targets, -100)
    loss = distill_loss(student, teacher, weight, nothing, next_token_weight=0.0)
    assert loss.next_token_loss.item() == 0 and torch.equal(loss.total, loss.forward_kl)
    nowhere = torch.zeros_like(targets, dtype=torch.bool)
    loss = distill_loss(student, teacher, weight, targets, mask=nowhere, kl_weight=0.0)
    assert loss.forward_kl.item() == 0 and torch.equal(loss.total, loss.next_token_loss)


@pytest.mark.parametrize("counted", [1, 7, 12, 13])
def test_positions_without_a_term_need_no_logits(counted, monkeypatch):
    """Few enough counted, and the others are left out; loss and gradient stay the same."""
    student, teacher, weight, targets = make_inputs(13)
    mask = torch.arange(13) >= 13 - counted
    targets = targets.where(mask, -100)
    expected_kl, expected_next_token = whole_logits_loss(student, teacher, weight, targets, mask=mask)
    (expected,) = torch.autograd.grad(expected_kl + expected_next_token, student)
    seen = []
    form = naive.distill_loss
    monkeypatch.setattr(
        naive, "distill_loss", lambda hidden, *a, **k: seen.append(len(hidden)) or form(hidden, *a, **k)
    )
    loss = distill_loss(student, teacher, weight, targets, mask=mask)
    (gradient,) = torch.autograd.grad(loss.total, student)
    assert seen == [counted if counted <= WORTH_A_COPY * 13 else 13]
    torch.testing.assert_close(loss.total.detach(), (expected_kl + expected_next_token).detach())
    torch.testing.assert_close(gradient, expected)


def shard(tensor, cuts=(0, 1, 5, 11)):
    return [tensor[start:stop] for start, stop in itertools.pairwise(cuts)]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_shards_of_the_head_are_the_whole_head(softcap):
    student, teacher, weight, targets = make_inputs(13)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64)
    options = dict(logit_scale=0.7, softcap=softcap, chunk_size=4)
    whole = distill_loss(student, teacher, weight, targets, bias=bias, **options)
    sharded = distill_loss(student, teacher, shard(weight), targets, bias=shard(bias), **options)
    for ours, expected in zip(sharded, whole, strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.total, student)[0] for loss in (sharded, whole)))


@pytest.mark.gpu
def test_head_and_hidden_states_may_lie_apart():
    student, teacher, weight, targets = make_inputs(13)
    expected = distill_loss(student, teacher, weight, targets, chunk_size=5)
    (expected_gradient,) = torch.autograd.grad(expected.total, student)
    for hidden_device, head_device in (("cuda", "cpu"), ("cpu", "cuda")):
        moved = student.detach().to(hidden_device).requires_grad_()
        for head in (weight.to(head_device), [weight[:4].to(head_device), weight[4:].to("cpu")]):
            loss = distill_loss(moved, teacher.to(hidden_device), head, targets.to(hidden_device), chunk_size=5)
            (gradient,) = torch.autograd.grad(loss.total, moved)
            assert loss.total.device.type == gradient.device.type == hidden_device
            torch.testing.assert_close(loss.total.cpu(), expected.total)
            torch.testing.assert_close(gradient.cpu(), expected_gradient)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ([], None, "weight is an empty sequence"),
        ([torch.zeros(3, 4), torch.zeros(4, 3)], None, "weight must have shape"),
        ([torch.zeros(3, 4), torch.zeros(4, 4).half()], None, "weight has shards of torch.float16 and torch.float32"),
        ([torch.zeros(7, 4), torch.zeros(0, 4)], None, "a shard of 0 words"),
        ([torch.zeros(3, 4), torch.zeros(4, 4)], torch.zeros(7), "bias has 1 shards but weight has 2"),
        ([torch.zeros(3, 4), torch.zeros(4, 4)], [torch.zeros(4), torch.zeros(3)], "bias must have shape"),
    ],
)
def test_bad_shards_are_named(weight, bias, message):
    hidden, targets = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        distill_loss(hidden, hidden, weight, targets, bias=bias)


def test_part_of_a_dtensor_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    student, teacher, weight, targets = make_inputs(5)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        replicated = distill_loss(student, teacher, distribute_tensor(weight, mesh, [Replicate()]), targets)
        assert torch.equal(replicated.total, distill_loss(student, teacher, weight, targets).total)
        with pytest.raises(ValueError, match=r"weight is a DTensor .* pass weight.full_tensor\(\)"):
            distill_loss(student, teacher, distribute_tensor(weight, mesh, [Shard(0)]), targets)
    finally:
        torch.distributed.destroy_process_group()
