"""The likeness of clients' factors, by hand."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.likeness import cosine, interval, likeness, of_run


def test_likeness_is_the_mean_cosine_of_the_pairs(tmp_path: Path) -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert cosine([x, y, x]) == pytest.approx((2 / 2**0.5 + 1) / 3)
    assert math.isnan(cosine([x]))
    updates = [{"m.A": x, "m.B": x, "n.A": y, "n.B": y}, {"m.A": x, "m.B": y, "n.A": y, "n.B": -y}]
    assert likeness(updates) == {"A": pytest.approx(1), "B": pytest.approx((0.5**0.5 - 1) / 2)}
    (tmp_path / "updates" / "round-001").mkdir(parents=True)
    for i, tensors in enumerate(updates):
        path = tmp_path / "updates" / "round-001" / f"client-{i}.safetensors"
        save_file({k: t.clone() for k, t in tensors.items()}, path)
    assert of_run(tmp_path) == likeness(updates)


def test_the_interval_is_students_over_seeds() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
    assert mean - low == pytest.approx(high - mean)


def test_a_directory_without_updates_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="keep-updates"):
        of_run(tmp_path)
