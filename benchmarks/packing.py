"""train.packing beside the same steps without: time, and tokens that are computed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import Row, paired
from fedlora.config.reader import Config
from fedlora.strategies.base import Client
from fedlora.training import cache
from fedlora.training.train import Fit, fit

INSTRUCT = Path(__file__).parent.parent / "simulations" / "experiments" / "instruct.toml"
WORDS = (4, 5, 6, 8, 10, 12, 16, 24, 40, 90)
"""Of a prompt: as uneven as conversations are. TREC's questions themselves are nearly of one."""


def rows(quick: bool) -> Iterator[Row]:
    """The steps of one client of few rows, and of one of many, on SmolLM2-135M."""
    torch.set_num_threads(1)
    for n, steps, times in ((16, 1, 1),) if quick else ((16, 1, 3), (160, 4, 2)):
        with tempfile.TemporaryDirectory() as d:
            yield from _beside(_config(Path(d), n, steps), times)


def _beside(config: Config, times: int) -> Iterator[Row]:
    model, encoded = cache.model(config, ()), cache.encoded("train", 0, config, ())
    client = Client(0, model.layers(dict.fromkeys(model.shapes, 8)))
    home, found = model.init_factors(client, 0), dict[bool, Fit]()

    def work(pack: bool) -> None:
        train = config.train.model_copy(update={"packing": pack})
        model.config = config.model_copy(update={"train": train})
        model.load(home)
        found[pack] = fit(model, encoded, frozenset({"A", "B"}), model.config, 1, 0)

    work(True)  # its memory is the process's from here on
    ratio, _, _ = paired(lambda: work(False), lambda: work(True), times)
    what = f"packing, a client of {len(encoded)} rows"
    how = (
        f"SmolLM2-135M in float32, {config.train.steps} steps of 16 examples of {WORDS[0]} to "
        f"{WORDS[-1]} words and a few, one thread; without: sorted by length, padded to each "
        "batch's longest"
    )
    yield Row(f"{what}: speed over the same steps without", ratio, "", f"CPU time; {how}")
    computed = found[True].tokens / found[False].tokens
    yield Row(f"{what}: tokens computed / without", computed, "", "padding included")
    gap = abs(found[True].loss - found[False].loss) / found[False].loss
    yield Row(f"{what}: the loss's difference, relative", gap, "<= 1e-5", "to rounding")


def _config(directory: Path, n: int, steps: int) -> Config:
    """A client with n rows of made-up questions, and one beside it."""
    chance = torch.Generator().manual_seed(0)
    known = ("where", "is", "the", "river", "that", "runs", "by", "old", "mills", "of", "a", "town")
    lines = []
    for i in range(2 * n + 40):
        words = [known[k] for k in torch.randint(len(known), (WORDS[i % 10],), generator=chance)]
        lines.append(f"NUM:count {' '.join(words)} {i}")
    path = directory / "rows.txt"
    path.write_text("\n".join(lines))
    return Config.load(INSTRUCT, {
        "run.out": str(directory), "data.path": str(path), "data.limit": 0, "data.test-size": 20,
        "data.max-length": 256, "data.partition": "iid", "clients.count": 2, "train.steps": steps,
        "train.batch-size": 16, "train.precision": "float32", "train.packing": True,
        "evaluate.baselines": False, "data.map": "NUM=number",
    })  # fmt: skip
