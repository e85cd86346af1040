"""The cache of fixed size: `BoundedCache`, its layers, budgets and files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retention_gates.gates.cache.bounded_cache import BoundedCache

__all__ = ["BoundedCache"]


def __getattr__(name: str) -> Any:  # imported late: the cache imports the decoding step, which imports its layers
    if name == "BoundedCache":
        from retention_gates.gates.cache.bounded_cache import BoundedCache

        return BoundedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
