"""How alike clients' A are, and their B: the mean cosine of the pairs of clients.

python -m benchmarks.likeness RUN [RUN ...]     runs of one setting, of several seeds

Of the updates that runs keep (output.keep-updates), of their first round, in which all clients
began with the same A and with B = 0. So a cosine of B is one of what was learned, while A is close
to where it began: the paper's figure is of this cosine, and so is this.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor


def cosine(xs: Sequence[Tensor]) -> float:
    """The mean cosine over all pairs; NaN of fewer than two."""
    flat = [x.double().flatten() for x in xs]
    found = [
        float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))
        for a, b in itertools.combinations(flat, 2)
    ]
    return sum(found) / len(found) if found else float("nan")


def likeness(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """By side, the mean over modules of the clients' mean cosine."""
    found = {}
    for side in ("A", "B"):
        names = [n for n in updates[0] if n.endswith(f".{side}")]
        found[side] = sum(cosine([u[n] for u in updates]) for n in names) / len(names)
    return found


def of_run(run: Path, round: int = 1) -> dict[str, float]:
    """The likeness of a run's updates in a round; SystemExit where it kept none."""
    paths = sorted((run / "updates" / f"round-{round:03}").glob("client-*.safetensors"))
    if not paths:
        raise SystemExit(f"{run}: no updates of round {round}: a run keeps them with "
                         "output.keep-updates = true, in its directory")  # fmt: skip
    return likeness([load_file(path) for path in paths])


def interval(gaps: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds, by t."""
    x = torch.tensor(gaps, dtype=torch.float64)
    mean, n = float(x.mean()), len(x)
    half = float(stats.t.ppf(0.975, n - 1)) * float(x.std()) / n**0.5 if n > 1 else float("nan")
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    found = [of_run(run) for run in parser.parse_args().runs]
    for side in ("A", "B"):
        print(side, " ".join(f"{x[side]:.3f}" for x in found))
    mean, low, high = interval([x["A"] - x["B"] for x in found])
    print(f"A less B: {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}, {len(found)} seeds")


if __name__ == "__main__":
    main()
