"""Retention gates as a PEFT tuner."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from retention_gates.compat import attention_implementation, set_attention_implementation
from retention_gates.gates.adapter.base_identity import check_same, identity, rounding, warn_if_another_base
from retention_gates.gates.adapter.checks import check_digest, check_state_dict, digest
from retention_gates.gates.adapter.config import PEFT_TYPE, RetentionGateConfig
from retention_gates.gates.adapter.families import full_attention_layers, key_value_heads, module_pattern, text_config
from retention_gates.gates.adapter.gate import GATES, RetentionGate, gate_bytes
from retention_gates.gates.adapter.generate_arguments import (
    digest_of_text,
    evicting_cache_in,
    prepared,
    prompt_columns,
)
from retention_gates.gates.adapter.layer import RetentionGatedAttention
from retention_gates.gates.adapter.modes import evaluating, temporarily
from retention_gates.gates.adapter.peft_habits import GatesOnly, is_loading_files, refuse_injection
from retention_gates.gates.adapter.placement import check_placement, check_room, device_of
from retention_gates.gates.attention.cache_argument import named_for
from retention_gates.gates.attention.fading import Fading
from retention_gates.gates.attention.interface import PREFIX, base_implementation_of, gated_implementation
from retention_gates.gates.attention.sequence_parallel import RowGroup


class RetentionGateModel(BaseTuner):
    """The base model with a gate beside every chosen attention layer.

    While an adapter is enabled, the config names our attention implementation; with the gates off it names the base's,
    so that the base model runs as if nothing had been added.
    """

    prefix = "retention_gate"
    tuner_layer_cls = RetentionGatedAttention
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  as PEFT declares it
    _row_group: RowGroup | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        refuse_injection(peft_config)
        self._learning: list[nn.Parameter] = []  # those that learn when the gates are on again
        # a LoRA in the base's linear layers keeps its configs: PEFT would mix them with ours, by name
        beside = model.__dict__.get("peft_config", {})
        if beside and not any(isinstance(config, RetentionGateConfig) for config in beside.values()):
            del model.peft_config
        else:
            beside = {}
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        finally:
            if beside:
                model.peft_config = beside

    @property
    def gated_layers(self) -> list[RetentionGatedAttention]:
        """The wrapped attention modules that have a gate in the active adapter, by layer index."""
        active = [m for m in self._wrappers if any(name in m.retention_gate for name in self.active_adapters)]
        return sorted(active, key=lambda layer: layer.base_layer.layer_idx)

    @property
    def active_config(self) -> RetentionGateConfig:
        """The config of the one active adapter."""
        if len(self.active_adapters) != 1:
            raise ValueError(f"{len(self.active_adapters)} adapters are active, not one: model.set_adapter(name).")
        return cast(RetentionGateConfig, self.peft_config[self.active_adapters[0]])

    def forward(self, *args: Any, last_hidden_state_only: bool = False, **kwargs: Any) -> Any:
        """As the base model's forward; `last_hidden_state_only` gives what lm_head would get, [B, T, C], instead."""
        called = self.model
        if (cache := evicting_cache_in(kwargs)) is not None:
            self._check_cache_stays()
            cache.text_digest = None
            kwargs = {"use_cache": True} | kwargs
        if last_hidden_state_only:
            called = called.get_decoder()
            kwargs = {
                k: value for k, value in kwargs.items() if k not in ("labels", "return_dict") and value is not None
            }
        output = called(*args, **named_for(called.forward, kwargs))
        return output[0] if last_hidden_state_only else output

    @contextmanager
    def rows_split_over(self, group: RowGroup | None) -> Iterator[None]:
        """Inside the block every rank of the group calls with its part of the same rows, None: with whole rows.

        Gates see their rank's tokens; attention and what is recorded are of whole rows, with the gates off as well.
        position_ids are needed: where a part begins can be seen from them only.
        """
        before = self._row_group
        if group is before:
            yield
            return
        try:
            self._split(group)
            yield
        finally:
            self._split(before)

    def fading_as(self, fading: Fading) -> AbstractContextManager[None]:
        """Inside the block, backward passes included, keys fade so where gates are trained."""
        return temporarily(self._wrappers, fading=fading)

    def _split(self, group: RowGroup | None) -> None:
        self._row_group = group
        for layer in self._wrappers:
            layer.row_group = group
        self._follow_state()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's generate; refuses what cannot work with a cache that forgets.

        With a bounded cache a prompt of more than 32,768 tokens is read in chunks of 4,096, each attending to what is
        kept and to itself, so that memory does not grow with the prompt. `prefill_chunk_size` decides otherwise.
        """
        kwargs = prepared(self.model, args, kwargs, gates_on=self._gates_on)
        if (cache := evicting_cache_in(kwargs)) is None:
            return self.model.generate(*args, **kwargs)
        step = getattr(cache, "decode_step", None)
        cache.text_digest = None  # unknown until the text is read
        steps = nullcontext() if step is None else step.in_generate(self.model, cache, prompt_columns(args, kwargs))
        with evaluating(self.model), steps:
            output = self.model.generate(*args, **kwargs)
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        if kwargs.get("inputs_embeds") is None and len(ids) == cache.gated_layers[0].batch_size:
            cache.text_digest = digest_of_text(ids, int(cache.get_seq_length()))
        return output

    def _check_cache_stays(self) -> None:
        """Raises ValueError where transformers' layers would drop the cache that they are called with."""
        if self.model.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "The model is in training mode with gradient checkpointing, in which transformers drops the cache, so "
                "that a BoundedCache would read nothing: call model.eval() first, or leave past_key_values out."
            )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's, with the gates off."""
        self._refuse_continuous_batching()
        return self.model.generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's, with the gates off."""
        self._refuse_continuous_batching()
        return self.model.init_continuous_batching(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's, with the gates off."""
        self._refuse_continuous_batching()
        return self.model.continuous_batching_context_manager(*args, **kwargs)

    def _refuse_continuous_batching(self) -> None:
        if self._gates_on:
            raise ValueError(
                "Continuous batching keeps a paged cache of its own, from which the gates cannot evict. Call "
                "model.generate(..., past_key_values=BoundedCache(model, memory_size=...)), or batch under "
                "model.disable_adapter()."
            )

    # ---- what PEFT calls while adapters come and go ----

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # the modules are found in _prepare_model, from the model itself

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, RetentionGateConfig)
        check_placement(model, loads_weights=peft_config.awaits_weights)
        full = full_attention_layers(model)
        config = text_config(model)
        wanted = peft_config.gated_layers if peft_config.gated_layers is not None else peft_config.layers_to_transform
        missing = sorted(set(wanted or ()) - set(full))
        if missing:
            raise ValueError(
                f"Layers {missing} of {type(model).__name__} cannot have a gate: its full-attention layers are "
                f"{list(full)}. Choose among them, or the base model the adapter was made for."
            )
        chosen = sorted(set(wanted)) if wanted is not None else list(full)
        if not chosen:
            raise ValueError("layers_to_transform=[] leaves no layer to gate: leave it out to gate all.")
        facts = {
            "gated_layers": chosen,
            "hidden_size": config.hidden_size,
            "num_key_value_heads": key_value_heads(config),
            "target_modules": module_pattern({layer: full[layer] for layer in chosen}),
        }
        if peft_config.gated_layers is not None and peft_config.layers_to_transform is None:
            check_same("gated_layers", peft_config.gated_layers, list(full))
        for name, fact in facts.items():
            if getattr(peft_config, name) is not None:
                check_same(name, getattr(peft_config, name), fact)
            setattr(peft_config, name, fact)
        shares = peft_config.budget_shares
        if shares is not None and [len(row) for row in shares] != [facts["num_key_value_heads"]] * len(chosen):
            raise ValueError(
                f"budget_shares must be [{len(chosen)} gated layers][{facts['num_key_value_heads']} KV heads], not "
                f"{[len(row) for row in shares]} heads in {len(shares)} layers: take them out of adapter_config.json "
                "and run retention-gates calibrate."
            )
        room = partial(gate_bytes, peft_config)
        check_room("gate_width", peft_config.gate_width, room, device_of(model), f"for gates in {len(chosen)} layers")
        if peft_config.awaits_weights:
            warn_if_another_base(peft_config, model)
            return
        peft_config.revision = peft_config.revision or identity(model)[1]
        peft_config.base_rounding = peft_config.base_rounding or rounding(model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, RetentionGateConfig)
        assert peft_config.hidden_size is not None and peft_config.num_key_value_heads is not None
        sizes = (peft_config.hidden_size, peft_config.num_key_value_heads)
        if isinstance(target, RetentionGatedAttention):
            target.update_layer(adapter_name, peft_config, *sizes)
            self._share_modules(adapter_name, target)
            return
        layer = self._wrapper(target)
        layer.update_layer(adapter_name, peft_config, *sizes)
        self._share_modules(adapter_name, layer)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _share_modules(self, adapter_name: str, layer: RetentionGatedAttention) -> None:
        """Gives a new gate the modules that it has in common with the first gate of its adapter."""
        gate = cast(RetentionGate, layer.retention_gate[adapter_name])
        if gate.shared:
            gates = (
                other.retention_gate[adapter_name] for other in self._wrappers if adapter_name in other.retention_gate
            )
            first = next(gates, gate)
            for name in gate.shared:
                setattr(gate, name, getattr(first, name))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own version wants a weight on the wrapped module
        if isinstance(child, RetentionGatedAttention):
            self._name_implementation(gated=False)  # unload: the base's attention again

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        learning = list(self._learning)
        super().inject_adapter(model, *args, **kwargs)  # which chooses the active adapter once more
        self._learning = learning
        # full-attention layers without a gate are wrapped too: they need their mask back (attention/interface.py)
        for name in full_attention_layers(model).values():
            if not isinstance(module := model.get_submodule(name), RetentionGatedAttention):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, self._wrapper(module))
        self._follow_state()

    def _wrapper(self, attention: nn.Module) -> RetentionGatedAttention:
        layer = RetentionGatedAttention(attention)
        layer.follow(self.active_adapter, enabled=not any(other.disable_adapters for other in self._wrappers))
        return layer

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Turns gates on or off, but no LoRA in the base, as PEFT would; gates that are frozen stay frozen."""
        for layer in self._wrappers:
            layer.enable_adapters(enabled)
        gates = nn.ModuleList(layer.retention_gate for layer in self._wrappers)
        if not enabled:
            self._learning += [p for p in gates.parameters() if p.requires_grad]  # once each, if layers share it
        for parameter in self._learning:
            parameter.requires_grad_(enabled)
        if enabled:
            self._learning.clear()
        self._follow_state()

    def unload(self) -> nn.Module:
        """The base model without gates; a LoRA in it stays."""
        for name, layer in [(n, m) for n, m in self.model.named_modules() if isinstance(m, RetentionGatedAttention)]:
            parent, _, child = name.rpartition(".")
            self._replace_module(self.model.get_submodule(parent), child, layer.base_layer, layer)
        if self.model.__dict__.get("peft_config") is self.peft_config:
            del self.model.peft_config
        return self.model

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return GatesOnly({key: tensor for key, tensor in found.items() if f".{cls.prefix}." in key})  # not a LoRA's

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._learning.clear()  # it has said which parameters learn
        self._follow_state()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._follow_state()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "Gates are no change of the base's weights and cannot be merged: model.unload() removes them."
        )

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise ValueError(
            "Gates are no change of the base's weights and cannot be merged: model.unload() removes them."
        )

    @property
    def _wrappers(self) -> list[RetentionGatedAttention]:
        return [module for module in self.model.modules() if isinstance(module, RetentionGatedAttention)]

    @property
    def _gates_on(self) -> bool:
        return (attention_implementation(text_config(self.model)) or "").startswith(PREFIX)

    def _follow_state(self) -> None:
        disabled = any(layer.disable_adapters for layer in self._wrappers)
        split = self._row_group is not None  # the base's own attention could not exchange what it needs
        self._name_implementation(gated=split or (bool(self.active_adapters) and not disabled))

    def _name_implementation(self, *, gated: bool) -> None:
        """Lets the configs name our attention implementation or the base's."""
        configs = [text_config(self.model), *(layer.base_layer.config for layer in self._wrappers)]
        for config in {id(config): config for config in configs}.values():
            current = attention_implementation(config) or ""
            if gated and not current.startswith(PREFIX):
                set_attention_implementation(config, gated_implementation(current or None))
            elif not gated and current.startswith(PREFIX):
                set_attention_implementation(config, base_implementation_of(current))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own version expects the adapter's name right before the parameter; a gate has layers in between
        return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        assert isinstance(config, RetentionGateConfig)
        if config.has_loaded_weights and config.inference_mode and is_loading_files():
            raise ValueError(
                f"An adapter called {adapter_name!r} is loaded already, and would be overwritten: give the other one "
                f"another adapter_name, or call model.delete_adapter({adapter_name!r}) first."
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            check_state_dict(
                f".{cls.prefix}.{adapter_name}.", model.state_dict(), remapped, GATES[config.gate_type].shared
            )
            if config.awaits_weights:
                check_digest(digest(sorted(state_dict.items()), asdict(config)), asdict(config))
        except ValueError:
            if config.awaits_weights:  # gates made for these weights would stay behind, untrained
                find_gated_model(model).withdraw(adapter_name)
            raise
        config.awaits_weights, config.has_loaded_weights = False, True
        return {key: tensor.float() for key, tensor in remapped.items()}  # stored in 16 bits, they are 32 here

    def withdraw(self, adapter_name: str) -> None:
        """Takes out an adapter whose weights could not be loaded; without another one, the base is as it was."""
        self.delete_adapter(adapter_name)
        if not self.peft_config:
            self.unload()


def find_gated_model(model: nn.Module) -> RetentionGateModel:
    """The RetentionGateModel inside a PeftModel, or inside what wraps one.

    Raises:
        ValueError: if there are no retention gates.
    """
    for module in model.modules():
        if isinstance(module, RetentionGateModel):
            return module
    raise ValueError(
        f"{type(model).__name__} has no retention gates: PeftModel.from_pretrained(base, adapter) loads trained ones, "
        "get_peft_model(base, RetentionGateConfig()) adds untrained ones (enough for policies that need none)."
    )


# plain strings: PEFT's own enumeration of methods is closed
cast(dict, PEFT_TYPE_TO_CONFIG_MAPPING)[PEFT_TYPE] = RetentionGateConfig
cast(dict, PEFT_TYPE_TO_TUNER_MAPPING)[PEFT_TYPE] = RetentionGateModel
cast(dict, PEFT_TYPE_TO_PREFIX_MAPPING)[PEFT_TYPE] = RetentionGateModel.prefix
