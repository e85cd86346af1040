"""Checks of the arguments of a cache."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.cache.budgets import Budgets
from retention_gates.gates.policies import FeedbackPolicy, ScoredPolicy
from retention_gates.gates.policies.eviction_rule import EvictionRule, Reserve


def checked_budgets(budgets: Any, layers: int, heads: int, memory_size: int, least: int) -> Budgets:
    entries = [entry for row in budgets for entry in row]
    sizes = [len(row) for row in budgets]
    if sizes != [heads] * layers or not all(isinstance(entry, int) and entry >= least for entry in entries):
        raise ValueError(
            f"budgets={budgets!r} must be integers of at least {least}, [{layers} gated layers][{heads} KV heads]."
        )
    if sum(entries) != memory_size * len(entries):
        raise ValueError(
            f"budgets have {sum(entries)} entries in all, which must be memory_size={memory_size} for each of the "
            f"{len(entries)} heads: {memory_size * len(entries)}."
        )
    return [list(row) for row in budgets]


def check_heads(rule: EvictionRule) -> None:
    """Raises ValueError for budgets that the policy does not allow."""
    if rule.is_pooled and not isinstance(rule.policy, ScoredPolicy):
        raise ValueError(
            f'budgets="global" compares the entries of all layers by a score known ahead, and policy='
            f'{rule.policy.name!r} has none, or spans are reserved: choose budgets="uniform" or "adaptive".'
        )
    if not isinstance(rule.policy, FeedbackPolicy) or not rule.policy.same_for_all_heads:
        return
    if rule.is_shared or len(set(rule.budgets)) > 1:
        budgets = "budgets that they share" if rule.is_shared else f"budgets of {list(rule.budgets)} entries"
        raise ValueError(
            f"policy={rule.policy.name!r} evicts the same tokens in all heads of a layer, and those of layer "
            f'{rule.layer} have {budgets}: choose budgets="uniform", or equal ones within each layer.'
        )


def checked_reserves(reserved: Sequence[Reserve]) -> tuple[Reserve, ...]:
    for one in reserved:
        if not isinstance(one, tuple | list) or len(one) != 3:
            raise ValueError(f"reserved={list(reserved)!r} must be (start, stop, entries), one for each span.")
        start, stop, entries = one
        check_integer("reserved start", start, least=0)
        check_integer("reserved stop", stop, least=start + 1)
        check_integer("reserved entries", entries, least=1)
    return tuple((start, stop, entries) for start, stop, entries in reserved)


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most):
        return
    limit = "" if most is None else f" and at most {most}"
    raise ValueError(f"{name}={value!r} must be an integer of at least {least}{limit}, as a Python int.")


def why_rows_stay(layers: Sequence[Any]) -> str | None:
    """Why a row cannot be taken out of a cache with these layers and go on in another; None if it can."""
    reasons = (
        layer.why_rows_stay if isinstance(layer, EvictingLayer) else f"a {type(layer).__name__} is not gated"
        for layer in layers
    )
    return next((reason for reason in reasons if reason is not None), None)


def check_rows(
    layers: Sequence[Any], other_layers: Sequence[Any], rows: Sequence[int], other_rows: Sequence[int]
) -> None:
    """Raises ValueError unless these rows of one cache's layers can go on in those of another."""
    if (reason := why_rows_stay(layers) or why_rows_stay(other_layers)) is not None:
        raise ValueError(
            f"copy_row takes rows of gated layers with budgets of each layer, in 16 or 32 bits: {reason}."
        )
    if len(rows) != len(other_rows) or len(set(rows)) != len(rows):
        raise ValueError(f"rows={list(rows)} must be different ones, one for each of other_rows={list(other_rows)}.")
    for layer, source in zip(layers, other_layers, strict=True):
        if layer.rule != source.rule or layer.owner() is not source.owner():
            raise ValueError("copy_row wants two caches of one model, made and pinned in the same way.")
        for name, wanted, cache_layer in (("row", rows, layer), ("other_row", other_rows, source)):
            there = cache_layer.batch_size if cache_layer.is_initialized else 0
            for index in wanted:
                if not 0 <= index < there:
                    raise ValueError(f"{name}={index} must be one of the cache's {there} rows, from 0.")
        if layer.columns != source.columns and (reason := layer.why_rows_keep_columns) is not None:
            raise ValueError(
                f"The caches have read {layer.columns} and {source.columns} columns, and {reason}: let the other one "
                "begin_at a column so that both have read equally many when the row is copied."
            )


def row_bytes(model: nn.Module, slots: int) -> int:
    """Bytes of one row of a cache with so many entries, over all layers and heads, at least."""
    config, weight = text_config(model), next(model.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # key and value, and score, position and mark
    return slots * (2 * head_dim * weight.dtype.itemsize + 13)
