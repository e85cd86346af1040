"""torch.compile of a training step gives the same loss and gradients."""

import os

import pytest
import torch
from tiny_training import PACKED, gated

from retention_gates import find_gated_model, record
from retention_gates.kernels.dispatch import VARIABLE
from retention_gates.kernels.distill_loss import distill_loss
from retention_gates.kernels.retention_attention import retention_attention
from retention_gates.trainers.losses import capacity_loss
from retention_gates.trainers.output_head import OutputHead

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
# torch 2.11's compiler gives the naive distillation loss, an autograd.Function, a gradient of 0; 2.13's the right one
compiles_functions = pytest.mark.skipif(torch.__version__ < (2, 13), reason="needs torch 2.13 for the naive form")
FORMS = [
    pytest.param("cpu", "naive", "aot_eager", marks=[pytest.mark.slow, compiles_functions]),
    pytest.param("cpu", "fused", "aot_eager", marks=interpreted),
    pytest.param("cuda", "fused", "inductor", marks=pytest.mark.gpu),
]
# on a CPU, a whole step shows the same by default, and the tests of each op look closer
OPS_ALONE = [FORMS[0], pytest.param("cpu", "fused", "aot_eager", marks=[pytest.mark.slow, interpreted]), FORMS[2]]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compare(step, wanted, compiled) -> None:
    expected, ours = step(), compiled()
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(loss, wanted) for loss in (ours, expected)]
    assert all(gradient.any() for gradient in gradients[1])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("device", "form", "backend"), OPS_ALONE)
def test_the_ops_of_a_step_are_one_graph(monkeypatch, device: str, form: str, backend: str):
    monkeypatch.setenv(VARIABLE, form)
    generator = torch.Generator().manual_seed(0)
    query, key, value, logits, teacher, weight = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((1, 2, 20, 16), (1, 1, 20, 16), (1, 1, 20, 16), (1, 1, 20), (20, 32), (40, 32))
    )
    documents = torch.tensor([[0] * 8 + [1] * 12], device=device)
    targets = torch.arange(20, device=device)

    def step():
        log_beta = torch.nn.functional.logsigmoid(logits)
        attended = retention_attention(query, key, value, log_beta, scale=0.25, document_ids=documents)
        distilled = distill_loss(attended.transpose(1, 2).reshape(20, 32), teacher, weight, targets)
        return distilled.total + capacity_loss([log_beta, 2 * log_beta], 1, document_ids=documents).loss

    wanted = [x.requires_grad_() for x in (query, key, value, logits)]
    compare(step, wanted, torch.compile(step, fullgraph=True, backend=backend))


@pytest.mark.parametrize(("device", "form", "backend"), FORMS)
def test_a_whole_step(monkeypatch, device: str, form: str, backend: str):
    """Student, both losses and all gradients; transformers' own code may break the graph."""
    model = gated(num_hidden_layers=2).to(device)
    head = OutputHead.from_model(model)
    monkeypatch.setenv(VARIABLE, form)
    ids = torch.randint(3, 97, (1, 48), generator=torch.Generator().manual_seed(0)).to(device)
    tokens = {"input_ids": ids, "position_ids": PACKED[None].to(device), "use_cache": False}
    teacher = torch.randn(48, 32, generator=torch.Generator().manual_seed(1)).to(device)

    def step():
        with record(model) as recording:
            student = model(**tokens, last_hidden_state_only=True)[0]
        capacity = capacity_loss(recording.log_beta, 8, document_ids=recording.document_ids)
        return distill_loss(student, teacher, head.module.weight, ids[0]).total + capacity.loss

    gates = [p for layer in find_gated_model(model).gated_layers for p in layer.active_gate.parameters()]
    compare(step, gates, torch.compile(step, fullgraph=True, backend=backend))
