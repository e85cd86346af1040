"""How a long prompt reaches a bounded cache through `generate`."""

from importlib.metadata import version

from packaging.version import Version
from transformers import PreTrainedConfig

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
