"""Memories on disk: they go on in another process as if nothing had happened, and no other model takes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gated_models import gated_model, step_by_step, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retention_gates import RetentionGateConfig, find_gated_model
from retention_gates.gates.cache import BoundedCache
from retention_gates.gates.cache.saved_cache_checks import METADATA_KEY
from retention_gates.gates.policies import POLICIES, ScoredPolicy

SUPPORT = Path(__file__).resolve().parents[2] / "support"
SHARES = [[1.0, 2.0], [1.0, 50.0], [0.5, 1.0], [9.0, 9.0]]
ELSEWHERE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from gated_models import gated_model, token_ids
from retention_gates import find_gated_model
from retention_gates.gates.cache import BoundedCache
model = gated_model()
find_gated_model(model).active_config.budget_shares = {shares}
for path in sys.argv[2:]:
    cache = BoundedCache.load(model, path)
    mask = torch.ones(2, cache.get_seq_length() + 7, dtype=torch.int64)
    tokens = model.generate(input_ids=token_ids(2, 7, seed=5), attention_mask=mask, past_key_values=cache,
                            do_sample=False, max_new_tokens=20)
    print(tokens.tolist())
"""


@pytest.fixture(scope="module")
def model():
    return calibrated_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """A memory of one row and 60 tokens."""
    path = tmp_path_factory.mktemp("memories") / "memory"
    read(model, rows=1).save(path)
    return path


def calibrated_model(family: str = "llama"):
    model = gated_model(family)
    find_gated_model(model).active_config.budget_shares = SHARES[: len(find_gated_model(model).gated_layers)]
    return model


def answer(model, cache, rows: int = 2) -> torch.Tensor:
    question = token_ids(rows, 7, seed=5)
    mask = torch.ones(rows, cache.get_seq_length() + 7, dtype=torch.int64)
    return model.generate(
        input_ids=question, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=20
    )


@torch.no_grad()
def read(model, tokens: int = 60, rows: int = 2, **options) -> BoundedCache:
    """A cache that has read a text, in a chunk, step by step, and in a chunk again."""
    cache = BoundedCache(model, **({"memory_size": 12} | options))
    cache.pin(3, 5)
    ids = token_ids(rows, tokens)
    model(input_ids=ids[:, :30], past_key_values=cache)
    step_by_step(model, ids[:, 30:40], cache)
    model(input_ids=ids[:, 40:], past_key_values=cache)
    return cache


def test_another_process_goes_on_with_the_same_tokens(model, tmp_path):
    cases = [{"budgets": "calibrated"}, {"policy": "h2o", "budgets": "adaptive"}, {"policy": "snapkv"}]
    caches = [read(model, **case) for case in (*cases, {"policy": "rkv", "memory_size": 30, "buffer_size": 3})]
    paths = []
    for i, cache in enumerate(caches):
        paths.append(str(tmp_path / f"{i}.memory.safetensors"))
        cache.save(paths[-1])
    script = ELSEWHERE.format(shares=SHARES)
    ran = subprocess.run([sys.executable, "-c", script, str(SUPPORT), *paths], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    expected = [answer(model, cache).tolist() for cache in caches]
    assert found == expected
    assert len({str(tokens) for tokens in expected}) == len(expected)  # each forgets in its own way


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_every_layer_comes_back(family, tmp_path):
    model = calibrated_model(family)
    cache = read(model)
    cache.save(tmp_path / "memory")
    loaded = BoundedCache.load(model, tmp_path / "memory")
    assert torch.equal(answer(model, loaded.fork()), answer(model, cache))
    assert loaded.budgets == cache.budgets and loaded.protected == cache.protected
    loaded.reset()
    again = BoundedCache(model, memory_size=12)
    again.pin(3, 5)
    assert torch.equal(answer(model, loaded), answer(model, again))
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_comes_back(policy, model, tmp_path):
    cache = read(model, tokens=45, policy=policy, budgets="uniform", protected_tokens=1, seed=7)
    cache.save(tmp_path / "memory")
    loaded = BoundedCache.load(model, tmp_path / "memory", memory_size=12, policy=policy, budgets="uniform")
    ids = token_ids(2, 12, seed=3)
    assert torch.equal(step_by_step(model, ids, loaded), step_by_step(model, ids, cache))
    for one, other in zip(cache.gated_layers, loaded.gated_layers, strict=True):
        assert torch.equal(one.positions(0), other.positions(0)) and torch.equal(one.positions(1), other.positions(1))


def test_a_pool_comes_back_and_is_checked(model, tmp_path):
    cache, path = read(model, budgets="global"), tmp_path / "memory"
    cache.save(path)
    loaded = BoundedCache.load(model, path, budgets="global")
    for message, change in {
        "owner is not from 0 to 7": put("layers.0.owner", (0, 0), 8),
        "slot_positions are not all from": put("layers.0.slot_positions", (0, 0), 60),
        "more entries than there is room for": lambda t, s: t["layers.0.slot_positions"][0].copy_(
            torch.arange(104) // 2
        ),
        "holds a position twice": lambda t, s: (
            t["layers.0.slot_positions"][0, :2].fill_(1),
            t["layers.0.owner"].zero_(),
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            BoundedCache.load(model, changed(path, tmp_path, change))
    assert torch.equal(answer(model, loaded), answer(model, cache))


def test_left_padding_and_reserved_spans_come_back(model, tmp_path):
    cache = BoundedCache(model, memory_size=12, reserved=[(2, 9, 3)])
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :11] = 0
    with torch.no_grad():
        model(input_ids=token_ids(2, 30), attention_mask=mask, past_key_values=cache)
    cache.save(tmp_path / "memory")
    loaded = BoundedCache.load(model, tmp_path / "memory")
    assert loaded.reserved == cache.reserved
    mask = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], dim=1)
    texts = [
        model.generate(input_ids=token_ids(2, 7), attention_mask=mask, past_key_values=one, max_new_tokens=20)
        for one in (cache, loaded)
    ]
    assert torch.equal(*texts)


def test_forks_of_one_memory_are_independent(model):
    cache = read(model)
    answers = [answer(model, cache.fork()) for _ in range(2)]
    assert torch.equal(*answers) and torch.equal(answer(model, cache), answers[0])


def changed(saved: Path, folder: Path, change) -> Path:
    with safe_open(saved, framework="pt") as file:
        said = json.loads(file.metadata()[METADATA_KEY])
    tensors = load_file(saved)
    change(tensors, said)
    save_file(tensors, folder / "changed", metadata={METADATA_KEY: json.dumps(said)})
    return folder / "changed"


def put(key: str, index, value):
    def change(tensors, said):
        tensors[key][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("layers.0.keys", (0, 3, 1), float("nan")), "layers.0.keys has NaN"),
        (put("layers.3.values", (0, 0, 0), float("inf")), "layers.3.values has NaN or inf"),
        (put("layers.0.score", (0, 2), float("nan")), "layers.0.score has NaN"),
        (put("layers.2.slot_positions", (0, 0), 60), "slot_positions are not all from -1 to 59"),
        (put("layers.2.slot_positions", (0, 0), -2), "slot_positions are not all from -1 to 59"),
        (put("layers.2.start", 0, -1), "layers.2.start is not from 0 to 60"),
        (put("layers.2.pending", slice(None), True), None),  # all would be forgotten: useless, but safe
        (lambda t, s: t.pop("layers.1.start"), "missing layers.1.start"),
        (lambda t, s: t.update(more=torch.zeros(3)), "unexpected more"),
        (lambda t, s: t.update({"layers.1.keys": t["layers.1.keys"][..., :4].clone()}), r"layers.1.keys is F32 \[1,"),
        (lambda t, s: t.update({"layers.1.score": t["layers.1.score"].half()}), "layers.1.score is F16"),
        (lambda t, s: s.update(rows=2), r"slot_positions is not I64 \[2,"),
        (lambda t, s: s.update(rows=0), "has rows=0"),
        (lambda t, s: s.update(tokens=2**24 + 1), "tokens=16777217, where a cache counts from 1 to 16777216"),
        (lambda t, s: s.update(tokens=20), "slot_positions are not all"),
        (lambda t, s: s.update(memory_size=10**12, budgets=[[10**12] * 2] * 4), "memory_size=1000000000000 takes"),
        (
            lambda t, s: s.update(memory_size=13),
            "96 entries in all, which must be memory_size=13 for each of the 8 heads: 104",
        ),
        (lambda t, s: s.update(buffer_size=2), "slot_positions is not I64"),
        (lambda t, s: s.update(buffer_size=0), "buffer_size=0"),
        (lambda t, s: s.update(budgets=[[12, 12]] * 3), r"\[4 gated layers\]"),
        (lambda t, s: s.update(policy="retntion"), "Did you mean 'retention'"),
        (lambda t, s: s.update(protected=[[1, 2]]), "protected spans that are not .* from 0"),
        (lambda t, s: s.update(protected=[[0]]), "protected spans that are not .* from 0"),
        (lambda t, s: s.update(protected=[[0, 2], [5]]), "protected spans that are not .* from 0"),
        (lambda t, s: s.update(protected=[[0, 2], [5, 4]]), "stop=4 must be"),
        (lambda t, s: s.update(reserved=[[0, 2]]), r"must be \(start, stop, entries\)"),
        (lambda t, s: s.update(protected=[[0, 2], [3, 40]]), "memory_size=12 must be at least 40"),
        (lambda t, s: s.update(layers=[0, 1, 2]), r"gated layers \[0, 1, 2\]"),
        (lambda t, s: s.update(dtype="torch.float16"), "load the model with dtype=torch.float16"),
        (lambda t, s: s.update(seed=True), "has seed=True"),
        (lambda t, s: s.update(format=2), "format 2"),
        (lambda t, s: s.pop("seed"), "lacks seed"),
        (lambda t, s: s.update(extra=1), "unknown extra"),
    ],
)
def test_files_that_say_what_cannot_be(change, message, model, saved, tmp_path):
    path = changed(saved, tmp_path, change)
    if message is None:
        answer(model, BoundedCache.load(model, path), rows=1)
        return
    with pytest.raises(ValueError, match=message):
        BoundedCache.load(model, path)


def test_a_position_twice_and_no_free_slot(model, saved, tmp_path):
    def twice(tensors, said):
        tensors["layers.1.slot_positions"][0, :2] = tensors["layers.1.slot_positions"][0, 0]
        tensors["layers.1.pending"][0, :2] = False

    def full(tensors, said):
        slots = tensors["layers.1.slot_positions"].shape[1]
        tensors["layers.1.slot_positions"][0] = torch.arange(slots)
        tensors["layers.1.pending"][:] = False

    for change, message in ((twice, "holds a position twice"), (full, "without a free slot")):
        path = changed(saved, tmp_path, change)
        with pytest.raises(ValueError, match=message):
            BoundedCache.load(model, path)


def test_files_that_are_no_memory(model, saved, tmp_path):
    path, whole = tmp_path / "memory", saved.read_bytes()
    for content, message in (
        (whole[:-5], "not a whole safetensors file"),
        (whole[:400], "not a whole safetensors file"),
        (b"", "it has 0 bytes"),
        ((2**40).to_bytes(8, "little") + whole[8:], "states a header"),
        (b"\x02" + b"\0" * 7 + b"[]", "its header is a list"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            BoundedCache.load(model, path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no memory of retention gates"):
        BoundedCache.load(model, path)
    with pytest.raises(ValueError, match="There is no file"):
        BoundedCache.load(model, tmp_path / "nothing")


def test_every_flipped_bit_of_the_header_is_refused_or_can_be_used(model, saved, tmp_path):
    path, whole = tmp_path / "memory", saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header, refused = 8 + int.from_bytes(whole[:8], "little"), 0
    for place in torch.randint(0, header, (50,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 7)
        path.write_bytes(flipped)
        try:
            loaded = BoundedCache.load(model, path)
        except ValueError:
            refused += 1
        else:
            step_by_step(model, token_ids(1, 3), loaded)
    assert refused > 40


def test_refused_by_any_other(model, saved):
    path = saved

    other = calibrated_model()
    with torch.no_grad():
        find_gated_model(other).model.model.layers[1].mlp.up_proj.weight += 0.01
    with pytest.raises(ValueError, match=r"a memory of the model .*weights .*and this one is .*weights"):
        BoundedCache.load(other, path)

    gates = calibrated_model()
    with torch.no_grad():
        next(find_gated_model(gates).gated_layers[2].active_gate.parameters()).add_(0.01)
    with pytest.raises(ValueError, match="adapter with the SHA-256 .* gates of 'default' have"):
        BoundedCache.load(gates, path)

    shares = calibrated_model()
    find_gated_model(shares).active_config.budget_shares = [[1.0, 1.0]] * 4
    with pytest.raises(ValueError, match="calibrated budgets of the shares .* and those of 'default' are"):
        BoundedCache.load(shares, path)

    with pytest.raises(ValueError, match="memory_size=12, not 13"):
        BoundedCache.load(model, path, memory_size=13)
    with pytest.raises(ValueError, match="policy='retention', not 'h2o'"):
        BoundedCache.load(model, path, policy="h2o")
    with pytest.raises(ValueError, match="budgets='calibrated', not 'uniform'"):
        BoundedCache.load(model, path, budgets="uniform")

    half = calibrated_model().to(torch.bfloat16)
    with pytest.raises(ValueError, match="weights"):
        BoundedCache.load(half, path)


def test_gates_that_a_policy_does_not_need_do_not_matter(model, tmp_path):
    cache = read(model, policy="h2o", budgets="uniform")
    cache.save(tmp_path / "memory")
    other = gated_model()
    with torch.no_grad():
        next(find_gated_model(other).gated_layers[2].active_gate.parameters()).add_(0.01)
    assert torch.equal(answer(other, BoundedCache.load(other, tmp_path / "memory")), answer(model, cache))


def test_what_cannot_be_saved(tmp_path):
    model = gated_model()
    cache = BoundedCache(model, memory_size=12)
    with pytest.raises(ValueError, match="nothing has been read"):
        cache.save(tmp_path / "memory")
    own = BoundedCache(model, memory_size=12, policy=ScoredPolicy(name="own", score=lambda new: new.log_beta))
    step_by_step(model, token_ids(1, 3), own)
    with pytest.raises(ValueError, match="policy='own' is your own"):
        own.save(tmp_path / "memory")
    cache = read(model)
    for path in (tmp_path, tmp_path / "no" / "memory"):
        with pytest.raises(ValueError, match="in a folder that exists"):
            cache.save(path)
    cache.layers[0].keys[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="another dtype"):
        cache.save(tmp_path / "memory")
    assert not list(tmp_path.iterdir())
    del model
    own.layers[0].owner = cache.layers[0].owner
    with pytest.raises(ValueError, match="model of this cache is gone"):
        own.save(tmp_path / "memory")


def test_layers_without_a_gate_come_back(tmp_path):
    from peft import get_peft_model
    from tiny_models import tiny_model

    base = tiny_model(eos_token_id=None)
    model = get_peft_model(base, RetentionGateConfig(gate_width=8, layers_to_transform=[1, 2])).eval()
    cache = read(model)
    cache.save(tmp_path / "memory")
    assert torch.equal(answer(model, BoundedCache.load(model, tmp_path / "memory")), answer(model, cache))
