"""A GGUF file whose rotary scaling or sliding window transformers leaves out is refused, and no other."""

import numpy as np
import pytest
from tiny_gguf import add_sizes, finish
from tiny_models import tiny_model

from retention_gates.recipes.loading.gguf_header import check_gguf
from retention_gates.recipes.loading.models import load_base, load_base_config

gguf = pytest.importorskip("gguf", reason="needs the extra demo")
SCALING = gguf.RopeScalingType


def yarn(writer, factor=4.0):
    writer.add_rope_scaling_type(SCALING.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(128)


def no_scaling(writer):
    writer.add_rope_scaling_type(SCALING.NONE)
    writer.add_rope_scaling_factor(0.0)


def factors(value):
    def add(writer):
        writer.add_tensor("rope_freqs.weight", np.full(4, value, np.float32))

    return add


def write(folder, add, architecture="llama"):
    """A tiny model with the metadata that `add` gives it."""
    model = tiny_model("gemma3_text" if architecture == "gemma3" else "llama")
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", architecture)
    add_sizes(writer, config)
    writer.add_key_length(config.head_dim)
    add(writer)
    if architecture == "llama":
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor.numpy()))
    finish(writer)
    return folder


@pytest.mark.parametrize(
    ("add", "named"),
    [
        (yarn, r"llama.rope.scaling.factor=4.0, llama.rope.scaling.original_context_length=128, .*type='yarn'"),
        (lambda w: (w.add_rope_scaling_type(SCALING.LINEAR), w.add_rope_scaling_factor(2.0)), "type='linear'"),
        (lambda w: w.add_rope_scaling_factor(8.0), r"llama.rope.scaling.factor=8.0"),
        (lambda w: w.add_rope_scaling_type(SCALING.LONGROPE), "type='longrope'"),
        (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window=64"),
        (factors(8.0), "the tensor rope_freqs.weight"),
        (lambda w: (w.add_sliding_window(64), yarn(w)), "type='yarn' and llama.attention.sliding_window=64"),
    ],
)
def test_what_the_loader_leaves_out_is_named(add, named, tmp_path):
    folder = write(tmp_path, add)
    with pytest.raises(
        ValueError, match=rf"tiny.gguf has .*{named}.*, which transformers leaves out .* original weights"
    ):
        load_base(str(folder), gguf_file="tiny.gguf", device="cpu")


@pytest.mark.parametrize(
    "add",
    [
        lambda w: None,
        no_scaling,
        lambda w: yarn(w, factor=1.0),
        lambda w: w.add_sliding_window(0),
        lambda w: w.add_sliding_window(512),  # as long as the context
        factors(1.0),
    ],
)
def test_what_changes_nothing_is_loaded(add, tmp_path):
    base = load_base(str(write(tmp_path, add)), gguf_file="tiny.gguf", device="cpu")
    assert base.config.rope_parameters["rope_type"] == "default"


def test_a_window_that_the_loader_reads_is_taken(tmp_path):
    folder = write(tmp_path, lambda w: w.add_sliding_window(16), architecture="gemma3")
    config = load_base_config(str(folder), "tiny.gguf")
    assert config.sliding_window == 16 and "sliding_attention" in config.layer_types
    check_gguf(folder / "tiny.gguf", lambda: config)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"GGUF", lambda b: b[:200], lambda b: b"x" + b[1:]])
def test_a_file_that_is_no_gguf(damage, tmp_path):
    path = write(tmp_path, yarn) / "tiny.gguf"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tiny.gguf is no whole GGUF file .*: download it again"):
        load_base(str(tmp_path), gguf_file="tiny.gguf", device="cpu")
