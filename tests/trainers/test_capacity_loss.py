"""Capacity loss against a case worked by hand and a plain-Python mean."""

import math

import pytest
import torch

from retention_gates.gates.cache import budgets
from retention_gates.kernels.retention_sum import retention_sum
from retention_gates.trainers.losses import capacity_loss

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8, [-1] * 3 + [0] * 10, [-1] * 13])


def random_layers(layers=3, heads=2, tokens=13, batch=3):
    generator = torch.Generator().manual_seed(layers)
    return [-torch.exp(2 * torch.randn(batch, heads, tokens, generator=generator) - 3) for _ in range(layers)]


def plain_python(log_beta, memory_size, document_ids, normalisation):
    rows, masses = [[] for _ in document_ids], []
    for layer in log_beta:
        mass_of_layer = []
        for terms, row, documents in zip(rows, layer.tolist(), document_ids.tolist(), strict=True):
            for head in row:
                for step, document in enumerate(documents):
                    if document < 0:
                        continue
                    start = documents.index(document)
                    mass = sum(math.exp((step - i) * head[i]) for i in range(start, step + 1))
                    length = step - start + 1
                    mass_of_layer.append(mass)
                    if normalisation == "length":
                        terms.append(max(0.0, mass - memory_size) / length)
                    elif mass > memory_size:
                        terms.append((mass - memory_size) / max(length - memory_size, 1))
        masses.append(sum(mass_of_layer) / len(mass_of_layer))
    if normalisation == "length":
        every = [term for terms in rows for term in terms]
        return sum(every) / max(len(every), 1), masses
    return sum(sum(terms) / max(len(terms), 1) for terms in rows) / int((document_ids >= 0).any(1).sum()), masses


def test_by_hand():
    """Nothing fades: S is 1, 2, 3, 4 and 1.5 too much is held at M = 2 over the steps 3 and 4 (1/3 and 2/4)."""
    log_beta = [torch.zeros(1, 1, 4)]
    loss, mass = capacity_loss(log_beta, 2)
    assert loss.item() == pytest.approx((1 / 3 + 2 / 4) / 4)
    assert mass.tolist() == [2.5]
    # over the two steps above M only: 1/1 and 2/2
    assert capacity_loss(log_beta, 2, normalisation="excess").loss.item() == pytest.approx(1.0)
    # two documents of two tokens never hold more than 2
    documents = torch.tensor([[0, 0, 1, 1]])
    assert capacity_loss(log_beta, 2, document_ids=documents).loss.item() == 0
    assert capacity_loss(log_beta, 2, document_ids=documents, normalisation="excess").loss.item() == 0


@pytest.mark.parametrize("normalisation", ["length", "excess"])
@pytest.mark.parametrize("memory_size", [1, 3, 7, 8, 9, 12, 13])
@pytest.mark.parametrize("documents", [torch.zeros(3, 13, dtype=torch.int64), DOCUMENTS])
def test_matches_plain_python(normalisation, memory_size, documents):
    layers = random_layers()
    expected, expected_mass = plain_python(layers, memory_size, documents, normalisation)
    for argument in [documents] if (documents < 0).any() else [documents, None]:
        loss, mass = capacity_loss(layers, memory_size, document_ids=argument, normalisation=normalisation)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(mass, torch.tensor(expected_mass))


@pytest.mark.parametrize("normalisation", ["length", "excess"])
@pytest.mark.parametrize("memory_size", [1, 3, 7])
def test_the_models_capacity_is_that_of_its_mean_head(normalisation, memory_size):
    """Against the loss of one head that holds the mean: of heads that differ, of packed documents and padding."""
    layers = random_layers()
    masses = [retention_sum(layer, document_ids=DOCUMENTS) for layer in layers]
    mean = torch.cat(masses, dim=1).mean(1)  # [B, T]
    of_rows = []
    for row, documents in zip(mean.tolist(), DOCUMENTS.tolist(), strict=True):
        terms = []
        for step, document in enumerate(documents):
            length = step - documents.index(document) + 1
            excess = max(0.0, row[step] - memory_size)
            if document >= 0 and normalisation == "length":
                terms.append(excess / length)
            elif document >= 0 and excess:
                terms.append(excess / max(length - memory_size, 1))
        of_rows.append(terms)
    if normalisation == "length":
        expected = sum(map(sum, of_rows)) / sum(map(len, of_rows))
    else:  # the last row is padding
        expected = sum(sum(terms) / max(len(terms), 1) for terms in of_rows[:2]) / 2
    loss, mass = capacity_loss(layers, memory_size, document_ids=DOCUMENTS, normalisation=normalisation, scope="model")
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(mass, capacity_loss(layers, memory_size, document_ids=DOCUMENTS).retained_mass)


def test_one_head_may_hold_what_another_leaves():
    """By hand: heads that hold everything and next to nothing; after 4 tokens 4 and 1, 2.5 in the mean."""
    log_beta = [torch.cat([torch.zeros(1, 1, 4), torch.full((1, 1, 4), -50.0)], dim=1)]
    assert capacity_loss(log_beta, 3, scope="model").loss.item() == 0
    assert capacity_loss(log_beta, 3).loss.item() == pytest.approx(1 / 4 / 8)  # of 8 steps of heads one is above 3
    assert capacity_loss(log_beta, 2, scope="model").loss.item() == pytest.approx(0.5 / 4 / 4)


def test_all_layers_are_one_sum(monkeypatch):
    """As many kernels, and waits for the device, as one layer takes."""
    shapes = []

    def counted(log_beta, **options):
        shapes.append(list(log_beta.shape))
        return retention_sum(log_beta, **options)

    monkeypatch.setattr(budgets, "retention_sum", counted)
    capacity_loss(random_layers(layers=5), 3, document_ids=DOCUMENTS)
    assert shapes == [[3, 10, 13]]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("normalisation", ["length", "excess"])
def test_layers_may_lie_on_several_devices(normalisation):
    layers = [layer.requires_grad_() for layer in random_layers()]
    spread = [layer.to(f"cuda:{index % 2}") for index, layer in enumerate(layers)]
    for documents in (None, DOCUMENTS):
        alone = capacity_loss(layers, 3, document_ids=documents, normalisation=normalisation)
        there = None if documents is None else documents.to("cuda:0")
        loss, mass = capacity_loss(spread, 3, document_ids=there, normalisation=normalisation)
        assert loss.device == mass.device == spread[0].device
        torch.testing.assert_close(loss.cpu(), alone.loss)
        torch.testing.assert_close(mass.cpu(), alone.retained_mass)
        for ours, expected in zip(
            torch.autograd.grad(loss, layers), torch.autograd.grad(alone.loss, layers), strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("normalisation", ["length", "excess"])
def test_gradient_makes_the_gates_forget(normalisation):
    layers = [layer.requires_grad_() for layer in random_layers()]
    loss, mass = capacity_loss(layers, 3, document_ids=DOCUMENTS, normalisation=normalisation)
    assert not mass.requires_grad
    loss.backward()
    for layer in layers:
        assert (layer.grad >= 0).all() and layer.grad.any()
        assert not layer.grad.transpose(1, 2)[DOCUMENTS < 0].any()
    smaller = [(layer - 0.1 * layer.grad).detach() for layer in layers]
    assert (
        capacity_loss(smaller, 3, document_ids=DOCUMENTS).loss < capacity_loss(layers, 3, document_ids=DOCUMENTS).loss
    )


@pytest.mark.parametrize("normalisation", ["length", "excess"])
def test_padding_changes_nothing(normalisation):
    layers = random_layers(batch=1)
    alone = capacity_loss(layers, 3, normalisation=normalisation)
    padded = [torch.nn.functional.pad(layer, (4, 2), value=-1e-3) for layer in layers]
    padded = [torch.cat([layer, torch.zeros_like(layer)]) for layer in padded]  # and an empty row
    documents = torch.full((2, 19), -1)
    documents[0, 4:17] = 0
    beside = capacity_loss(padded, 3, document_ids=documents, normalisation=normalisation)
    torch.testing.assert_close(alone.loss, beside.loss)
    torch.testing.assert_close(alone.retained_mass, beside.retained_mass)


@pytest.mark.parametrize("normalisation", ["length", "excess"])
def test_rows_of_one_length_may_be_computed_apart(normalisation):
    """As they are on several ranks, or in several passes of one step."""
    layers = random_layers(batch=4)
    whole = capacity_loss(layers, 3, normalisation=normalisation).loss
    halves = [capacity_loss([x[i : i + 2] for x in layers], 3, normalisation=normalisation).loss for i in (0, 2)]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_a_memory_that_holds_everything_costs_nothing():
    layers = [layer.requires_grad_() for layer in random_layers()]
    for normalisation in ("length", "excess"):
        loss, _ = capacity_loss(layers, 13, normalisation=normalisation)
        loss.backward()
        assert loss.item() == 0
    assert not any(layer.grad.any() for layer in layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_beta": []}, "log_beta is an empty list"),
        ({"memory_size": 0}, "memory_size must be a whole number"),
        ({"memory_size": 2.5}, "memory_size must be a whole number"),
        ({"memory_size": True}, "memory_size must be a whole number"),
        ({"normalisation": "paper"}, "normalisation must be one of"),
        ({"scope": "layer"}, "scope must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        capacity_loss(**({"log_beta": [torch.zeros(1, 1, 4)], "memory_size": 2} | arguments))
