"""How a long prompt reaches a bounded cache through `generate`."""

from transformers import PreTrainedConfig

LONG_PROMPT, CHUNK = 32_768, 4096  # tokens: a longer prompt is read so many at a time, unless the caller says
DROPS_CACHE = ("phi3", "phi4_multimodal")  # whose generate forgets the cache where RoPE changes its frequencies


def default_chunk(tokens: int) -> int | None:
    """Tokens of a prompt to read at a time, or None to read all of it at once."""
    return CHUNK if tokens > LONG_PROMPT else None


def refuse_dropped_cache(config: PreTrainedConfig, tokens: int) -> None:
    """Raises ValueError if the model's generate would drop the cache on the way to so many tokens."""
    limit = getattr(config, "original_max_position_embeddings", None)
    if config.model_type in DROPS_CACHE and limit is not None and tokens > limit:
        raise ValueError(
            f"{tokens} tokens, prompt and new ones, pass {limit}, where generate of {config.model_type} models drops "
            "the cache to read the text again; a bounded cache has evicted it. Generate fewer, or call "
            "model(input_ids=..., past_key_values=cache) in a loop of your own."
        )
