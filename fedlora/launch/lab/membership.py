"""Was this row trained on? Attacks on a model's losses, and on one client's update.

    loss threshold   -loss                                    Yeom et al., 2018, section 3.3
    LiRA             likelihood ratio of the row's loss under models that had it and that had not
                                                              Carlini et al., 2022, algorithm 1
    server's seat    cosine of the row's gradient with what one client sent
                                                              Li, Li and Ribeiro, 2023, section 4

Yeom, Giacomelli, Fredrikson and Jha, "Privacy Risk in Machine Learning", CSF 2018,
https://arxiv.org/abs/1709.01604. Carlini, Chien, Nasr, Song, Terzis and Tramer, "Membership
Inference Attacks From First Principles", S&P 2022, https://arxiv.org/abs/2112.03570. Li, Li and
Ribeiro, "Effective passive membership inference attacks in federated learning against
overparameterized models", ICLR 2023, https://openreview.net/forum?id=QsCSLPP55Ku

Scores are high for members. "Lite": with a handful of shadow models one variance serves all rows,
as the paper does below 64 of them.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.privacy.per_example import kept_apart
from fedlora.training.data.batches import Encoded, collate
from fedlora.training.devices import wide_on_host
from fedlora.training.model.model import Model
from fedlora.training.train import example_losses


def telling(members: Tensor, others: Tensor) -> tuple[float, float]:
    """AUC and true positive rate at 5 % false positives, of scores that are high for members."""
    from sklearn.metrics import roc_auc_score

    truth = torch.cat([torch.ones(len(members)), torch.zeros(len(others))])
    auc = float(roc_auc_score(truth.numpy(), torch.cat([members, others]).double().numpy()))
    threshold = float(torch.quantile(others.double(), 0.95))
    return auc, float((members.double() > threshold).double().mean())


def half_width(auc: float, members: int, others: int) -> float:
    """Half the width of the 95 % interval of an AUC of so many independent scores.

    Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982.
    """
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = (members - 1) * (q1 - auc**2) + (others - 1) * (q2 - auc**2)
    return 1.96 * math.sqrt(max(auc * (1 - auc) + spread, 0.0) / (members * others))


def confidence(losses: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(-loss): near normal over models, which a probability is not."""
    losses = losses.double().clamp(min=1e-12)
    odds: Tensor = -losses - torch.log(-torch.expm1(-losses))
    return odds


def lira(phi: Tensor, is_in: Tensor, target: int, offline: bool = False) -> Tensor:
    """A score for each row against model `target`, the other models as its shadows; (rows,).

    `phi` (models, rows) are confidences, `is_in` who trained on what. Online: the log ratio of two
    normal densities. Offline: how far the row lies above models that had not seen it.

    Edge cases: NaN for a row that no shadow had, or that all had (offline: that all had).
    """
    shadows = torch.arange(len(phi)) != target
    x = phi[target].double()
    inside, outside = is_in & shadows[:, None], ~is_in & shadows[:, None]
    mean_in, s_in = _normal(phi, inside)
    mean_out, s_out = _normal(phi, outside)
    if offline:
        return (x - mean_out) / s_out
    return _log_density(x, mean_in, s_in) - _log_density(x, mean_out, s_out)


def _normal(phi: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's mean over the models in `of` (models, rows), and one deviation for all rows."""
    count = of.sum(0)
    mean = (phi.double() * of).sum(0) / count  # NaN where there is none
    gaps = ((phi - mean) * of)[:, count > 1]
    freedom = (count[count > 1] - 1).sum().clamp(min=1)
    return mean, (gaps.square().sum() / freedom).sqrt().clamp(min=1e-6)


def _log_density(x: Tensor, mean: Tensor, s: Tensor) -> Tensor:
    return -((x - mean) ** 2) / (2 * s**2) - s.log()


def alignment(
    model: Model, rows: Encoded, change: Mapping[str, Mapping[str, Tensor]], size: int = 64
) -> Tensor:
    """Cosine of each row's own gradient with the direction of `change`, (n,).

    The model holds what the client was sent; `change`, by column and name, is what it sent back
    less that. A row's gradient is taken of the same columns, which are all that the server sees.

    Edge cases: 0 where the row has no gradient there, as A has while B is 0.
    """
    live = model.trainable(frozenset(change))
    went = {p: -change[c][name] for c, ps in live.items() for name, p in ps.items()}
    length = math.sqrt(sum(float(x.double().square().sum()) for x in went.values()))
    found = []
    model.peft.eval()
    for part in torch.arange(len(rows)).split(size):
        with kept_apart(model.peft, model.active, frozenset(went), model.masks) as sink:
            example_losses(model, collate(rows, part)).sum().backward()
            gradients = {p: wide_on_host(g.dense()) for p, g in sink.take(len(part)).items()}
        dots = sum((g * went[p]).flatten(1).sum(1) for p, g in gradients.items())
        norms = sum(g.square().flatten(1).sum(1) for g in gradients.values())
        found.append(dots / (torch.as_tensor(norms).sqrt() * length).clamp(min=1e-30))
    return torch.cat(found)
