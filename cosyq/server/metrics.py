"""What is counted and measured, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cosyq.server.speaker import Speech, Stats

SECONDS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
FACTORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0)
CANCELS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """Of one server; `stats` is asked when they are read."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, stats: Callable[[], Stats | None]):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "cosyq_requests", "Speech requests by outcome: ok, cut, rejected, cancelled, failed", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.characters = Counter("cosyq_input_characters", "Characters of accepted texts", registry=registry)
        self.audio = Counter("cosyq_audio_seconds", "Seconds of audio made", registry=registry)
        self.wait = Histogram("cosyq_queue_wait_seconds", "Arrival to begin", registry=registry, buckets=SECONDS)
        self.first_audio = Histogram(
            "cosyq_first_audio_seconds", "Arrival to first audio", registry=registry, buckets=SECONDS
        )
        self.factor = Histogram(
            "cosyq_real_time_factor", "Seconds of work a second of audio", registry=registry, buckets=FACTORS
        )
        self.cancel = Histogram(
            "cosyq_cancel_seconds",
            "Cancelling to the end of the work",
            registry=registry,
            buckets=CANCELS,
        )
        for name, text, read in (
            ("cosyq_queue_depth", "Requests that wait", lambda s: s.waiting),
            ("cosyq_active_requests", "Requests that are spoken", lambda s: s.active),
            ("cosyq_device_memory_bytes", "Held on the GPU", lambda s: s.memory_bytes),
        ):
            gauge = Gauge(name, text, registry=registry)
            gauge.set_function(lambda read=read: float(read(found)) if (found := stats()) else 0.0)  # type: ignore[misc]

    def released(self, speech: Speech) -> None:
        """An engine has let go of a request."""
        if speech.began and 0 < speech.cancelled_at < speech.ended:
            self.cancel.observe(speech.released_at - speech.cancelled_at)

    def text(self) -> bytes:
        return generate_latest(self._registry)
