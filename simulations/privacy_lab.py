"""The privacy lab: what an experiment's privacy costs, and what attacks get out of it.

    fedlora privacy audit simulations/experiments/quickstart.toml --epsilons 0,8,1

    utility      accuracy by strategy and epsilon, beside a linear probe under the same epsilon
    membership   loss threshold on the final model: AUC, and true positives at 5 % false ones
    canaries     a measured lower bound on epsilon, and the same with bugs planted
    inversion    how much of a sentence one update gives away, by strategy and rank

Results go to <out>/privacy.json after every step, and to <out>/privacy.html.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora import site
from fedlora.config import Config
from fedlora.model import Model
from fedlora.privacy.accounting import calibrate
from fedlora.privacy.audit import audit, telling
from fedlora.privacy.chance import Chance
from fedlora.privacy.inversion import embeddings, invert, pairs
from fedlora.privacy.mechanism import ClippedSum
from fedlora.privacy.per_example import kept_apart
from fedlora.privacy.training import Plan
from fedlora.server import FederatedLora
from fedlora.strategies.base import Client
from fedlora.text import Encoded, collate, eval_batches
from fedlora.train import example_losses
from simulations.grid import LocalGrid

Rows = list[dict[str, Any]]


@dataclass
class Lab:
    """One experiment under audit."""

    config: Config
    out: Path
    epsilons: Sequence[float]
    strategies: Sequence[str]

    def run(self) -> dict[str, Rows]:
        """All four parts; what is done is on disk after each."""
        found: dict[str, Rows] = {}
        for name, part in (
            ("canaries", canaries(self)),
            ("inversion", inversion(self)),
            ("utility", utility(self)),
        ):
            found[name] = []
            for row in part:
                print(name, row, flush=True)
                found[name].append(row)
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / "privacy.json").write_text(json.dumps(found, indent=2) + "\n")
        return found

    def at(self, strategy: str, epsilon: float) -> Config:
        """The experiment with this strategy and budget, in a run of its own."""
        changes: dict[str, Any] = {
            "strategy.name": strategy,
            "privacy.epsilon": epsilon,
            "privacy.noise-multiplier": 0.0,
            "run.out": str(self.out / "runs"),
            "run.name": f"{strategy}-{epsilon:g}",
            "evaluate.baselines": False,
            "evaluate.clients": False,
            "output.plots": False,
        }
        if len(set(self.config.clients.ranks)) > 1:
            changes["clients.ranks"] = str(max(self.config.clients.ranks))
        return Config.read({**self.config.flat(), **changes})


# -- utility and membership ----------------------------------------------------------------------


def utility(lab: Lab) -> Iterator[dict[str, Any]]:
    """Accuracy of every strategy at every epsilon, with the membership attack on each model."""
    for epsilon in lab.epsilons:
        if lab.config.model.task == "classification":
            yield {"strategy": "linear probe", "epsilon": epsilon, **probe(lab, epsilon)}
        for strategy in lab.strategies:
            config = lab.at(strategy, epsilon)
            from client_app.app import app

            with LocalGrid(app, config.clients.count, config.flat(), 1) as grid:
                server = FederatedLora(config)
                server.start(grid)
            scores = server.score() or {}
            yield {"strategy": strategy, "epsilon": epsilon, **_main(scores), **_attack(server)}


def _main(scores: Mapping[str, float]) -> dict[str, float]:
    return {key: scores[key] for key in ("accuracy", "loss", "perplexity") if key in scores}


def _attack(server: FederatedLora) -> dict[str, float]:
    """Loss threshold (Yeom et al., 2018): are training rows' losses lower than unseen rows'?"""
    parts = [site.encoded("train", i, server.config, server.labels) for i in sorted(server.members)]
    members = torch.cat([_losses(server.model, rows) for rows in parts])
    others = _losses(server.model, site.encoded("central", -1, server.config, server.labels))
    auc, caught = telling(-members, -others)
    return {"auc": auc, "tpr_at_5": caught}


@torch.no_grad()
def _losses(model: Model, rows: Encoded) -> Tensor:
    model.peft.eval()
    found = [example_losses(model, batch) for batch in eval_batches(rows, 64)]
    return torch.cat(found)


def probe(lab: Lab, epsilon: float, rounds: int = 40, C: float = 0.5) -> dict[str, float]:
    """DP gradient descent on a linear head over frozen features: what DP-LoRA has to beat.

    Full batches (q = 1), zero-initialised, momentum 0.9, features scaled to length 1 by row; each
    client clips and noises its own sum, and the server averages.
    """
    from fedlora.features import frozen_features

    config = lab.config
    corpus = site.corpus(config)
    model = site.model(config, corpus.labels)
    names = {label: i for i, label in enumerate(corpus.labels)}

    def known(rows: Any) -> tuple[Tensor, Tensor]:
        x = torch.nn.functional.normalize(frozen_features(model, rows.text, config))
        y = torch.tensor([names[label] for label in rows.label])
        return torch.cat([x, torch.ones(len(x), 1)], 1), y

    clients = [known(c.train) for c in corpus.clients]
    sigma = calibrate(epsilon, config.privacy.delta, 1.0, rounds) if epsilon else 0.0
    W = torch.zeros(len(names), clients[0][0].shape[1])
    velocity = torch.zeros_like(W)
    for _ in range(rounds):
        steps = []
        for x, y in clients:
            g = (x @ W.T).softmax(1) - torch.nn.functional.one_hot(y, len(names))
            c = (C / (g.norm(dim=1) * x.norm(dim=1)).clamp(min=1e-12)).clamp(max=1.0)
            noise = Chance().gaussians(W.numel()).view(W.shape).float() * sigma * C
            steps.append(((c[:, None] * g).T @ x + noise) / len(x))
        velocity = 0.9 * velocity + torch.stack(steps).mean(0)
        W = W - 2.0 * velocity
    x, y = known(corpus.test)
    return {"accuracy": float(((x @ W.T).argmax(1) == y).float().mean())}


# -- canaries ------------------------------------------------------------------------------------


def canaries(lab: Lab) -> Iterator[dict[str, Any]]:
    """The lower bound at each epsilon, and with a quarter of the noise."""
    delta = lab.config.privacy.delta
    m = max(1000, min(10_000, int(0.1 / delta)))  # more of them cost the bound 2 m delta
    for epsilon in lab.epsilons:
        if epsilon:
            sigma = calibrate(epsilon, delta, 1.0, 1)
            yield {
                "epsilon claimed": epsilon,
                "epsilon measured": audit(sigma, delta, m),
                "with a quarter of the noise": audit(sigma / 4, delta, m),
            }


# -- inversion -----------------------------------------------------------------------------------

COLUMNS = {"A": "A (LoRA, FedSA)", "B": "B (FFA)", "R": "R (Fed-SB)"}


def inversion(lab: Lab, ranks: Sequence[int] = (8, 16, 64)) -> Iterator[dict[str, Any]]:
    """Recall of a short sentence's tokens from one step's gradient, with and without noise."""
    config = Config.read({**lab.config.flat(), "privacy.noise-multiplier": 1.0})
    corpus = site.corpus(config)
    model = Model(config, corpus.labels)
    embed = getattr(getattr(model.peft.base_model.model, "encoder", None), "embeddings", None)
    first = next(iter(model.shapes))
    if embed is None:
        embed = getattr(getattr(model.peft.base_model.model, "bert", None), "embeddings", None)
    if embed is None:
        return
    rows = site.encoded("central", -1, config, corpus.labels)
    shortest = int((rows.lengths - 9).abs().argmin())
    batch = collate(rows, torch.tensor([shortest]))
    for rank in ranks:
        for column, name in COLUMNS.items():
            found = {
                sigma: _inverted(model, embed, first, rank, column, batch, sigma)
                for sigma in (0.0, 1e-4, _sigma(lab))
            }
            tokens = int(rows.lengths[shortest])
            recalls = [found[s] for s in found]
            yield {"update of": name, "rank": rank, "tokens": tokens,
                   "recall without DP": recalls[0], "sigma = 1e-4": recalls[1],
                   "recall with DP": recalls[2]}  # fmt: skip


def _sigma(lab: Lab) -> float:
    """The least noise of the lab's budgets, for a client of average size."""
    corpus = site.corpus(lab.config)
    n = sum(len(c.train) for c in corpus.clients) // len(corpus.clients)
    budget = max(lab.epsilons)
    if not budget:
        return 1.0
    return Plan.of(lab.at(lab.strategies[0], budget), n).sigma


def _inverted(
    model: Model, embed: Any, m: str, rank: int, column: str, batch: Any, sigma: float
) -> float:
    """One example's gradient of one column of one module, clipped to 1 and noised; its recall."""
    ranks = dict.fromkeys(model.shapes, rank)
    factors = model.init_factors(Client(0, model.layers(ranks)), 0)
    g = torch.Generator().manual_seed(0)
    B = {k: 0.02 * torch.randn(x.shape, generator=g) for k, x in factors.B.items()}
    R = {k: torch.eye(rank) for k in factors.A} if column == "R" else {}
    head = {k: torch.randn(x.shape, generator=g) for k, x in factors.other.items()}
    model.load(replace(factors, B=B, R=R, other=head))  # a head of zeros gives no gradient at all
    params = tuple(p for ps in model.trainable(frozenset({column})).values() for p in ps.values())
    target = model.trainable(frozenset({column}))[column][m]
    with kept_apart(model.peft, model.active, frozenset(params)) as sink:
        example_losses(model, batch).sum().backward()
        clipped = ClippedSum(params, 1.0)
        clipped.add(sink.take(1))
    change = clipped.noised(sigma, Chance())[target]
    ids = batch["input_ids"][0]
    vocabulary = embed.word_embeddings.weight.shape[0]
    candidates: Any = embeddings(embed, vocabulary, len(ids) + 1)
    if column != "A":
        candidates = (x @ factors.A[m].T for x in candidates)
    return invert(change, candidates, pairs(ids, vocabulary), drop=1e-6).recall


# -- the page --------------------------------------------------------------------------------------

PAGE = """<!doctype html><meta charset="utf-8"><title>Privacy lab</title>
<style>body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}</style>
<h1>Privacy lab: {{ name }}</h1>
<p>epsilon 0 means without privacy. delta = {{ delta }}. Every number was measured by
<code>fedlora privacy audit</code>; what is promised is in docs/privacy.md.</p>
{% for title, note, rows in parts if rows %}<h2>{{ title }}</h2><p>{{ note }}</p>
<table><tr>{% for head in rows[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for head in rows[0] %}<td>{{ row.get(head, "-") | number }}</td>
{% endfor %}</tr>{% endfor %}</table>{% endfor %}"""

NOTES = {
    "utility": (
        "Utility and membership",
        "auc: how well a threshold on the loss tells training rows from unseen ones (0.5: not at "
        "all); tpr_at_5: members caught at 5 % false alarms. The linear probe is the baseline.",
    ),
    "canaries": (
        "Epsilon claimed and measured",
        "Steinke's lower bound at 95 % confidence from 10 000 canaries in one step. Above the "
        "claim it proves a bug; below, nothing. The last column has a bug planted.",
    ),
    "inversion": (
        "Gradient inversion",
        "Part of a sentence's (token, position) pairs that one update gives away. Rank above the "
        "number of tokens leaks everything, unless there is noise.",
    ),
}


def page(lab: Lab, found: Mapping[str, Rows]) -> Path:
    """Write privacy.html."""
    from jinja2 import Environment

    env = Environment(autoescape=True)
    env.filters["number"] = lambda x: f"{x:.3g}" if isinstance(x, float) else x
    parts = [(*NOTES[name], found.get(name, [])) for name in NOTES]
    if (rows := found.get("utility", [])) and rows[0]["strategy"] == "linear probe":
        keys = {key: None for row in rows for key in row}
        parts[0] = (*NOTES["utility"], [{k: row.get(k, "-") for k in keys} for row in rows])
    config = lab.config
    text = env.from_string(PAGE).render(
        name=config.run.name, delta=config.privacy.delta, parts=parts
    )
    path = lab.out / "privacy.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
