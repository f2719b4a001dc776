"""A warm worker's figures for Prometheus, on the node's own loopback.

    fedlora_worker_device{name="cuda:0 (NVIDIA H100 80GB HBM3)"}    1, once it has computed on one
    fedlora_worker_memory_bytes{state="used"}, {state="free"}       of that device, by all its users
    fedlora_worker_base_loaded                                      1 while it holds the base
    fedlora_worker_busy_seconds_total                               its rate is the utilisation
    fedlora_worker_messages_total{kind="train", outcome="answered"} or outcome="failed"

As many series from first to last: a device, two states, the kinds of message that there are.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fedlora.federation.client.dispatch import HANDLERS


class WorkerFigures:
    """What a worker has done so far, and what it has now."""

    def __init__(self) -> None:
        self.device: Any = None
        """What it computed on last."""
        self.loaded: Callable[[], object | None] = lambda: None
        """Gives the base, where it holds one."""
        self._busy = 0.0
        self._since: float | None = None
        self._messages: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within it, the worker is busy."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._busy += time.monotonic() - self._since
                self._since = None

    def answered(self, kind: str, failed: bool) -> None:
        """Count a message."""
        self._messages[kind, "failed" if failed else "answered"] += 1

    @property
    def busy(self) -> float:
        """Seconds of work, with those of what is under way."""
        with self._lock:
            return self._busy + (time.monotonic() - self._since if self._since else 0.0)

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks of a collector, at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if self.device is not None:
            from fedlora.training.devices import memory_of, name_of

            device = GaugeMetricFamily(
                "fedlora_worker_device", "What it computes on", labels=["name"]
            )
            device.add_metric([name_of(self.device)], 1)
            yield device
            has = memory_of(self.device)
            memory = GaugeMetricFamily(
                "fedlora_worker_memory_bytes", "Of that device, by all", labels=["state"]
            )
            memory.add_metric(["used"], has.total - has.free)
            memory.add_metric(["free"], has.free)
            yield memory
        held = self.loaded() is not None
        yield GaugeMetricFamily("fedlora_worker_base_loaded", "Holds the base", int(held))
        yield CounterMetricFamily("fedlora_worker_busy_seconds", "Seconds of work", self.busy)
        messages = CounterMetricFamily(
            "fedlora_worker_messages", "By kind", labels=["kind", "outcome"]
        )
        for kind in HANDLERS:
            for outcome in ("answered", "failed"):
                messages.add_metric([kind, outcome], self._messages[kind, outcome])
        yield messages


@contextmanager
def served(figures: WorkerFigures, port: int) -> Iterator[None]:
    """Within it, /metrics on this port of the loopback. A port that is taken costs this alone."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(figures)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as e:
        said = f"no figures on port {port}: {e.strerror}; choose another --metrics-port"
        print(said, file=sys.stderr, flush=True)
        yield
        return
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
