"""What "auto" means: nothing may compute in 32 bits on a GPU because a GGUF file names no dtype."""

import pytest
import torch

from retention_gates.recipes.loading.models import working_dtype


@pytest.mark.parametrize(
    ("dtype", "device", "is_gguf", "has_bf16", "expected"),
    [
        ("auto", "cpu", False, False, "float32"),
        ("auto", "cpu", True, False, "float32"),
        ("auto", "cuda", False, True, "auto"),
        ("auto", "cuda", True, True, "bfloat16"),
        ("auto", "cuda", True, False, "float16"),
        ("float32", "cuda", True, True, "float32"),
        ("bfloat16", "cpu", True, False, "bfloat16"),
    ],
)
def test_auto_follows_the_device_and_the_file(dtype, device, is_gguf, has_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert working_dtype(dtype, torch.device(device), is_gguf=is_gguf) == expected
