"""Sends a run's progress elsewhere: JSON lines, a Prometheus endpoint, an experiment tracker.

    output.log = "json"            one JSON object an event, on standard output
    output.metrics-port = 9109     http://127.0.0.1:9109/metrics while the run lasts
    output.tracker = "tensorboard" through accelerate.tracking, in the run's directory

Each is an observer beside the one that a person reads. None is ever the reason that a run stops:
what goes wrong in one is noted once, and that one is left out.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import ConfigError
from fedlora.reports.console import Observer, Silent, Together

if TYPE_CHECKING:
    from fedlora.config.reader import Config


@contextmanager
def watched(observer: Observer, config: "Config", directory: Path) -> Iterator[Observer]:
    """The observer, and those that the config's output section asks for.

    Raises:
        ConfigError: the port is taken, or the tracker is not installed.
    """
    out = config.output
    with ExitStack() as stack:
        more: list[Observer] = []
        if out.log == "json":
            more.append(JsonLines())
        if out.metrics_port:
            more.append(stack.enter_context(metrics(out.metrics_port)))
        if out.tracker != "none":
            more.append(stack.enter_context(tracker(out.tracker, config, directory)))
        yield All(observer, more) if more else observer


class All(Together):
    """Tells several. The first is the caller's own; a failure of another costs that one alone."""

    def __init__(self, first: Observer, more: list[Observer]) -> None:
        self.first, self.more = first, more

    def _tell(self, what: str, *args: Any) -> None:
        getattr(self.first, what)(*args)
        for other in list(self.more):
            try:
                getattr(other, what)(*args)
            except Exception as e:  # a tracker's server that is away, say
                self.more.remove(other)
                self.first.note(f"{type(other).__name__} is left out from here on: {e}")


class JsonLines:
    """{"time": ..., "event": "round_done", ...} a line."""

    def __init__(self, write: Callable[[str], Any] = print) -> None:
        self.write = write

    def _say(self, event: str, **what: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.write(json.dumps(plain({"time": now, "event": event, **what})))

    def baseline(self, name: str, metrics: Mapping[str, Any]) -> None:
        self._say("baseline", name=name, metrics=metrics)

    def round_started(self, number: int, cohort: list[int]) -> None:
        self._say("round_started", round=number, cohort=cohort)

    def client_done(self, client: int, metrics: Mapping[str, Any]) -> None:
        self._say("client_done", client=client, metrics=metrics)

    def client_failed(self, client: int | None, reason: str) -> None:
        self._say("client_failed", client=client, reason=reason)

    def round_done(self, record: Mapping[str, Any]) -> None:
        self._say("round_done", **{k: v for k, v in record.items() if k not in ("time", "clients")})

    def note(self, text: str) -> None:
        self._say("note", text=text)


def plain(x: Any) -> Any:
    """JSON without NaN: a number that is none is null."""
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, list | tuple | set | frozenset) else x


def problems(config: "Config") -> Iterator[str]:
    """What the config's observers lack on this machine: a free port, an installed tracker."""
    if port := config.output.metrics_port:
        try:
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.bind(("127.0.0.1", port))
        except OSError as e:
            yield _taken(port, e)
    if config.output.tracker != "none":
        yield from _not_installed(config.output.tracker)


def _taken(port: int, error: OSError) -> str:
    return f"output.metrics-port = {port}: {error.strerror}; choose another"


def _not_installed(name: str) -> Iterator[str]:
    from accelerate.tracking import get_available_trackers

    if name not in {str(t.value) for t in get_available_trackers()}:
        yield f"output.tracker = {name!r}: is not installed; install it, or choose another"


@contextmanager
def metrics(port: int) -> Iterator[Observer]:
    """Serve the run's figures to Prometheus, on loopback, until the end of the block."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as e:
        raise ConfigError([_taken(port, e)]) from None
    try:
        yield Figures(registry)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Figures(Silent):
    def __init__(self, registry: Any) -> None:
        from prometheus_client import Counter, Gauge

        def gauge(name: str, about: str, *labels: str) -> Any:
            return Gauge(f"fedlora_{name}", about, labels, registry=registry)

        def counter(name: str, about: str, *labels: str) -> Any:
            return Counter(f"fedlora_{name}", about, labels, registry=registry)

        self.round = gauge("round", "The last finished round")
        self.cohort = gauge("cohort", "Clients asked this round")
        self.loss = gauge("train_loss", "Mean training loss of the last round")
        self.scores = gauge("evaluation", "Central evaluation", "metric")
        self.deviation = gauge("proof_deviation", "Deviation from the sum of the updates")
        self.certificate = gauge(
            "certificate", "Of the last round; absent where not certified", "figure"
        )
        self.seconds = gauge("round_seconds", "Where the last round's time went", "part")
        self.client = gauge("client_seconds", "A client's last round", "client")
        self.bytes = counter("bytes", "Serialised message contents", "direction")
        self.replies = counter("replies", "Replies accepted and lost", "client", "outcome")

    def round_started(self, number: int, cohort: list[int]) -> None:
        self.cohort.set(len(cohort))

    def client_done(self, client: int, metrics: Mapping[str, Any]) -> None:
        self.replies.labels(client, "accepted").inc()
        if metrics.get("seconds") is not None:
            self.client.labels(client).set(metrics["seconds"])

    def client_failed(self, client: int | None, reason: str) -> None:
        self.replies.labels(client, "failed").inc()

    def round_done(self, record: Mapping[str, Any]) -> None:
        self.round.set(record["round"])
        for name, value in numbers(record).items():
            kind, _, key = name.partition("/")
            if name == "train_loss":
                self.loss.set(value)
            elif kind == "evaluation":
                self.scores.labels(key).set(value)
            elif kind == "seconds":
                self.seconds.labels(key).set(value)
            elif kind == "bytes":
                self.bytes.labels(key).inc(value)
            elif name == "proof/deviation":
                self.deviation.set(value)
        self.certificate.clear()
        for name, value in certified(record).items():
            self.certificate.labels(name).set(value)


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """A round's figures by name, "evaluation/accuracy"; what is no finite number is left out."""
    found: dict[str, Any] = {"train_loss": record.get("train_loss")}
    for part in ("evaluation", "seconds", "bytes"):
        found |= {f"{part}/{k}": v for k, v in (record.get(part) or {}).items()}
    found["replies"] = len(record.get("accepted") or ())
    found["failures"] = len(record.get("failures") or ())
    found["proof/deviation"] = (record.get("proof") or {}).get("deviation")
    found |= {f"certificate/{k}": v for k, v in certified(record).items()}
    return {
        k: float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)
    }


def certified(record: Mapping[str, Any]) -> dict[str, float]:
    """A round's deviation and excesses by its certificate, where it has them; they may be inf."""
    found = record.get("certificate") or {}
    keys = ["deviation", "excess"] if found.get("layers") else []
    keys += ["start_excess"] if found.get("start") else []
    return {k: found[k] for k in keys if found.get(k) is not None}


@contextmanager
def tracker(name: str, config: "Config", directory: Path) -> Iterator[Observer]:
    """One of accelerate's trackers, with the config as its hyperparameters."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if found := list(_not_installed(name)):
        raise ConfigError(found)
    PartialState(cpu=True)
    cls = LOGGER_TYPE_TO_CLASS[name]
    try:
        if cls.requires_logging_directory:
            tracking = cls(config.run.name, logging_dir=str(directory / "tracker"))
        else:
            tracking = cls(config.run.name)
        tracking.start()
    except ImportError as e:
        problem = f"output.tracker = {name!r}: {e}; pip install what it needs, or choose another"
        raise ConfigError([problem]) from None
    tracking.store_init_configuration(config.flat())
    try:
        yield Tracked(tracking)
    finally:
        tracking.finish()


class Tracked(Silent):
    def __init__(self, tracking: Any) -> None:
        self.tracking = tracking

    def round_done(self, record: Mapping[str, Any]) -> None:
        self.tracking.log(numbers(record), step=record["round"])
