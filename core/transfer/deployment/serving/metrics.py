"""Metrics of a server in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from transfer.deployment.serving.reading import Intake

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Waiting(Protocol):
    """An object with a number of waiting requests."""

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""


class Metrics:
    """Counters and histograms of one application."""

    def __init__(self) -> None:
        # Not the registry of the process: an application may be made twice, for example in tests.
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "transfer_requests", "Requests by route and status.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "transfer_request_seconds", "Time to answer a request.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self._batches = Histogram(
            "transfer_batch_size", "Requests in a batch.", ["model"], buckets=_SIZES, registry=self.registry
        )
        self._waiting = Gauge("transfer_waiting", "Requests that wait for a batch.", ["model"], registry=self.registry)
        self._version = Gauge(
            "transfer_model_info", "Version of a model.", ["model", "version"], registry=self.registry
        )
        self._body_bytes = Gauge(
            "transfer_body_bytes", "Size of the bodies of the requests in progress.", registry=self.registry
        )

    def record_request(self, path: str, status: int, seconds: float) -> None:
        """Record a request when it has been answered.

        Args:
            path: Path of the route, not the one of the request: clients could invent any number of them.
            status: Status of the response.
            seconds: Time to answer it.
        """
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def record_batch(self, model: str, size: int) -> None:
        """Record the size of a batch of a model."""
        self._batches.labels(model).observe(size)

    def record_version(self, model: str, version: str, previous: str | None = None) -> None:
        """Record the version of a model, in place of the previous one."""
        if previous is not None:
            self._version.remove(model, previous)
        self._version.labels(model, version).set(1)

    def watch(self, endpoints: Mapping[str, Waiting], intake: Intake) -> None:
        """Read the number of waiting requests and the size of their bodies whenever the metrics are requested."""
        for name, endpoint in endpoints.items():
            self._waiting.labels(name).set_function(partial(getattr, endpoint, "waiting"))
        self._body_bytes.set_function(partial(getattr, intake, "body_bytes"))

    def render(self) -> bytes:
        """Return the metrics as text."""
        return generate_latest(self.registry)
