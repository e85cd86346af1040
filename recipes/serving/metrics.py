"""The engine's counts in the text form of Prometheus."""

from collections.abc import Iterator
from typing import Any

from retention_gates.recipes.serving.engine import Engine


class EngineCollector:
    """Reads the counts when somebody asks for them."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

        engine, counts = self.engine, self.engine.counts
        ended = CounterMetricFamily("retention_gates_chats", "Chats that ended, by how.", labels=["how"])
        for how, number in sorted(dict(counts.ended).items()):
            ended.add_metric([how], number)
        ended.add_metric(["refused"], counts.refused)
        yield ended
        tokens = CounterMetricFamily("retention_gates_tokens", "Tokens read and written.", labels=["kind"])
        tokens.add_metric(["prompt"], counts.prompt_tokens)
        tokens.add_metric(["completion"], counts.completion_tokens)
        yield tokens
        yield CounterMetricFamily("retention_gates_steps", "Decoding steps of all rows.", value=counts.steps)
        first = SummaryMetricFamily(
            "retention_gates_first_token_seconds",
            "From a request's arrival to its first token.",
            count_value=counts.first_tokens,
            sum_value=counts.first_token_seconds,
        )
        yield first
        gauges = {
            "chats_running": ("Chats that have a row.", engine.active),
            "chats_waiting": (
                "Chats that wait for one, those being read among them.",
                len(engine.waiting) + engine.arriving,
            ),
            "rows": ("Chats that can run at a time.", len(engine.running)),
            "cache_bytes": ("Held by the caches of all rows and of one prompt.", engine.rows.memory_bytes()),
            "row_bytes": ("Held by the cache of one row.", engine.rows.bytes_per_row),
        }
        for name, (help_line, value) in gauges.items():
            yield GaugeMetricFamily(f"retention_gates_{name}", help_line, value=value)


def metrics_text(engine: Engine) -> tuple[bytes, str]:
    """All metrics, and the content type that they have."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    ProcessCollector(registry=registry)  # processor time, resident memory
    return generate_latest(registry), CONTENT_TYPE_LATEST
