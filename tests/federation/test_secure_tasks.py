"""Every task, summed in secret under example-level privacy: the sum is the clear one, certified."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.federation.test_secure_aggregation import ON, check_close, in_the_clear, play
from tests.support.task_rows import MADE, task_settings
from tests.support.tiny_federation import quick

NOISE = {
    "privacy.noise-multiplier": 0.5, "privacy.insecure-reproducible-noise": True,
    "privacy.delta": 1e-3, "privacy.microbatch": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", MADE)
def test_a_private_sum_of_every_task_is_the_clear_one_and_certified(
    settings: Callable[..., dict[str, object]], tmp_path: Path, case: str
) -> None:
    """Noise that repeats, so that both runs have the same; without it, sums differ by the noise."""
    few = {"clients.count": 3, "clients.ranks": "3", "run.rounds": 1, "train.steps": 2}
    changes = quick("ffa", **{**few, **ON, **NOISE})
    given = task_settings(settings, case, tmp_path, **changes)
    got, want = play(given), in_the_clear(given)
    check_close(got, want)
    assert got.last["accepted"] == want.last["accepted"] == [0, 1, 2]
    for ran in (got, want):
        found = ran.last["certificate"]
        assert not found["not_certified"]
        assert found["layers"]
        assert found["excess"] < 1
