"""Whoever withdraws is in no later round; what was charged for its rows stays charged."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.policy import Policy
from fedlora.errors import ConfigError
from fedlora.privacy.ledger import Ledger
from fedlora.training import cache
from fedlora.training.data.row_units import SIZE, by_value
from tests.conftest import tiny_settings
from tests.support.tiny_federation import quick
from tests.support.under_policy import Recorded, asked, recorded, written

PEOPLE = 6
DP = {"privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3, "train.optimizer": "sgd"}


def owned(tiny: dict[str, str], path: Path) -> str:
    """The rows, each of one of six people, but for a few of nobody."""
    lines = Path(tiny["rows"]).read_text().splitlines()
    rows = [
        {**json.loads(x), "who": f"p{i % PEOPLE}" if i % 9 else ""} for i, x in enumerate(lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "private"])
def told(
    request: pytest.FixtureRequest, tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    root = tmp_path_factory.mktemp("withdrawal")
    changes = {"run.rounds": 1, "train.steps": 2, "lora.layers": "-1", "evaluate.clients": False}
    given = tiny_settings(tiny, root, "float32", "bert", **quick("fedavg", **{
        **changes, **(DP if request.param else {})}))  # fmt: skip
    rows = owned(tiny, root / "rows.jsonl")
    unit = {"unit": "who"}
    return recorded(given, {i: written(root / f"{i}", tiny["bert"], rows, privacy=unit)
                            for i in range(3)})  # fmt: skip


@pytest.fixture
def own(tiny: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    rows = owned(tiny, tmp_path / "rows.jsonl")

    def make(**privacy: Any) -> Path:
        given: Mapping[str, Any] = {"unit": "who", **privacy}
        return written(tmp_path / "node", tiny["bert"], rows, privacy=given)

    return make


def examples(told: Recorded, path: Path) -> int:
    reply = asked(told, path)
    assert not reply.has_error(), reply.error
    return int(dict(reply.content["metrics"])["num-examples"])


def test_rows_of_who_withdrew_are_in_no_later_round_of_the_same_run(
    told: Recorded, own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a run that is under way, whose rows are otherwise those that it began with."""
    seen: list[list[bytes]] = []
    encoded = cache.encoded

    def spied(part: str, client: int, config: Any, labels: Any) -> Any:
        rows = getattr(cache.client_rows(client, config, labels), part)
        found = encoded(part, client, config, labels)
        seen.append([*rows.unit])
        assert len(found) == len(rows)
        return found

    spied.cache_clear = encoded.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(cache, "encoded", spied)
    private = bool(told.config["privacy.noise-multiplier"])
    before = examples(told, own())
    first, gone = [x for part in seen for x in part], {*by_value(["p1", "p4"])}
    assert not private or gone & {*first}, "the test has teeth: they were in it"
    seen.clear()
    after = examples(told, own(withdrawn=["p1", "p4", "never-there"]))
    later = [x for part in seen for x in part]
    assert later
    assert not gone & {*later}
    assert private or after < before
    if private:
        assert len({*first}) - len({*later}) == 2


def test_the_ledger_keeps_what_was_charged_and_charges_without_them(
    told: Recorded, own: Callable[..., Path]
) -> None:
    if not told.config["privacy.noise-multiplier"]:
        pytest.skip("nothing is charged")
    path = own()
    examples(told, path)
    ledger = Ledger(Policy.load(path).ledger)
    (first,) = ledger.read().charges
    spent = ledger.epsilon(1e-3)
    examples(told, own(withdrawn=["p1"]))
    kept, second = ledger.read().charges
    assert kept == first
    sizes = [(ledger.sets / f"{c.units}.bin").stat().st_size // SIZE for c in (first, second)]
    assert sizes[0] - sizes[1] == 1
    assert ledger.epsilon(1e-3) > spent, "those who stay are charged for both"


def test_a_unit_that_came_back_would_be_charged_on(
    told: Recorded, own: Callable[..., Path]
) -> None:
    """To withdraw begins no budget anew."""
    if not told.config["privacy.noise-multiplier"]:
        pytest.skip("nothing is charged")
    epsilons = []
    for gone in ([], ["p1"], []):
        reply = asked(told, own(withdrawn=gone))
        epsilons.append(dict(reply.content["metrics"])["privacy.epsilon"])
    assert epsilons == sorted(epsilons)
    assert len({*epsilons}) == 3


def test_where_all_have_withdrawn_nothing_is_trained(
    told: Recorded, own: Callable[..., Path]
) -> None:
    if not told.config["privacy.noise-multiplier"]:
        pytest.skip("rows of nobody stay")
    reply = asked(told, own(withdrawn=[f"p{i}" for i in range(PEOPLE)]))
    assert "so few rows" in reply.error.reason


def test_who_withdraws_is_named_by_a_column(own: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="say in `unit` which column"):
        Policy.load(own(unit="", withdrawn=["p1"]))


def test_no_name_of_who_withdrew_is_in_what_a_run_is_told(
    told: Recorded, own: Callable[..., Path]
) -> None:
    """In the node's config there is a digest, and in its answer and record nothing."""
    path = own(withdrawn=["p1-of-a-kind"])
    reply = asked(told, path)
    assert "p1-of-a-kind" not in str(reply.content)
    assert "p1-of-a-kind" not in (path.parent / "audit.jsonl").read_text()
