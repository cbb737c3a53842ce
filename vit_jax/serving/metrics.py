"""Counts and times of a server, in Prometheus's format."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one server, with memory and CPU time of its process.

    Args:
        routes: the paths that are told apart; all others are "other".
    """

    def __init__(self, routes: frozenset[str]):
        self._routes = routes
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "vit_jax_requests",
            "Requests by path and status; 499: the client left, 0: no answer",
            ["path", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "vit_jax_request_seconds",
            "From the head of a request to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._images = Histogram(
            "vit_jax_batch_images",
            "Images that the model ran at once",
            buckets=_SIZES,
            registry=registry,
        )
        self._model = Histogram(
            "vit_jax_model_seconds",
            "Of the model for a batch",
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_work = Gauge(
            "vit_jax_images_in_work",
            "Images that are decoded, wait or are run",
            registry=registry,
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        route = path if path in self._routes else "other"
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def ran(self, images: int, seconds: float) -> None:
        """Counts a batch of the model."""
        self._images.observe(images)
        self._model.observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
