"""What privacy costs: federations under each budget, and the linear probe that they have to beat.

A run is a federation as `fedlora simulate` makes it, on LocalGrid in this process; its ledgers are
its own, so that comparing strategies does not spend one budget many times.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.run import score
from fedlora.launch.lab.membership import half_width, telling
from fedlora.launch.lab.plan import Lab, Row
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.privacy.accounting import calibrate
from fedlora.privacy.chance import Chance
from fedlora.training import cache
from fedlora.training.data.batches import Encoded, eval_batches
from fedlora.training.model.model import Model
from fedlora.training.train import example_losses, threads
from fedlora.training.user_code import named

RATES = (0.5, 2.0, 8.0, 32.0)
"""Of the probe, tried at each budget; the best is what counts, which favours the probe."""


def federation(lab: Lab, seed: int, strategy: str, epsilon: float) -> Row:
    """One whole run: its score, epsilon, bytes, and the loss threshold on its model."""
    from fedlora.launch.client_app import client_app

    config = lab.at(strategy, epsilon, seed)
    shutil.rmtree(Path(config.run.out, config.run.name), ignore_errors=True)  # one that was begun
    app = client_app(value for _, value in named(config))
    with LocalGrid(app, config.clients.count, config.flat(), 1) as grid:
        server = FederatedLora(config)
        server.start(grid)
    scores = score(server.setting) or {}
    row: Row = {key: scores[key] for key in ("accuracy", "loss", "perplexity") if key in scores}
    rounds = server.setting.journal.lines()
    privacy = [c.get("privacy") or {} for r in rounds for c in (r.get("clients") or {}).values()]
    spent = max((float(p.get("epsilon", 0.0)) for p in privacy), default=0.0)
    up = rounds[-1]["bytes"]["up"] / max(1, len(rounds[-1]["accepted"]))
    return {**row, "epsilon spent": spent, "bytes up": up, **_threshold(server)}


def _threshold(server: FederatedLora) -> Row:
    """Are a client's losses on the final model lower than unseen rows'? (Yeom et al., 2018)"""
    config = server.setting.config
    seen = cache.encoded("train", min(server.run.members), config, server.setting.labels)
    others = cache.encoded("central", -1, config, server.setting.labels)
    with threads(config.train.threads):
        members, strangers = (-losses(server.setting.model, rows) for rows in (seen, others))
    auc, _ = telling(members, strangers)
    return {"loss AUC": auc, "+-": half_width(auc, len(members), len(strangers))}


@torch.no_grad()
def losses(model: Model, rows: Encoded, size: int = 64) -> Tensor:
    """Each example's loss under the model as it is, in the rows' order, (n,)."""
    model.peft.eval()
    precision = model.config.train.precision
    batches = eval_batches(rows, size)
    found = torch.cat([example_losses(model, batch, precision) for batch in batches])
    order = rows.lengths.argsort(stable=True, descending=True)
    return found[order.argsort()]


# -- the probe ------------------------------------------------------------------------------------


def probe(lab: Lab, seed: int, epsilon: float, rounds: int = 40) -> Row:
    """DP gradient descent on a linear head over the frozen model's features, best of RATES."""
    config = lab.at(lab.strategies[0], epsilon, seed)
    known = features(lab.at(lab.strategies[0], 0.0, seed))
    sigma = calibrate(epsilon, config.privacy.delta, 1.0, rounds) if epsilon else 0.0
    scored = {lr: known.fitted(sigma, rounds, lr) for lr in RATES}
    best = max(scored, key=lambda lr: scored[lr])
    return {"accuracy": scored[best], "lr": best}


@functools.lru_cache(maxsize=1)
def features(config: Config) -> "Features":
    return Features(config)


class Features:
    """Frozen features (n, width + 1) of unit length and a constant, and labels, by client."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.corpus = cache.corpus(config)
        self.names = {label: i for i, label in enumerate(self.corpus.labels)}
        self.clients = [self._known(c.train) for c in self.corpus.clients]
        self.test = self._known(self.corpus.test)

    def _known(self, rows: Any) -> tuple[Tensor, Tensor]:
        from fedlora.training.features import frozen_features

        model = cache.model(self.config, self.corpus.labels)
        x = torch.nn.functional.normalize(frozen_features(model, rows, self.config))
        y = torch.tensor([self.names[label] for label in rows.label])
        return torch.cat([x, torch.ones(len(x), 1)], 1), y

    def fitted(self, sigma: float, rounds: int, lr: float, C: float = 0.5) -> float:
        """Test accuracy after full batches (q = 1) from zero with momentum 0.9.

        Each client clips and noises its own sum; the server averages the means.
        """
        classes = len(self.names)
        W = torch.zeros(classes, self.clients[0][0].shape[1])
        velocity = torch.zeros_like(W)
        for _ in range(rounds):
            steps = []
            for x, y in self.clients:
                g = (x @ W.T).softmax(1) - torch.nn.functional.one_hot(y, classes)
                c = (C / (g.norm(dim=1) * x.norm(dim=1)).clamp(min=1e-12)).clamp(max=1.0)
                noise = Chance().gaussians(W.numel()).view(W.shape).float() * sigma * C
                steps.append(((c[:, None] * g).T @ x + noise) / len(x))
            velocity = 0.9 * velocity + torch.stack(steps).mean(0)
            W = W - lr * velocity
        x, y = self.test
        return float(((x @ W.T).argmax(1) == y).float().mean())
