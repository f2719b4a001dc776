"""The lab's attacks: membership from models and from single updates, canaries, inversion.

Each yields the rows of one table, one at a time. What an attack is, and its source, stands in
`fedlora/privacy/`; here it meets an experiment.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.launch.lab import one_run
from fedlora.launch.lab.canaries import CASES, SHARP, audited
from fedlora.launch.lab.inversion import embeddings, invert, pairs
from fedlora.launch.lab.membership import alignment, confidence, half_width, lira, telling
from fedlora.launch.lab.plan import Lab, Row
from fedlora.launch.lab.seat import Change, Seat, joined, train
from fedlora.launch.lab.utility import losses
from fedlora.privacy.training import PrivacyPlan
from fedlora.strategies.base import seeded
from fedlora.training import cache
from fedlora.training.data.batches import Encoded
from fedlora.training.train import threads

HOLDS, FAILS = "holds", "FAILS"

SECURE = importlib.util.find_spec("fedlora.federation.secure") is not None
"""Secure aggregation: where it is there, the lab also attacks the sum, which is all it shows."""


# -- membership -----------------------------------------------------------------------------------


def shadows(lab: Lab, epsilon: float) -> Row:
    """LiRA-lite and the loss threshold, each model in turn the target and the others its shadows.

    Every model trains on a random half of a pool, so that members are few and the attack strong.
    """
    lab_size, config = lab.size, lab.at(lab.strategies[0], epsilon)
    pool = rows_of(lab, lab_size.pool)
    half = len(pool) // 2
    config = at_once(config, half, lab_size.memorise)
    seat = Seat(config, 1)
    phi, is_in = [], []
    for k in range(lab_size.shadows):
        draw = torch.randperm(len(pool), generator=seeded(config.run.seed, 0, k, "shadow"))
        chosen = draw[:half]
        with threads(config.train.threads), seat.received(0) as (came, _):
            train(seat.model, pool.select(chosen), came.trainable, config, 1, k)
            phi.append(confidence(losses(seat.model, pool)))
        is_in.append(torch.zeros(len(pool), dtype=torch.bool).index_fill_(0, chosen, True))
    return _told(torch.stack(phi), torch.stack(is_in))


def _told(phi: Tensor, is_in: Tensor) -> Row:
    """Mean over targets of each attack's AUC and true positives at 5 % false ones."""
    attacks: dict[str, Callable[[int], Tensor]] = {
        "loss": lambda t: phi[t],
        "LiRA offline": lambda t: lira(phi, is_in, t, offline=True),
        "LiRA online": lambda t: lira(phi, is_in, t),
    }
    row: Row = {}
    for name, scores_of in attacks.items():
        found = []
        for t in range(len(phi)):
            scores, mine = scores_of(t), is_in[t]
            known = scores.isfinite()
            found.append(telling(scores[known & mine], scores[known & ~mine]))
        row[f"{name} AUC"] = sum(a for a, _ in found) / len(found)
        row[f"{name} TPR at 5 %"] = sum(p for _, p in found) / len(found)
    n = int(is_in[0].sum())
    row["+-"] = half_width(row["loss AUC"], n, len(is_in[0]) - n)
    return row


def at_once(config: Config, n: int, epochs: float) -> Config:
    """All the run's steps in one round; without privacy, epochs enough to learn rows by heart."""
    changes: dict[str, Any] = {"run.rounds": 1}
    if config.privacy.on:
        plan = PrivacyPlan.of(config, n)
        changes |= {"train.steps": plan.steps * config.run.rounds}
        changes |= {"privacy.epsilon": 0.0, "privacy.noise-multiplier": plan.sigma}
    else:
        changes |= {"train.epochs": epochs, "train.steps": 0}
    return preflight.read({**config.flat(), **changes})


def server_seat(lab: Lab, rows: int, strategy: str, epsilon: float) -> Row:
    """Cosine of each row's gradient with the update of a client of n rows, in the middle of a run.

    Repeated with fresh members and others; with secure aggregation also on the sum over clients.
    """
    clear = lab.at(strategy, 0.0)
    K, trials = 3, lab.size.trials
    shares = trials * K * 2 + K
    everyone = rows_of(lab, shares * rows)
    n = len(everyone) // shares
    config = one_round(lab.at(strategy, epsilon), n)
    parts = [everyone.select(x) for x in torch.arange(n * shares).split(n)]
    with threads(config.train.threads):
        seat = Seat(clear, K)
        seat.warm(parts[:K])
        rest = iter(parts[K:])
        single: list[tuple[Tensor, Tensor]] = []
        summed: list[tuple[Tensor, Tensor]] = []
        for _ in range(trials):
            members, others = [next(rest) for _ in range(K)], [next(rest) for _ in range(K)]
            changes = [seat.change(i, seat.send(i, members[i], config)[0]) for i in range(K)]
            single += [_aligned(seat, changes[i], members[i], others[i], i) for i in range(K)]
            if SECURE:
                summed.append(_aligned(seat, added(changes), joined(members), joined(others), 0))
    row = _pooled(single)
    if SECURE:
        row["AUC, secure aggregation"] = _pooled(summed)["AUC"]
    return row


def _aligned(
    seat: Seat, change: Change, members: Encoded, others: Encoded, i: int
) -> tuple[Tensor, Tensor]:
    with seat.received(i):
        return alignment(seat.model, members, change), alignment(seat.model, others, change)


def _pooled(found: list[tuple[Tensor, Tensor]]) -> Row:
    """AUC within each update, averaged: cosines of two updates do not compare."""
    each = [telling(*pair) for pair in found]
    auc = sum(a for a, _ in each) / len(each)
    members = sum(len(m) for m, _ in found)
    others = sum(len(o) for _, o in found)
    caught = sum(p for _, p in each) / len(each)
    return {"AUC": auc, "+-": half_width(auc, members, others), "TPR at 5 %": caught}


def added(changes: list[Change]) -> Change:
    """What a secure sum shows of several updates."""
    return {
        c: {name: torch.stack([x[c][name] for x in changes]).sum(0) for name in first}
        for c, first in changes[0].items()
    }


def one_round(config: Config, n: int, more: Mapping[str, Any] | None = None) -> Config:
    """The run's noise for a client of n rows, with no budget that one round could run out of.

    more: keys that come last.
    """
    changes: dict[str, Any] = {"train.lr-schedule": "constant"}
    if config.privacy.on:
        sigma = PrivacyPlan.of(config, n).sigma
        changes |= {"privacy.epsilon": 0.0, "privacy.noise-multiplier": sigma}
    return preflight.read({**config.flat(), **changes, **(more or {})})


def rows_of(lab: Lab, n: int, config: Config | None = None) -> Encoded:
    """At most n training rows of all clients together, in an order of the lab's own."""
    config = config or lab.config
    labels = cache.corpus(config).labels
    rows = joined([cache.encoded("train", i, config, labels) for i in range(config.clients.count)])
    order = torch.randperm(len(rows), generator=seeded(config.run.seed, 0, 0, "pool"))
    return rows.select(order[:n])


# -- canaries -------------------------------------------------------------------------------------


def canary(lab: Lab, mechanism: str, epsilon: float) -> Row:
    """The epsilon measured of a mechanism that claims this epsilon."""
    _, delta, m = SHARP
    case = CASES[mechanism]
    found = audited(case, epsilon, delta, lab.size.canaries or m)
    flagged, expected = ("yes" if x else "no" for x in (found > epsilon, case.broken))
    blind = case.broken and found <= epsilon and not lab.size.canaries  # few tell no bug
    verdict = FAILS if blind or (found > epsilon and not case.broken) else HOLDS
    return {"epsilon measured": found, "flagged": flagged, "must be": expected, "verdict": verdict}


def whole_run(lab: Lab, view: str, epsilon: float) -> Row:
    """Does a federated run show more than its clients claim? `one_run.py`."""
    size, config = lab.size, lab.whole(view, epsilon)
    fixed = one_run.Fixed(size.planted, size.guesses, size.confidence)
    claim, made = one_run.audited(config, view, fixed)
    bound = made.bound(config.privacy.delta, size.confidence)
    row: Row = {"epsilon claimed": claim, "epsilon measured, at least": bound}
    row |= {"right guesses": f"{made.right} of {made.r}", "canaries": made.m}
    return {**row, "verdict": FAILS if bound > claim else HOLDS}


def power(lab: Lab, view: str, epsilon: float) -> Row:
    """What that audit would measure of a run whose epsilon is this; simulated."""
    size, config = lab.size, lab.at(lab.strategies[0], epsilon)
    fixed = one_run.Fixed(size.planted, size.guesses, size.confidence)
    rows = len(cache.client_rows(0, config, cache.corpus(config).labels).train)
    n = rows + size.planted // (2 * config.clients.count)
    median, low = one_run.power(config, n, epsilon, view, fixed)
    return {"bound, median of 200": median, "bound, in 9 of 10 at least": low}


# -- inversion ------------------------------------------------------------------------------------


def inversion(lab: Lab, strategy: str, rank: int) -> Row:
    """How much of a short sentence one client's upload gives away, by budget.

    The worst case the strategy allows: the first query layer adapted, one example, one SGD step,
    in a round after the first so that B is not zero. The best of the columns that were sent.
    """
    config = open_layer(lab.at(strategy, 0.0), rank)
    rows = rows_of(lab, 10_000)
    order = (rows.lengths - lab.size.tokens).abs().argsort(stable=True)
    with threads(config.train.threads):
        seat = Seat(config)
        encoder = encoder_of(seat.model)
        if encoder is None:
            return {}
        warm = order[3:].split((len(order) - 3) // 3)
        seat.warm([rows.select(w[:32]) for w in warm[:3]])
        sentences = [rows.select(order[i : i + 1]) for i in range(3)]
        row: Row = {"tokens": int(sentences[0].lengths[0]), "sent": ""}
        for epsilon in lab.epsilons:
            step = one_step(lab, strategy, epsilon, config, len(rows) // 3)
            changes = [seat.change(i, seat.send(i, sentences[i], step)[0]) for i in range(3)]
            row["sent"] = ", ".join(c for c in changes[0] if c != "other")
            name = f"epsilon {epsilon:g}" if epsilon else "no DP"
            row[name] = _recall(seat, encoder, changes[0], sentences[:1])
            if SECURE and not epsilon:
                row["no DP, secure aggregation"] = _recall(seat, encoder, added(changes), sentences)
    return row


def _recall(seat: Seat, encoder: Any, change: Change, sentences: list[Encoded]) -> float:
    """Of the (token, position) pairs of the sentences together, by the best column."""
    vocabulary = encoder.word_embeddings.weight.shape[0]
    truth = set().union(*(pairs(s.ids.long(), vocabulary) for s in sentences))
    longest = max(len(s.ids) for s in sentences)
    m = next(iter(seat.model.shapes))
    found = [0.0]
    with seat.received(0) as (_, began):
        A = began.A[m]
        for column, changed in change.items():
            if m not in changed or not bool(changed[m].any()):
                continue
            candidates: Any = embeddings(encoder, vocabulary, longest + 1)
            if column != "A":
                candidates = (x @ A.T for x in candidates)
            found.append(invert(changed[m], candidates, truth).recall)
    return max(found)


def open_layer(config: Config, rank: int) -> Config:
    """The same run with its adapters where inputs can be listed: each token at each position."""
    changes = {"lora.layers": "0", "lora.target-modules": "query", "clients.ranks": str(rank),
               "train.optimizer": "sgd", "train.lr": 1.0, "train.precision": "float32",
               "train.lr-schedule": "constant",
               "train.prefix-cache": 0}  # fmt: skip
    return preflight.read({**config.flat(), **changes})


def one_step(lab: Lab, strategy: str, epsilon: float, config: Config, n: int) -> Config:
    """One full-batch step of rate 1; under DP at the noise of the lab's whole run."""
    changes: dict[str, Any] = {"train.steps": 1, "train.batch-size": 1, "train.grad-clip": 0.0}
    if epsilon:
        whole = lab.at(strategy, epsilon)
        changes |= {
            "privacy.noise-multiplier": PrivacyPlan.of(whole, n).sigma,
            "privacy.clip-norm": whole.privacy.clip_norm,
            "privacy.sample-rate": 1.0,
        }
    return preflight.read({**config.flat(), **changes})


def encoder_of(model: Any) -> Any:
    """The embedding layer of an encoder of BERT's kind; None for others."""
    inner = model.peft.base_model.model
    for name in ("encoder", "bert"):
        found = getattr(getattr(inner, name, None), "embeddings", None)
        if found is not None:
            return found
    return None
