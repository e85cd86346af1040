"""The argument that carries a cache: its name depends on transformers' version and on the model family."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin

# transformers from 5.24 on, up to 5.23, and older families of any version
NAMES = ("cache", "past_key_values", "layer_past")


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among the named arguments of a model, `generate` or an attention module; None if none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def find_layer_cache(args: tuple, kwargs: Mapping[str, Any]) -> Cache | None:
    """Returns the cache that an attention module is called with, or None without one.

    Raises:
        ValueError: if a cache, or a layer of one, is among the arguments where this package does not look for it. The
            module would then be taken for one without a cache, and its attention would decay as in training.
    """
    cache = find_cache(kwargs)
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"An attention module with retention gates got a {type(cache).__name__} as its cache, and gates work with "
            "transformers' Cache classes only: pass past_key_values=BoundedCache(model, memory_size=...)."
        )
    for name, value in _each(args, kwargs):
        if isinstance(value, Cache | CacheLayerMixin) and value is not cache:
            raise ValueError(
                f"An attention module with retention gates got a {type(value).__name__} as {name}, where no cache is "
                f"expected (known names: {', '.join(NAMES)}). This version of transformers hands its caches over in a "
                "way that this version of retention-gates does not know: install a transformers that it was tested "
                "with, or run the base model under model.disable_adapter()."
            )
    return cache


def _each(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments with a name for each; those inside of tuples, lists and dicts too."""
    named = [(f"positional argument {index + 2}", value) for index, value in enumerate(args)]
    for name, value in [*named, *((f"argument {name!r}", value) for name, value in kwargs.items())]:
        yield name, value
        if isinstance(value, dict):
            yield from ((f"{name}, entry {key!r}", inner) for key, inner in value.items())
        elif isinstance(value, tuple | list):
            yield from ((f"{name}, entry {index}", inner) for index, inner in enumerate(value))


def named_for(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with the cache under the name that the function has for it.

    Callers may use the name of another version of transformers, which translates it, with a warning at every call.
    A function that takes any name gets the one that transformers has now.

    Raises:
        ValueError: if a cache is given under two names.
    """
    given = [name for name in NAMES if name in arguments]
    if not given:
        return arguments
    if len(given) > 1:
        raise ValueError(f"A cache is given twice, as {' and as '.join(given)}: pass it once.")
    plain = inspect.unwrap(function)  # what wraps it may keep a model alive, and has no parameters of its own
    wanted = _name_in(getattr(plain, "__func__", plain))
    return {(wanted if name == given[0] else name): value for name, value in arguments.items()}


@lru_cache
def _name_in(function: Callable[..., Any]) -> str:
    for each in (function, GenerationMixin.prepare_inputs_for_generation):  # the second has transformers' own name
        parameters = inspect.signature(each).parameters
        if name := next((name for name in NAMES if name in parameters), None):
            return name
    raise AssertionError("no known name for a cache")
