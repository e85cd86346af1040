"""Loads what all commands need: base model, tokenizer and adapter."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from retention_gates.checkpoints.hub import download_adapter
from retention_gates.compat import note_commit
from retention_gates.gates.adapter.base_identity import note_file
from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.gates.adapter.files import find_file, retried
from retention_gates.gates.policies import POLICIES, find_policy
from retention_gates.recipes.arguments.shared import DTYPES
from retention_gates.recipes.loading.gguf_conversion import find_kept, keep
from retention_gates.recipes.loading.gguf_header import check_gguf

QUANTIZATIONS = ("8bit", "4bit")


def load_base(
    name: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: str = "auto",
    stay: bool = False,
    quantization: str | None = None,
) -> "PreTrainedModel":
    """A base model in eval mode on its device.

    Args:
        name: Hub name or folder.
        gguf_file: the file in that folder with the weights, if they are GGUF.
        revision: branch, tag or commit of a model of the Hub.
        device: cuda where there is one, if not given.
        dtype: one of DTYPES; "auto" is float32 on a CPU, where 16-bit arithmetic is slow, and else the model's own, or
            16 bits for a GGUF file, which names none.
        stay: leave the weights where they are loaded, for an engine that gives each device its part.
        quantization: "8bit" or "4bit": linear layers as bitsandbytes holds them, made from whole weights.
    """

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: choose among {', '.join(DTYPES)}.")
    place = chosen_device(device)
    dtype = working_dtype(dtype, place, is_gguf=gguf_file is not None)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    # False: a base that needs code of its own is refused at once, rather than asked about; adapters name bases
    options: dict[str, Any] = {"trust_remote_code": False}
    where = name
    path = str(_find_model(name, gguf_file, revision))
    if revision is not None and not Path(name).is_dir():
        options["revision"] = revision
    if gguf_file is not None:
        kept = find_kept(path, (dtype,)) or keep(path, dtype, lambda: _convert(name, gguf_file, path, chosen, options))
        if kept is None:
            model = _convert(name, gguf_file, path, chosen, options)[0]
            return (model if stay else model.to(place)).eval()  # type: ignore[arg-type]
        where, options = str(kept), {"trust_remote_code": False}
    if quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32 if place.type == "cpu" else torch.bfloat16,
        )
        options["device_map"] = {"": place}
    model = retried(lambda: AutoModelForCausalLM.from_pretrained(where, dtype=chosen, **options))
    model.name_or_path = model.config.name_or_path = name  # adapters record the model, not where its weights are kept
    note_commit(model.config, _commit_in_cache(name, revision))  # as older transformers note it: adapters record it
    placed = stay or quantization is not None
    return (model if placed else model.to(place)).eval()  # type: ignore[arg-type]


def working_dtype(dtype: str, device: torch.device, *, is_gguf: bool) -> str:
    """Resolves "auto" for a device; it remains "auto" where the model's config says it."""
    if dtype != "auto":
        return dtype
    if device.type == "cpu":
        return "float32"
    if not is_gguf:
        return "auto"
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bf16 else "float16"


def check_quantization(quantization: str | None, gguf_file: str | None) -> None:
    """Raises ValueError unless base weights can be held like that."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"model.quantization={quantization!r} is not one of {', '.join(QUANTIZATIONS)}: leave it out."
        )
    if gguf_file is not None:
        raise ValueError(
            f"model.quantization={quantization} is for whole weights, and {gguf_file} is quantised already: leave it "
            "out."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"model.quantization={quantization} needs bitsandbytes: pip install bitsandbytes.")


def check_dtype(dtype: str, device: "torch.device") -> None:
    """Raises ValueError for a type that the GPU has no arithmetic for, and would compute in another one."""
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"model.dtype=bfloat16 is not for {torch.cuda.get_device_name(device)}, which has no bf16 arithmetic: use "
            "float16 or float32."
        )


def load_base_config(name: str, gguf_file: str | None = None, revision: str | None = None) -> "PreTrainedConfig":
    """The config of the decoder in a base model, without its weights."""
    where, options = _small_files(name, gguf_file, revision)
    config = retried(lambda: AutoConfig.from_pretrained(where, trust_remote_code=False, **options))
    return config.get_text_config(decoder=True)


def load_tokenizer(name: str, *, gguf_file: str | None = None) -> "PreTrainedTokenizerBase":
    where, options = _small_files(name, gguf_file)
    return retried(lambda: AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options))


def load_model(
    name: str | None,
    adapter: str | None,
    *,
    gguf_file: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: str = "auto",
) -> "PeftModel":
    """A base model with the adapter's gates; without an adapter, untrained gates, for policies that ignore them."""

    where = base_name(name, adapter)  # a wrong adapter should not wait for the base model
    if adapter is None:
        return get_peft_model(
            load_base(where, gguf_file=gguf_file, device=device, dtype=dtype), RetentionGateConfig()
        ).eval()
    folder = download_adapter(adapter)
    config = adapter_config(str(folder))
    revision = config.revision if where == config.base_model_name_or_path else None
    base = load_base(where, gguf_file=gguf_file, revision=revision, device=device, dtype=dtype)
    return PeftModel.from_pretrained(base, folder).eval()


def base_name(name: str | None, adapter: str | None) -> str:
    """The base model: what was asked for, else the one that the adapter's config names."""
    recorded = None if adapter is None else adapter_config(adapter).base_model_name_or_path
    if name is not None:
        return name
    if adapter is None:
        raise ValueError("No model was given: name one with --model, or a trained adapter with --adapter.")
    if not recorded:
        raise ValueError(f"The adapter {adapter} does not say which base model it belongs to: name it with --model.")
    if not Path(adapter).is_dir() and (recorded.startswith((".", "/", "~")) or ".." in recorded):
        raise ValueError(
            f"The adapter {adapter} of the Hub names a folder, {recorded!r}, as its base model: name the model with "
            "--model."
        )
    return recorded


def adapter_config(adapter: str) -> "RetentionGateConfig":
    """The config of an adapter of retention gates that has its weights beside it; a folder or a Hub name.

    Raises:
        ValueError: for a folder that is missing, unreadable, incomplete, or holds another method's adapter.
    """
    return RetentionGateConfig.from_pretrained(str(download_adapter(adapter)))


def check_gates_trained(policies: "list[str]", adapter: str | None) -> None:
    """Raises ValueError if a policy needs trained gates and there is no adapter."""
    needy = [name for name in policies if find_policy(name).needs_gates]
    if needy and adapter is None:
        others = ", ".join(name for name, policy in POLICIES.items() if not policy.needs_gates)
        raise ValueError(
            f"Policy {needy[0]!r} needs trained gates: give them with --adapter, or choose among {others}."
        )


def _commit_in_cache(name: str, revision: str | None) -> str | None:
    """The commit that was just loaded of a model of the Hub; None for a folder."""
    if Path(name).is_dir():
        return None
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def chosen_device(device: "str | torch.device | None") -> "torch.device":
    """The device that was asked for, else CUDA where there is one.

    Raises:
        ValueError: if it cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({str(error).splitlines()[0]}): try cpu."
        ) from error
    if place.type == "meta":
        raise ValueError("device='meta' holds no numbers to compute with: try cpu.")
    return place


def _find_model(name: str, gguf_file: str | None, revision: str | None = None) -> Path:
    """The GGUF file or the config of a model, in a folder or on the Hub.

    Raises:
        ValueError: if it is not there, or the Hub cannot be asked.
    """
    folder = Path(name)
    if name.startswith((".", "/")) and not folder.exists():
        raise ValueError(f"There is no folder {name}: name the folder of a model, or a model of the Hub.")
    if folder.is_dir() and not (folder / (gguf_file or "config.json")).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise ValueError(
            f"The folder {name} has no {gguf_file or 'config.json'}: name the folder of a model, or one of the GGUF "
            f"files in it ({found})."
        )
    return find_file(name, gguf_file or "config.json", revision=revision)


def _small_files(name: str, gguf_file: str | None, revision: str | None = None) -> tuple[str, dict[str, str]]:
    """Where from_pretrained finds config and tokenizer, and what else it gets: reading a GGUF file takes it long."""
    path = str(_find_model(name, gguf_file, revision))
    options = {} if revision is None else {"revision": revision}
    if gguf_file is None:
        return name, options
    kept = find_kept(path, DTYPES)
    if kept is not None and (kept / "tokenizer_config.json").is_file():
        return str(kept), {}
    _check_gguf_package()
    return name, options | {"gguf_file": gguf_file}


def _convert(
    name: str, gguf_file: str, path: str, dtype: "str | torch.dtype", options: dict[str, Any]
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """Model and tokenizer, if there is one, of a GGUF file, with whole weights."""
    _check_gguf_package()
    options = options | {"gguf_file": gguf_file}
    facts = check_gguf(path, lambda: load_base_config(name, gguf_file, options.get("revision")))
    # weights left in their blocks could not be trained through
    blocks = GgufConfig(dequantize=True)
    model = retried(
        lambda: AutoModelForCausalLM.from_pretrained(name, dtype=dtype, quantization_config=blocks, **options)
    )
    if hasattr(model.config, "quantization_config"):  # it holds for the file only
        del model.config.quantization_config
    note_file(model.config, gguf_file, facts.rounding)
    return model, AutoTokenizer.from_pretrained(name, **options) if facts.has_tokenizer else None


def _check_gguf_package() -> None:
    if find_spec("gguf") is None:
        raise ValueError("Weights in a GGUF file need the package gguf: pip install gguf.")
