"""What a run says while it works: a live line on a terminal, one plain line a round elsewhere.

The server machinery calls an `Observer` and knows nothing of terminals. rich is imported when a
live display starts, so that worker processes and deployed nodes never pay for it.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from fedlora.reports.outcome import EXACT_MATCH, JUDGED_BY, PERPLEXITY
from fedlora.reports.units import clock, duration, number, size, tiny

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


class Observer(Protocol):
    """Told what happens in a run, as it happens. Its answers are never used.

    One of your own overrides the methods that it wants. An error that it raises stops the run, with
    a note of whose it is; the finished rounds are kept, and the run can be resumed.

    >>> from fedlora import Observer
    >>> class Losses(Observer):
    ...     def round_done(self, record):
    ...         print(record["round"], record["train_loss"])
    >>> Losses().round_done({"round": 1, "train_loss": 0.5})
    1 0.5
    """

    def baseline(self, name: str, metrics: Mapping[str, Any]) -> None: ...

    def round_started(self, number: int, cohort: list[int]) -> None: ...

    def client_done(self, client: int, metrics: Mapping[str, Any]) -> None: ...

    def client_failed(self, client: int | None, reason: str) -> None: ...

    def round_done(self, record: Mapping[str, Any]) -> None:
        """`record` is the round's line of rounds.jsonl."""

    def note(self, text: str) -> None: ...


class Silent:
    """An observer that says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def baseline(self, name: str, metrics: Mapping[str, Any]) -> None:
        pass

    def round_started(self, number: int, cohort: list[int]) -> None:
        pass

    def client_done(self, client: int, metrics: Mapping[str, Any]) -> None:
        pass

    def client_failed(self, client: int | None, reason: str) -> None:
        pass

    def round_done(self, record: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Together:
    """Tells several observers, in their order; the error of one has a note that names it."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def _tell(self, what: str, *args: Any) -> None:
        for x in self.observers:
            try:
                getattr(x, what)(*args)
            except Exception as e:
                e.add_note(f"the observer {type(x).__name__} raised this in {what}")
                raise

    def baseline(self, name: str, metrics: Mapping[str, Any]) -> None:
        self._tell("baseline", name, metrics)

    def round_started(self, number: int, cohort: list[int]) -> None:
        self._tell("round_started", number, cohort)

    def client_done(self, client: int, metrics: Mapping[str, Any]) -> None:
        self._tell("client_done", client, metrics)

    def client_failed(self, client: int | None, reason: str) -> None:
        self._tell("client_failed", client, reason)

    def round_done(self, record: Mapping[str, Any]) -> None:
        self._tell("round_done", record)

    def note(self, text: str) -> None:
        self._tell("note", text)


def together(observers: Sequence[Observer]) -> Observer:
    """One observer that tells these."""
    return observers[0] if len(observers) == 1 else Together(observers)


class Progress:
    """An observer that prints: a bar below the finished rounds on a terminal, else plain lines.

    Plain output has one line a round, failures included, and no control characters, whatever a
    client put into its reason for failing.
    """

    def __init__(
        self,
        rounds: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rounds = rounds
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started = self._round_started = clock()
        self._round = 0
        self._cohort = 0
        self._losses: list[float] = []
        self._answered = 0
        self._past: list[float] = []
        self._last: Mapping[str, Any] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live(console=console, get_renderable=self._bar, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    # -- what the server tells ------------------------------------------------------------------

    def baseline(self, name: str, metrics: Mapping[str, Any]) -> None:
        self._print(f"baseline  {name}: {_scores(metrics)}", "cyan")

    def round_started(self, number: int, cohort: list[int]) -> None:
        self._round, self._cohort = number, len(cohort)
        self._round_started = self._clock()
        self._losses, self._answered = [], 0

    def client_done(self, client: int, metrics: Mapping[str, Any]) -> None:
        self._answered += 1
        if (loss := metrics.get("train_loss")) is not None:
            self._losses.append(loss)

    def client_failed(self, client: int | None, reason: str) -> None:
        self._answered += 1
        if self._live:
            self._print(f"round {self._round}: {_failure(client, reason)}", "red")

    def round_done(self, record: Mapping[str, Any]) -> None:
        self._last, self._round = record, record["round"]
        self._cohort = self._answered = 0
        if self._round > 0:
            self._past.append((record.get("seconds") or {}).get("total") or 0.0)
        failures = [] if self._live else record.get("failures") or []
        told = [_failure(f.get("client"), f.get("reason", "")) for f in failures[:3]]
        told += [f"{len(failures) - 3} more failed"] if len(failures) > 3 else []
        self._print("; ".join([round_line(record, self._rounds), *told]))

    def note(self, text: str) -> None:
        self._print(shown(text), "dim")

    # -- how it is shown ------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """The rounds to come at the mean time of those finished here; None before the first."""
        if not self._past:
            return None
        each = sum(self._past) / len(self._past)
        running = self._clock() - self._round_started if self._cohort else 0.0
        to_come = self._rounds - self._round + (1 if self._cohort else 0)
        return max(each * to_come - min(running, each), 0.0)

    def _bar(self) -> "Table":
        """Drawn anew at every refresh, so that its clocks tick while nothing is reported."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        within = self._answered / self._cohort if self._cohort else 0.0
        finished = self._round - (1 if self._cohort else 0)
        left = self.seconds_left()
        parts = [f"round {self._round}/{self._rounds}"]
        parts += [f"clients {self._answered}/{self._cohort}"] if self._cohort else []
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        parts += [f"loss {number(loss)}"] if loss is not None else []
        parts += [scores] if (scores := _headline(self._last.get("evaluation"))) else []
        parts += [clock(self._clock() - self._started)]
        parts += [f"{clock(left)} left"] if left is not None else []
        bar = Table.grid(padding=(0, 1))
        bar.add_column(width=24)
        bar.add_column(no_wrap=True, overflow="ellipsis")
        bar.add_row(ProgressBar(self._rounds, finished + within), "  ".join(parts))
        return bar

    def _print(self, text: str, style: str | None = None) -> None:
        line = printable(text)
        if self._live:
            self._live.console.print(line, style=style, markup=False, soft_wrap=True)
        else:
            encoding = self._stream.encoding or "utf-8"
            line = line.encode(encoding, "backslashreplace").decode(encoding)
            print(line, file=self._stream, flush=True)


def round_line(record: Mapping[str, Any], rounds: int) -> str:
    """A finished round in one line: what it learned, who took part, what it cost."""
    parts = [f"round {record['round']:>{len(str(rounds))}}/{rounds}"]
    cohort = record.get("cohort")
    if cohort and record.get("train_loss") is not None:
        parts.append(f"train loss {number(record['train_loss'])}")
    if evaluation := record.get("evaluation"):
        parts.append(_scores(evaluation))
    if cohort:
        parts.append(f"clients {len(record.get('accepted') or ())}/{len(cohort)}")
        sent = record.get("bytes") or {}
        parts.append(f"down {size(sent.get('down'))}  up {size(sent.get('up'))}")
    if (proof := record.get("proof")) and proof.get("deviation") is not None:
        parts.append(f"deviation {tiny(proof['deviation'])}")
    parts.append(duration((record.get("seconds") or {}).get("total")))
    return "  ".join(parts)


def printable(text: str) -> str:
    """On one line and without control characters: a reason comes from another machine."""
    return "".join(c if c.isprintable() else " " for c in text.replace("\r\n", " "))


def shown(text: str) -> str:
    """Paths below the working directory made relative to it."""
    here = str(Path.cwd()).rstrip(os.sep)
    return re.sub(rf"(?<![\w./-]){re.escape(here + os.sep)}", "", text) if here else text


def _failure(client: int | None, reason: str) -> str:
    who = "a node" if client is None else f"client {client}"
    why = " ".join(printable(shown(reason)).split())
    return f"{who} failed: {why if len(why) <= 200 else why[:197] + '...'}"


def _scores(metrics: Mapping[str, Any]) -> str:
    parts = [f"test loss {number(metrics['loss'])}"] if metrics.get("loss") is not None else []
    return "  ".join(parts + ([told] if (told := _headline(metrics)) else []))


def _headline(metrics: Mapping[str, Any] | None) -> str:
    found = metrics or {}
    shown = (PERPLEXITY, *(m for m in JUDGED_BY if m.more), EXACT_MATCH)
    told = [f"{m.title} {m.text(found[m.key])}" for m in shown if found.get(m.key) is not None]
    return "  ".join(told)
