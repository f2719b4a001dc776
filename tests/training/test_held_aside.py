"""evaluate.steps: a client's validation loss within a round, which changes no step of it."""

from collections.abc import Callable

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.reports import report
from fedlora.reports.run_files import read
from fedlora.reports.within import within
from fedlora.training import cache, train
from fedlora.training.evaluate import evaluate
from fedlora.training.held_aside import HeldAside, shares
from tests.support.private_setting import Setting
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
ASIDE = {"evaluate.steps": 0.25, "data.client-validation-fraction": 0.3, "train.lr": 0.02}


@pytest.mark.parametrize(
    ("each", "want"),
    [
        (0.25, [0, 0.25, 0.5, 0.75, 1]),
        (0.4, [0, 0.4, 0.8, 1]),
        (1.0, [0, 1]),
        (0.1, 11),
        (0.02, 51),
    ],
)
def test_a_round_is_cut_into_shares_from_its_beginning_to_its_end(each, want):
    found = shares(each)
    assert (found == pytest.approx(want)) if isinstance(want, list) else (len(found) == want)
    assert len({f"{x:.4g}" for x in found}) == len(found)


def with_steps(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def test_the_loss_at_a_share_is_the_models_after_so_many_steps_and_the_steps_stay_the_same(
    settings,
):
    """Of 6 steps: after 0, 2, 3, 5 and 6, which the same training shows that ends there."""
    s = Setting(settings("bert", **ASIDE), torch.float32)
    held = cache.encoded("validation", 0, s.config, s.labels)
    assert len(held)
    home, six = s.model.read(), with_steps(s.config, steps=6)

    def trained(config: Config, *more: object) -> tuple[train.Fit, dict[str, torch.Tensor]]:
        s.model.load(home)
        fit = train.fit(s.model, s.rows, s.columns, config, 1, 0, None, *more)
        return fit, s.model.read().B

    fit, B = trained(six, held)
    want = {}
    for share, steps in {"0.25": 2, "0.5": 3, "0.75": 5, "1": 6}.items():
        trained(with_steps(six, steps=steps))
        want[share] = (evaluate(s.model, held, s.config) or {})["loss"]
    s.model.load(home)
    want["0"] = (evaluate(s.model, held, s.config) or {})["loss"]
    assert dict(fit.during) == want
    assert len({*want.values()}) == 5
    plain, alike = trained(six)
    assert dict(plain.during) == {}
    assert all(torch.equal(x, alike[m]) for m, x in B.items())
    assert fit.loss == plain.loss


def test_where_a_round_has_fewer_steps_than_shares_each_share_is_of_the_step_that_completes_it():
    config = Config.read({"evaluate.steps": 0.25})
    due = HeldAside(None, [1], config, 2)._due  # type: ignore[arg-type]
    assert due == {"0": 0, "0.25": 1, "0.5": 1, "0.75": 2, "1": 2}
    assert HeldAside(None, [1], config, 0)._due == dict.fromkeys(due, 0)  # type: ignore[arg-type]
    assert HeldAside(None, None, config, 2)._due == {}  # type: ignore[arg-type]


def test_the_report_has_a_line_a_round_of_the_clients_mean(settings):
    short = {"train.steps": 2, "run.rounds": 1, "clients.count": 2, "evaluate.baselines": False}
    given = settings(**quick("fedavg", **ASIDE, **short))
    ran = federate(given)
    (line,) = (r for r in ran.rounds if r["round"])
    told = [client["during"] for client in line["clients"].values()]
    assert len(told) == 2
    assert [*told[0]] == ["0", "0.25", "0.5", "0.75", "1"]
    grid = within(read(ran.directory))
    assert grid.head == ["round", "0%", "25%", "50%", "75%", "100%"]
    mean = sum(x["0.5"] for x in told) / 2
    assert float(grid.rows[0][3].title) == pytest.approx(mean)
    page = report.write(ran.directory).read_text()
    assert "validation loss while they train" in page
    assert "Losses while training" in page
    assert (ran.directory / "tables" / "within-rounds.csv").exists()
