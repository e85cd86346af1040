"""Argument checks that several ops share. Each raises ValueError with the argument's name."""

import torch


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Raises ValueError unless `tensor` has `shape`; `letters` names its axes, such as "[B, H, T]"."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}, not {list(tensor.shape)}.")


def check_same_device(reference_name: str, reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless every tensor lies on the device of `reference`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {reference_name} is on {reference.device}: move it there first."
            )


def check_like(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    letters: str,
    dtype: torch.dtype,
    beside: tuple[str, torch.Tensor],
) -> None:
    """Raises ValueError unless `tensor` has this shape and dtype and lies on the device of the one named `beside`."""
    check_shape(name, tensor, shape, letters)
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype}.")
    check_same_device(beside[0], beside[1], **{name: tensor})


def may_look_at_values(tensor: torch.Tensor) -> bool:
    """Whether numbers can be read now: not while a graph is traced, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it if its last axis is not one after the other in memory, as kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class LogBetaError(ValueError):
    """log_beta holds numbers that are the log of no coefficient."""


def check_log_beta(log_beta: torch.Tensor, *, values: bool = True) -> None:
    """Raises ValueError unless log_beta is [B, H, T], fp32, finite and <= 0 (LogBetaError), with at least one token.

    Args:
        values: look at the numbers too, for which the device has to finish what it is at.
    """
    if log_beta.ndim != 3 or log_beta.shape[-1] == 0:
        raise ValueError(f"log_beta must have shape [B, H, T] with T >= 1, not {list(log_beta.shape)}.")
    if log_beta.dtype != torch.float32:
        raise ValueError(
            f"log_beta must be torch.float32, not {log_beta.dtype}: ages in the thousands multiply its rounding "
            "error. Compute it in fp32 rather than casting it here."
        )
    if values and may_look_at_values(log_beta):
        allowed = (log_beta <= 0) & log_beta.isfinite()
        if not bool(allowed.all()):
            raise LogBetaError(
                f"log_beta must be finite and <= 0, the log of a coefficient in (0, 1], but holds "
                f"{log_beta[~allowed][0].item()}: take the logsigmoid of the gate's output."
            )


def check_document_ids(document_ids: torch.Tensor | None, log_beta: torch.Tensor) -> None:
    """Raises ValueError unless document_ids is None or int64 [B, T] to go with log_beta [B, H, T]."""
    if document_ids is None:
        return
    check_shape("document_ids", document_ids, (log_beta.shape[0], log_beta.shape[2]), "[B, T]")
    if document_ids.dtype != torch.int64:
        raise ValueError(f"document_ids must be torch.int64, not {document_ids.dtype}: convert it with .long().")
