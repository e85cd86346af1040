"""Two gloo ranks pass through rows of which each holds a half, and compare with the whole rows on one.

Called as a script with the file to write: {case: {what: largest difference, relative to the largest number}}.
"""

import json
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny_models import tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from retention_gates import RetentionGateConfig
from retention_gates.gates.adapter.gate_outputs import record
from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.attention.documents import document_ids_from
from retention_gates.gates.attention.sequence_parallel import RowGroup
from retention_gates.trainers.losses import capacity_loss

RANKS, ROWS, TOKENS = 2, 2, 26
BASES = ("llama-sdpa", "qwen3-eager")


def layouts() -> dict[str, dict[str, torch.Tensor]]:
    """Padding masks and position_ids [ROWS, TOKENS] of rows whose documents cross the middle, or are padded."""
    positions = torch.arange(TOKENS).expand(ROWS, -1)
    packed = torch.tensor([[*range(8), *range(11), *range(7)], [*range(13), *range(1), *range(12)]])
    cases = {"one document": {"position_ids": positions}, "packed": {"position_ids": packed}}
    padded = {"left": positions < torch.tensor([[16], [3]]), "right": positions > torch.tensor([[15], [20]])}
    for name, where in padded.items():
        mask = (~where).long()
        cases[f"{name} padding"] = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return cases


def by_position(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that finds documents in position_ids and gets no mask, as flash attention does."""
    documents = document_ids_from(None, kwargs["position_ids"], len(query))
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def gated(base: str, **changes):
    torch.manual_seed(1)
    family, implementation = base.split("-")
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    config = RetentionGateConfig(gate_width=16, initial_half_life=20.0, protected_tokens=2, **changes)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "retention_gate" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def results(model, tokens: dict[str, torch.Tensor], direction: torch.Tensor, real: torch.Tensor, parts: int):
    """What a pass gives, and the gradient of a loss that sees every real token and the capacity loss in full."""
    options = {"use_cache": False, "last_hidden_state_only": True}
    model.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**tokens, **options)
    with record(model) as recording:
        student = model(**tokens, **options)
    documents = recording.document_ids
    capacity = capacity_loss(recording.log_beta, 4, document_ids=documents, normalisation="excess").loss
    capacity += capacity_loss(recording.log_beta, 4, document_ids=documents, scope="model").loss
    ((student * direction * real[..., None]).sum() + 50 * capacity / parts).backward()
    gates = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    hidden = {"teacher": teacher * real[..., None], "student": student.detach() * real[..., None]}
    return hidden, torch.stack(recording.log_beta).detach(), torch.cat(gates), capacity.detach()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape and other.abs().max() > 0
    return ((one - other).abs().max() / other.abs().max()).item()


def compare(model, group: RowGroup, layout: dict[str, torch.Tensor]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    tokens = {"input_ids": torch.randint(3, 97, (ROWS, TOKENS), generator=generator)} | layout
    direction = torch.randn(ROWS, TOKENS, 32, generator=generator)
    real = layout.get("attention_mask", torch.ones(ROWS, TOKENS))
    hidden, log_beta, gates, capacity = results(model, tokens, direction, real, 1)

    def part(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(RANKS, 1)[group.rank]

    with find_gated_model(model).rows_split_over(group):
        mine = {name: part(x).contiguous() for name, x in tokens.items()}
        halves, log_beta_2, gates_2, capacity_2 = results(model, mine, part(direction), part(real), RANKS)
    dist.all_reduce(gates_2)
    errors = {name: difference(halves[name], part(hidden[name])) for name in halves}
    errors |= {"log_beta": difference(log_beta_2, log_beta), "gates": difference(gates_2, gates)}
    return errors | {"capacity": difference(capacity_2, capacity)}


def of_rank(rank: int, folder: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    group = RowGroup(dist.group.WORLD)
    found = {}
    for base in BASES:
        model = gated(base)
        for name, layout in layouts().items():
            found[f"{base}, {name}"] = compare(model, group, layout)
    AttentionInterface.register("by_position", by_position)
    AttentionMaskInterface.register("by_position", lambda *args, **kwargs: None)
    found["llama-by_position, packed"] = compare(gated("llama-by_position"), group, layouts()["packed"])
    some = gated("llama-sdpa", layers_to_transform=[0, 2])
    found["gates in some layers"] = compare(some, group, layouts()["packed"])
    gathered = [None] * RANKS
    dist.all_gather_object(gathered, found)
    worst = {case: {k: max(one[case][k] for one in gathered) for k in found[case]} for case in found}
    if rank == 0:
        with open(output, "w") as file:
            json.dump(worst, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.start_processes(of_rank, (meeting, sys.argv[1]), nprocs=RANKS, start_method="fork")
