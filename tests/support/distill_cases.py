"""Inputs of the distillation loss, and the losses that torch makes of them from whole logits."""

import torch
import torch.nn.functional as F


def make_inputs(positions, hidden_size=6, vocabulary=11, dtype=torch.float64, device="cpu"):
    """student [N, C], teacher [N, C], weight [V, C] and targets [N], every third -100."""
    generator = torch.Generator().manual_seed(positions)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    student, teacher, weight = (
        tensor.to(device, dtype)
        for tensor in (random(positions, hidden_size), random(positions, hidden_size), random(vocabulary, hidden_size))
    )
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    targets[1::3] = -100
    return student.requires_grad_(), teacher, weight, targets.to(device)


def whole_logits_loss(student, teacher, weight, targets, *, mask=None, **head):
    """forward_kl and next_token_loss, in the inputs' dtype up to the logits and at least in fp32 from there on."""
    divergence, cross_entropy = losses_by_position(student, teacher, weight, targets, **head)
    return (divergence if mask is None else divergence[mask]).mean(), cross_entropy[targets != -100].mean()


def losses_by_position(student, teacher, weight, targets, *, bias=None, logit_scale=1.0, softcap=None):
    """KL and cross entropy [N] each, 0 where there is no target."""

    def log_softmax(hidden):
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1)

    student_log, teacher_log = log_softmax(student), log_softmax(teacher)
    divergence = F.kl_div(student_log, teacher_log, log_target=True, reduction="none").sum(-1)
    return divergence, F.nll_loss(student_log, targets, reduction="none")
