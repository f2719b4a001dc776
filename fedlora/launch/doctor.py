"""`fedlora doctor`: find out before a run what would stop it, on this machine and in its config.

Each check says what it found, and where something is wrong, what to do.
"""

import importlib.metadata
import importlib.util
import os
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from fedlora.config.reader import Config
from fedlora.errors import FedLoraError

FLOWER_PORT = 39091
"""Where `flwr run` looks for a managed SuperLink, unless told otherwise."""
FAB_LIMIT = 10_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    level: Literal["ok", "note", "problem"]
    what: str
    do: str = ""


def examine(path: Path | None, overrides: Mapping[str, Any]) -> int:
    """Print what was found and, for an experiment, the plan. Returns 1 where a problem is."""
    from fedlora.training.quiet import quiet_libraries

    quiet_libraries()
    console = Console()
    findings = list(machine())
    plan = None
    if path is not None:
        try:
            config = Config.load(path, overrides)
            more, plan = experiment(config)
            findings += more
        except FedLoraError as e:
            findings.append(Finding("problem", str(e)))
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
    for f in findings:
        console.print(marks[f.level], f.what, highlight=False)
        if f.do:
            console.print("     ->", f.do, highlight=False)
    if plan is not None:
        console.print(plan)
    return int(any(f.level == "problem" for f in findings))


# -- this machine -----------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    """What Flower and this machine would trip over."""
    versions = {p: importlib.metadata.version(p) for p in ("flwr", "torch", "peft")}
    said = ", ".join(f"{p} {v}" for p, v in versions.items())
    yield Finding("ok", f"{said}; {os.cpu_count()} cores")
    minor = tuple(int(n) for n in versions["flwr"].split(".")[:2])
    if not (1, 41) <= minor < (1, 43):
        yield Finding(
            "problem",
            f"flwr {versions['flwr']} is outside the range fedlora is tested with",
            "pip install 'flwr>=1.41,<1.43'",
        )
    if importlib.util.find_spec("ray") is None:
        yield Finding(
            "note",
            "ray is not installed: `fedlora simulate` works, `flwr run` does not",
            "pip install 'fedlora[flower-simulation]' if you want Flower's own engine",
        )
    if os.environ.get("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION") != "1":
        yield Finding(
            "note",
            "`flwr run` would resolve the app's dependencies anew for every run (torch included)",
            "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 before it starts; "
            "`fedlora simulate --engine flower` does so by itself",
        )
    yield from _port()
    yield from _bundle(Path("pyproject.toml"))


def _port() -> Iterator[Finding]:
    """Is a SuperLink that someone else started in the way?"""
    port = int(os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", FLOWER_PORT))
    with socket.socket() as s:
        s.settimeout(0.3)
        taken = s.connect_ex(("127.0.0.1", port)) == 0
    if not taken:
        yield Finding("ok", f"port {port} is free for `flwr run`'s SuperLink")
        return
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            healthy = answer.status == 200
    except OSError:
        healthy = False
    what = "a SuperLink that is running already" if healthy else "another program"
    yield Finding(
        "note",
        f"port {port} belongs to {what}; `flwr run` finds its SuperLink by port alone and would "
        "run there, in that one's environment",
        "export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT to a free port",
    )


def _bundle(pyproject: Path) -> Iterator[Finding]:
    """What `flwr build` would put into the app bundle here, and whether it would take it."""
    import tomllib

    if not pyproject.exists() or "flwr" not in (
        tree := tomllib.loads(pyproject.read_text()).get("tool", {})
    ):
        return
    project = tomllib.loads(pyproject.read_text())["project"]
    if not isinstance(project.get("license"), dict):
        yield Finding(
            "problem",
            "pyproject.toml: project.license is a string; an app bundle of format 1 refuses that",
            'license = { file = "LICENSE" }',
        )
    app = tree["flwr"].get("app", {})
    size = 0
    for pattern in app.get("fab-include", []):
        found = list(Path().glob(pattern))
        size += sum(p.stat().st_size for p in found if p.is_file())
        if not found:
            yield Finding("problem", f"fab-include: {pattern} matches nothing", "remove it")
    if size > FAB_LIMIT:
        yield Finding("problem", f"the app bundle holds {size:,} bytes", f"limit {FAB_LIMIT:,}")
    elif size:
        yield Finding("ok", f"the app bundle's files take {size / 1e3:.0f} kB")


# -- an experiment ----------------------------------------------------------------------------


def experiment(config: Config) -> tuple[list[Finding], Table]:
    """Load the data and the model, ask the strategy, and lay out the plan.

    Raises:
        FedLoraError: what would stop the run before its first round.
    """
    from fedlora.federation.server.ranks import patterned
    from fedlora.strategies.base import Client
    from fedlora.strategies.forms import promise
    from fedlora.training import cache as site

    corpus = site.corpus(config)
    findings = [*_data(config, corpus)]
    model = site.model(config, corpus.labels)
    total = sum(p.numel() for p in model.peft.get_base_model().parameters())
    findings.append(
        Finding("ok", f"model: {total / 1e6:.1f} M parameters, {len(model.shapes)} adapted modules")
    )
    strategy = config.build_strategy()
    ranks, pattern = config.clients.ranks, config.lora.rank_pattern
    clients = [
        Client(i, model.layers(patterned(model.shapes, ranks[i % len(ranks)], pattern)))
        for i in range(config.clients.count)
    ]
    for problem in strategy.problems(clients):
        findings.append(Finding("problem", f"strategy.name = {config.strategy.name!r}: {problem}"))
    if any(f.level == "problem" for f in findings):
        return findings, Table()
    state = _begun(config, model, strategy, clients, corpus)
    findings += [_precision(config), _training(config, model, strategy, state, clients[0], corpus)]
    findings += _secure(config, strategy, state, clients)
    table, largest = _plan(config, strategy, state, clients, corpus)
    per_round = config.clients.per_round or config.clients.count
    need = _memory(model, config, largest * per_round)
    have = _available()
    findings.append(
        Finding(
            "ok" if need < have else "problem",
            f"memory: about {need / 1e9:.1f} GB needed, {have / 1e9:.1f} GB available",
            "" if need < have else "lower train.batch-size, data.max-length or clients.ranks",
        )
    )
    findings.append(
        Finding(
            "ok",
            f"plan: {config.strategy.name} ({promise(model.form, strategy)}), "
            f"{config.run.rounds} rounds of {per_round} clients, "
            f"lr {config.train.lr:g} ({config.train.lr_schedule})",
        )
    )
    return findings, table


def _begun(config: Config, model: Any, strategy: Any, clients: Any, corpus: Any) -> Any:
    """The strategy's first state; the model is left on the base that clients begin on."""
    from fedlora.strategies.base import Client, Start, top_ranks
    from fedlora.training.calibration import first_factors
    from fedlora.training.model.layers import taken_out

    whole = Client(-1, model.layers(top_ranks(clients)))
    factors = first_factors(model, whole, config, corpus)
    state = strategy.init(Start(factors, clients, model.weights(), config.run.seed))
    origin = taken_out(config, factors, model.weights())
    model.rebase("doctor", strategy.effective(state).base, origin)
    return state


def _data(config: Config, corpus: Any) -> Iterator[Finding]:
    """What there is; and clients of a simulation with nothing to train on, which would end it."""
    rows = sum(len(c.train) for c in corpus.clients)
    yield Finding(
        "ok",
        f"data: {rows} training rows on {len(corpus.clients)} clients, "
        f"{len(corpus.test)} central test rows"
        + (f", {len(corpus.labels)} labels" if corpus.labels else ""),
    )
    if config.data.node_path or not any(len(c.train) for c in corpus.clients):
        return
    bare = [str(i) for i, c in enumerate(corpus.clients) if not len(c.train)]
    if bare:
        yield Finding(
            "problem",
            f"clients {', '.join(bare[:5])}{' and more' if len(bare) > 5 else ''} have no rows to "
            "train on",
            "lower clients.count or data.client-test-fraction, or raise data.alpha",
        )


def _precision(config: Config) -> Finding:
    """What train.precision resolves to here, and whether that is a good idea."""
    from fedlora.training.precision import described, resolved, slowdown

    said = described(config.train.precision)
    if resolved(config.train.precision) == "float32":
        return Finding("ok", said)
    ratio = slowdown()
    said = f"{said}; a bfloat16 product takes {ratio:.2g} of a float32 one's time"
    if ratio < 1:
        return Finding("ok", said)
    return Finding("note", said, "train.precision = 'float32' is faster on this machine")


def _training(
    config: Config, model: Any, strategy: Any, state: Any, client: Any, corpus: Any
) -> Finding:
    """The training check, on the first client's rows where they are here."""
    from fedlora.errors import TrainingCheckError
    from fedlora.privacy.rehearsal import check_first
    from fedlora.training import cache as site

    here = not config.data.node_path and any(len(c.train) for c in corpus.clients)
    rows = site.encoded("train", client.id, config, corpus.labels) if here else None
    try:
        check_first(model, strategy, state, client, rows, config, 1)
    except TrainingCheckError as e:
        return Finding(
            "problem", f"training check: {e}", "docs/training-check.md says what each finding means"
        )
    whose = "client 0's rows" if here and not config.privacy.by_example else "synthetic rows"
    return Finding("ok", f"training check: losses, gradients and a step are right on {whose}")


def _secure(config: Config, strategy: Any, state: Any, clients: Any) -> Iterator[Finding]:
    """Whether secure aggregation can be, what it hides and what it costs."""
    from fedlora.federation.secure.rules import alone, unsummable
    from fedlora.federation.secure.terms import Terms
    from fedlora.federation.secure.vector import Layout, kinds_of
    from fedlora.federation.server.exchange import Schemas
    from fedlora.strategies.base import Round

    if not config.secure.aggregation:
        return
    problems, round = list(alone(clients)), Round(1, config.run.seed)
    schemas = Schemas(strategy)
    kinds = kinds_of((c, *schemas.of(state, c, 0, round)) for c in clients)
    if not problems:
        problems = [*filter(None, [unsummable(strategy, state, kinds, round)])]
    for problem in problems:
        yield Finding("problem", problem)
    if problems:
        return
    K = config.clients.per_round or config.clients.count
    terms, numbers = Terms.of(config, K), len(Layout.over([kind.shapes for kind in kinds]))
    size = terms.bits // 8
    yield Finding(
        "ok",
        f"secure aggregation: the server learns sums over {terms.threshold} to {K} clients; up to "
        f"{K - terms.threshold} of {K} may drop out" + (
            "" if terms.shares >= K else f" (of each client's {terms.shares} neighbours, "
            f"{terms.shares - terms.threshold})"
        ),
    )  # fmt: skip
    yield Finding(
        "ok",
        f"secure aggregation costs 4 messages a client and round in place of 1, and up {numbers} "
        f"numbers of {size} bytes ({numbers * size / 1e3:.0f} kB), whatever wire.dtype; it moves "
        f"a mean over clients of {terms.weight if terms.weight == 1 else 100} examples by at most "
        f"{terms.error(K, K * min(terms.weight, 100)):.1g}",
    )


def _plan(
    config: Config, strategy: Any, state: Any, clients: Any, corpus: Any
) -> tuple[Table, int]:
    """What each client does in a round, and the most bytes one client's messages take."""
    from fedlora.federation.wire.messages import count_bytes, pack_download, pack_factors
    from fedlora.lora.adapter import Factors
    from fedlora.strategies.base import Round
    from fedlora.training.data.batches import steps_in

    round = Round(1, config.run.seed)
    table = Table("client", "rank", "rows", "test", "steps a round", "down", "up", title="Plan")
    largest = 0
    for c in clients:
        sent = strategy.download(state, c, round)
        begun = strategy.start(sent, Factors(), c, round)
        back = pack_factors(strategy.upload(begun, begun)[0], config.wire.dtype)
        down, up = count_bytes(pack_download(sent, config.wire.dtype)), back.count_bytes()
        largest = max(largest, up + down)
        rows = corpus.client(c.id)
        train = config.train
        steps = steps_in(len(rows.train), train.batch_size, train.steps, train.epochs)
        rank = max(layer.rank for layer in c.layers.values())
        table.add_row(
            str(c.id), str(rank), str(len(rows.train)), str(len(rows.test)), str(steps),
            f"{down / 1e3:.0f} kB", f"{up / 1e3:.0f} kB",
        )  # fmt: skip
    return table, largest


def _memory(model: Any, config: Config, in_flight: int) -> float:
    """Base, activations of one batch a worker (a rule of thumb), messages: bytes."""
    base = sum(p.numel() * p.element_size() for p in model.peft.parameters())
    hidden = getattr(model.peft.config, "hidden_size", 768)
    depth = getattr(model.peft.config, "num_hidden_layers", 12)
    tokens = config.train.batch_size * config.data.max_length
    activations = tokens * hidden * depth * 4 * 16  # about 16 tensors a layer survive
    workers = config.simulate.workers or os.cpu_count() or 1
    return float(base + workers * activations + 2 * in_flight + 5e8)


def _available() -> float:
    import psutil

    return float(psutil.virtual_memory().available)
