"""Facts about other packages that this one depends on: the releases it was tested with, and their private names."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

# package -> its oldest and its newest tested minor release; pyproject.toml has the same ranges
TESTED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.24"),
    "peft": ("0.21", "0.21"),
}


def check_versions() -> None:
    """Warns if an installed version is newer than the tested ones, or between releases (dev, alpha, rc).

    Raises:
        ModuleNotFoundError: if one is not installed.
        ValueError: if one is older, since it lacks what this package needs.
    """
    if missing := [package for package in TESTED if not _is_installed(package)]:
        raise ModuleNotFoundError(f"{sys.executable} has no {', '.join(missing)}. {_install(missing)}")
    older, untested = [], []
    for package, (oldest, newest) in TESTED.items():
        installed = Version(version(package))
        minor = installed.release[:2]
        if minor < Version(oldest).release:
            older.append(package)
        elif minor > Version(newest).release or installed.is_prerelease:
            untested.append(package)
    if older:
        raise ValueError(f"retention-gates does not run with {_installed(older)}. {_install(older)}")
    if untested:
        warnings.warn(
            f"retention-gates was not tested with {_installed(untested)}. If an error or a result surprises you: "
            + _install(untested),
            stacklevel=3,  # who imports the package
        )


def requirement(package: str) -> str:
    """Returns the tested releases in pip's form: "peft>=0.21,<0.22"."""
    oldest, newest = TESTED[package]
    major, minor = Version(newest).release
    return f"{package}>={oldest},<{major}.{minor + 1}"


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _installed(packages: Sequence[str]) -> str:
    tested = {name: " to ".join(dict.fromkeys(TESTED[name])) for name in packages}
    return ", ".join(f"{name} {version(name)} (releases of {tested[name]} are tested)" for name in packages)


def _install(packages: Sequence[str]) -> str:
    return "Install tested releases: pip install " + " ".join(f"'{requirement(name)}'" for name in packages)


# ---- private names of other packages; tests/packaging/test_compat.py says which one is gone ----

# our name -> where it is, and what it is used for; imported when it is first asked for
PRIVATE = {
    "TorchDispatchMode": ("torch.utils._python_dispatch:TorchDispatchMode", "seeing which operators read a tensor"),
    "cuda_sleep": ("torch.cuda:_sleep", "timing without the launch"),
    "disabled_torch_function": ("torch._C:_disabled_torch_function_impl", "results of layers that are computed later"),
    "flash_attention_forward": ("torch:ops.aten._flash_attention_forward", "flash attention of unequal sequences"),
    "foreach_mul": ("torch:_foreach_mul", "gradients of a captured training step"),
    "leave_to_ranks": (
        "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "parameters and buffers that DDP does not send",
    ),
    "make_wrapper_subclass": ("torch:Tensor._make_wrapper_subclass", "results of layers that are computed later"),
    "tree_leaves": ("torch.utils._pytree:tree_leaves", "tensors inside of arguments"),
    "tree_map_only": ("torch.utils._pytree:tree_map_only", "tensors inside of arguments"),
}
# class or function -> its private attributes and methods that are read, called or overridden
PRIVATE_MEMBERS = {
    "torch:Tensor": ("_version",),
    "torch:UntypedStorage": ("_cdata",),
    "torch:ops.aten.add_.Tensor": ("_schema",),
    "torch.nn:Module": ("_apply", "_compiled_call_impl", "_forward_hooks", "_forward_pre_hooks"),
    "transformers:PreTrainedConfig": ("_attn_implementation",),
    "transformers.integrations:TrackioCallback": ("_initialized", "_trackio"),
    "transformers:Trainer": (
        *("_load_best_model", "_load_from_checkpoint", "_prepare_inputs", "_save", "_save_checkpoint"),
        *("_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler"),
    ),
    "accelerate.hooks:add_hook_to_module": ("_hf_hook",),
    "peft:PeftConfig": ("_split_kwargs",),
    "peft.tuners.tuners_utils:BaseTuner": (
        *("_create_and_replace", "_enable_adapter_layers", "_get_adapter_state_dict", "_prepare_adapter_config"),
        *("_prepare_model", "_remap_adapter_state_dict_for_load", "_remove_adapter_name_from_key", "_replace_module"),
    ),
    "peft.tuners.tuners_utils:BaseTunerLayer": (
        *("_active_adapter", "_disable_adapters", "_move_adapter_to_device_of_base_layer"),
    ),
}


def find_private(place: str) -> Any:
    """Returns what lies at "module:name.name"."""
    module, _, path = place.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = find_private(PRIVATE[name][0])
    return found


def attention_implementation(config: Any) -> str | None:
    """Returns the name of the attention that transformers' layers of this config call."""
    return config._attn_implementation


def set_attention_implementation(config: Any, name: str | None) -> None:
    config._attn_implementation = name


def note_commit(config: Any, commit: str | None) -> None:
    """Notes the Hub's commit that a model was loaded from, where older transformers keep it."""
    config._commit_hash = commit


def noted_commit(config: Any) -> str | None:
    """Returns what `note_commit` or older transformers have noted."""
    return getattr(config, "_commit_hash", None)


def writes_to(tensor: Any) -> int:
    """Returns how often the tensor was written to; not known of tensors made in inference mode."""
    return tensor._version


def storage_id(tensor: Any) -> int:
    """Returns a number that tensors have in common where they share memory."""
    return tensor.untyped_storage()._cdata


def operator_schema(function: Any) -> Any | None:
    """Returns what an operator reads and writes; None for functions that are no operators."""
    return getattr(function, "_schema", None)


def trackio_of(tracker: Any) -> Any | None:
    """Returns the library to which transformers' callback reports; None before the run has begun."""
    return tracker._trackio if tracker._initialized else None


def forward_hooks(module: Any) -> list[Any]:
    """Returns the hooks that are called before and after a module's forward pass."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def has_offload_hook(module: Any) -> bool:
    """Whether accelerate brings the module's weights when it is called."""
    return hasattr(module, "_hf_hook")


def is_compiled(model: Any) -> bool:
    """Whether `model.compile()` was called."""
    return model._compiled_call_impl is not None
