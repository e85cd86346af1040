"""Checks the arguments of `generate`: requests that a bounded cache cannot serve, and chunks of long prompts."""

import hashlib
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from transformers import PreTrainedConfig

from retention_gates.gates.adapter.families import text_config
from retention_gates.gates.adapter.placement import check_weights_are_there
from retention_gates.gates.attention.cache_argument import find_cache, named_for
from retention_gates.gates.attention.cache_layer import EvictingLayer
from retention_gates.gates.policies.eviction_rule import MOST_TOKENS

ROLLS_BACK = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt-lookup decoding",
    "assistant_early_exit": "self-speculative decoding",
    "use_mtp": "multi-token prediction",
}

LONG_PROMPT, CHUNK = 32_768, 4096  # tokens: a longer prompt is read so many at a time, unless the caller says
DROPS_CACHE = ("phi3", "phi4_multimodal")  # whose generate forgets the cache where RoPE changes its frequencies


CHUNKS_LATER_TURNS = Version("5.23")  # of transformers; older ones read what the cache has read once more


def chunk_size(given: int | None, tokens: int, seen: int) -> int | None:
    """Tokens to read at a time, or None to read all at once.

    Args:
        given: the caller's choice, or None.
        tokens: of the prompt, without what the cache has seen.
        seen: tokens that the cache has read before.

    Raises:
        ValueError: where transformers' generate would read the seen tokens again.
    """
    size = CHUNK if given is None and tokens > LONG_PROMPT else given
    installed = Version(version("transformers"))
    if size is not None and seen and installed < CHUNKS_LATER_TURNS:
        raise ValueError(
            f"The cache has read {seen} tokens and a further {tokens} are to be read {size} at a time, which "
            f"transformers {installed} can do with an empty cache only: install transformers>={CHUNKS_LATER_TURNS}, "
            f"or read them before with model(input_ids=..., past_key_values=cache), at most {LONG_PROMPT} at once."
        )
    return size


def refuse_dropped_cache(config: PreTrainedConfig, tokens: int) -> None:
    """Raises ValueError if the model's generate would drop the cache on the way to so many tokens."""
    limit = getattr(config, "original_max_position_embeddings", None)
    if config.model_type in DROPS_CACHE and limit is not None and tokens > limit:
        raise ValueError(
            f"{tokens} tokens, prompt and new ones, pass {limit}, where generate of {config.model_type} models drops "
            "the cache to read the text again; a bounded cache has evicted it. Generate fewer, or call "
            "model(input_ids=..., past_key_values=cache) in a loop of your own."
        )


def evicting_cache_in(arguments: dict[str, Any]) -> Any:
    """Returns the cache among the arguments if it is one that evicts, else None."""
    cache = find_cache(arguments)
    return cache if any(isinstance(layer, EvictingLayer) for layer in getattr(cache, "layers", ())) else None


def prepared(model: Any, args: tuple, kwargs: dict[str, Any], *, gates_on: bool) -> dict[str, Any]:
    """The named arguments of the base model's `generate`, with the prompt's chunks chosen.

    Raises:
        ValueError: for what cannot work with a cache that evicts.
    """
    check_weights_are_there(model)
    configs = [kwargs.get("generation_config", *args[1:2]), model.generation_config]  # its second argument

    def option(name: str) -> Any:
        given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    # "hybrid", which older Hub models have as their default, is what transformers itself takes for None
    if option("cache_implementation") not in (None, "hybrid") and gates_on:
        raise ValueError(
            f"cache_implementation={option('cache_implementation')!r} makes a cache that evicts nothing. Leave it out "
            "(of model.generation_config too) and pass past_key_values=BoundedCache(model, memory_size=...), or "
            "generate under model.disable_adapter()."
        )
    kwargs = named_for(model.generate, kwargs)
    if (cache := evicting_cache_in(kwargs)) is None:
        return kwargs
    for name, what in ROLLS_BACK.items():
        if option(name) not in (None, False):
            raise ValueError(
                f"{name} means {what}, which rolls the cache back; a bounded cache has overwritten what was. Leave "
                f"{name} out, or generate without a BoundedCache under model.disable_adapter()."
            )
    if option("use_cache") is False:
        if kwargs.get("use_cache") is False:
            raise ValueError(
                "use_cache=False with a BoundedCache: without its cache the model would read the whole text at every "
                "token. Leave use_cache out, or leave past_key_values out."
            )
        kwargs = kwargs | {"use_cache": True}  # a generation_config.json that a trainer has written says False
    prompt = kwargs.get("input_ids", kwargs.get("inputs", next(iter(args), None)))
    if not isinstance(prompt, torch.Tensor):
        return kwargs
    new = option("max_new_tokens") or max((option("max_length") or 0) - prompt.shape[1], 20)
    refuse_dropped_cache(text_config(model), prompt.shape[1] + new)
    seen, mask = int(cache.get_seq_length()), kwargs.get("attention_mask")
    holds_all = mask is None or mask.shape[1] == prompt.shape[1]  # as transformers tells it
    if seen:
        check_later_turn(cache, prompt, mask, seen)
    unread = prompt.shape[1] - (seen if holds_all else 0)
    if seen + unread + new > MOST_TOKENS:
        raise ValueError(
            f"max_new_tokens={new} after {seen + unread} tokens would pass {MOST_TOKENS:,}, as many as a sequence in "
            f"a bounded cache may have: ask for at most {max(0, MOST_TOKENS - seen - unread):,}."
        )
    return kwargs | {"prefill_chunk_size": chunk_size(option("prefill_chunk_size"), unread, seen)}


def check_later_turn(cache: Any, ids: torch.Tensor, mask: torch.Tensor | None, seen: int) -> None:
    """Raises ValueError unless ids [B, T] and mask go on where a cache that has read `seen` tokens stands.

    transformers takes ids for the whole text, of which the cache has read the beginning, where the mask is no longer
    than the ids or missing; with a mask of all columns they are the new tokens only.
    """
    tokens, columns = ids.shape[1], ids.shape[1] if mask is None else mask.shape[1]
    new_only = (
        f"for {tokens} new tokens after the {seen} that the cache has read, pass attention_mask [B, {seen + tokens}], "
        "ones for both"
    )
    if columns == seen + tokens:
        return
    if columns != tokens:
        raise ValueError(
            f"attention_mask has {columns} columns, the cache has read {seen} tokens and input_ids has {tokens}: "
            f"{new_only}; for the whole text, one column for each of its ids."
        )
    if tokens <= seen:
        raise ValueError(
            f"input_ids has {tokens} tokens and its mask no more, so that it would be the whole text, of which the "
            f"cache has read {seen} already: {new_only}; or pass the whole text, what was read and generated included."
        )
    known = cache.text_digest
    if known is not None and known[0] == len(ids) and known != digest_of_text(ids, seen):
        raise ValueError(
            f"The first {seen} of {tokens} input_ids are not those that the cache has read, and would be skipped: "
            f"{new_only}; or pass the whole text as it was read and generated, or call cache.reset() to begin another."
        )


def digest_of_text(ids: torch.Tensor, tokens: int) -> tuple[int, str]:
    """Rows of ids [B, T] and a SHA-256 of the first `tokens` of each."""
    return len(ids), hashlib.sha256(ids[:, :tokens].contiguous().cpu().numpy().tobytes()).hexdigest()


def prompt_columns(args: tuple, kwargs: dict[str, Any]) -> int:
    """Columns of what `generate` is given: of ids, embeddings or mask, whichever is longest."""
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    return max((each.shape[1] for each in given if each is not None), default=1)
