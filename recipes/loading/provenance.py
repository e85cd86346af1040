"""Where results come from: versions, commit and device."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retention_gates import __version__

PACKAGES = ("torch", "transformers", "peft")


def machine_and_versions(model: "nn.Module") -> dict[str, Any]:
    """Versions of what computes, the commit if this is a checkout, and where and how precisely the model runs."""
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    is_rounded = on_gpu and parameter.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    device = torch.cuda.get_device_name(parameter.device) if on_gpu else f"{platform.machine()} CPU"
    if parameter.device.type == "cpu":
        device += f", {torch.get_num_threads()} threads"
    return {
        "retention_gates": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "triton": _triton(),
        "device": device,
        "dtype": str(parameter.dtype).removeprefix("torch.") + (" (products in tf32)" if is_rounded else ""),
    }


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:  # there is none for every platform
        return None


def commit() -> str | None:
    """The commit of the checkout that this file belongs to, "+changes" if it was edited since; None if installed."""
    here = Path(__file__).resolve()
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None
    changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    head = _git(here, "rev-parse", "--short", "HEAD")
    return f"{head}+changes" if changed else head


def _git(file: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
