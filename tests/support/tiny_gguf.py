"""A tiny model as a GGUF file."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 96}  # blocks have 32 weights


def write_gguf(folder: Path, model: nn.Module, *, with_tokenizer: bool = False) -> str:
    """The model with its matrices in 4-bit blocks (Q4_1), under the names of the format; gives the file's name."""
    gguf = pytest.importorskip("gguf", reason="needs the extra demo")
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    add_sizes(writer, config)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if with_tokenizer:
        letters = [*(chr(code) for code in range(33, 33 + config.vocab_size - 3)), "ab", "ca"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*letters, "<|end|>"])
        writer.add_token_types([gguf.TokenType.NORMAL] * len(letters) + [gguf.TokenType.CONTROL])
        writer.add_token_merges(["a b", "c a"])
        writer.add_bos_token_id(len(letters))
        writer.add_eos_token_id(len(letters))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array, kind = tensor.numpy(), gguf.GGMLQuantizationType.F32
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            array = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array, raw_dtype=kind)
    finish(writer)
    return "tiny.gguf"


def add_sizes(writer, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
