"""Frozen layers below the first adapted one are computed once an example, and change no result."""

from collections.abc import Callable, Sequence

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.strategies.base import Client, seeded
from fedlora.training.data.batches import Encoded, batches, collate, synthetic
from fedlora.training.model.model import Model
from fedlora.training.model.prefix_cache import GROUP, WIDTH, ahead
from fedlora.training.train import fit
from tests.support.by_task import encode
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
LAST = {"lora.layers": "-1", "model.dropout": 0.0}


def ready(settings: Settings, kind: str, **changes: object) -> tuple[Model, Encoded, Config]:
    from tests.support.by_task import load

    config = Config.read(settings(kind, **{**LAST, **changes}))
    corpus = load(config.data, config.model.task, 1, 0)
    labels = corpus.labels
    model = Model(config, labels)
    model.load(model.init_factors(Client(0, model.layers(dict.fromkeys(model.shapes, 2))), 0))
    return model, encode(corpus.client(0).train, model.tokenizer, labels, 64), config


def epoch(model: Model, rows: Encoded, seed: int, look: bool = False) -> list[torch.Tensor]:
    """The logits of every batch of an epoch."""
    found = []
    with torch.no_grad():
        drawn = batches(rows, 5, seeded(seed, 0, 0, "batches"))
        seen = ahead(model.prefix, model.peft, drawn, "float32")
        for batch in seen if look else drawn:
            batch.pop("labels")
            found.append(model.logits(batch))
    return found


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_what_was_forgotten_comes_back_to_the_same_bits(settings: Settings, kind: str) -> None:
    roomy, rows, _ = ready(settings, kind, **{"train.prefix-cache": 64})
    tight, _, _ = ready(settings, kind, **{"train.prefix-cache": 1})
    assert roomy.prefix
    assert tight.prefix
    tight.prefix.room = 3000  # a few examples
    for seed in (0, 1):  # other batches, other neighbours, other padding
        for x, y in zip(epoch(roomy, rows, seed), epoch(tight, rows, seed), strict=True):
            assert torch.equal(x, y)
    distinct = len({tuple(rows.ids[a:b].tolist()) for a, b in rows.starts.unfold(0, 2, 1)})
    assert roomy.prefix.computed == distinct, "once each, however often it is needed"
    assert tight.prefix.computed > distinct


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_batch_may_be_wider_than_its_longest_example(settings: Settings, kind: str) -> None:
    """As a private micro-batch is."""
    plain, rows, _ = ready(settings, kind)
    cached, _, _ = ready(settings, kind, **{"train.prefix-cache": 64})
    assert cached.prefix
    numbers = rows.lengths.argsort()[:3]
    longest = int(rows.lengths[numbers].max())
    batch = collate(rows, numbers, longest + 5)
    batch.pop("labels")
    there = batch["attention_mask"].bool()
    with torch.no_grad():
        found, want = cached.logits(batch), plain.logits(batch)
    assert found.shape == want.shape
    if found.ndim == 3:
        found, want = found[there], want[there]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("room", [2**20, 3000, 0])
def test_looking_ahead_changes_no_bit_and_saves_passes(settings: Settings, room: int) -> None:
    passes, results = [], []
    for look in (False, True):
        model, rows, _ = ready(settings, "bert", **{"train.prefix-cache": 64})
        assert model.prefix
        model.prefix.room = room
        entered: list[int] = []
        model.prefix._enter = counted(model.prefix._enter, entered)  # type: ignore[method-assign]
        results.append(epoch(model, rows, 0, look))
        passes.append(len(entered))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    if room == 2**20:
        assert passes[1] < passes[0]


def counted(real: Callable[..., torch.Tensor], calls: list[int]) -> Callable[..., torch.Tensor]:
    def enter(model: object, rows: Sequence[object], width: int) -> torch.Tensor:
        calls.append(len(rows))
        return real(model, rows, width)

    return enter


def test_looking_ahead_gives_the_same_batches_in_their_order(settings: Settings) -> None:
    model, rows, _ = ready(settings, "bert", **{"train.prefix-cache": 64})
    drawn = list(batches(rows, 5, seeded(0, 0, 0, "batches")))
    given = list(ahead(model.prefix, model.peft, iter(drawn), "float32"))
    assert all(x is y for x, y in zip(given, drawn, strict=True))
    assert model.prefix
    before = model.prefix.computed
    epoch(model, rows, 0)
    assert model.prefix.computed == before, "all of it was there"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_batched_as_they_come_the_results_differ_by_rounding(settings: Settings, kind: str) -> None:
    kept, rows, _ = ready(settings, kind, **{"train.prefix-cache": 64})
    plain, _, _ = ready(settings, kind)
    assert plain.prefix is None
    real = [b["attention_mask"].bool() for b in batches(rows, 5, seeded(0, 0, 0, "batches"))]
    for x, y, mask in zip(epoch(kept, rows, 0), epoch(plain, rows, 0), real, strict=True):
        x, y = (x, y) if kind == "bert" else (x[mask], y[mask])
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_the_layers_are_whole_again_after_each_batch(settings: Settings) -> None:
    model, rows, _ = ready(settings, "bert", **{"train.prefix-cache": 64})
    epoch(model, rows, 0)
    assert model.prefix
    assert all("forward" not in vars(layer) for layer in model.prefix.layers)


def test_examples_are_computed_in_groups_of_one_shape(settings: Settings) -> None:
    model, rows, _ = ready(settings, "bert", **{"train.prefix-cache": 64})
    assert model.prefix
    shapes = []
    inside = model.prefix.layers[0].intermediate
    inside.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    epoch(model, rows, 0)
    assert {shape[0] for shape in shapes} == {GROUP}
    assert {shape[1] % WIDTH for shape in shapes} == {0}


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_something_is_masked_in_every_group_and_rows_that_fill_it_are_by_themselves(
    settings: Settings, kind: str
) -> None:
    """Whether a kernel is given a mask must not depend on who else is in the group."""
    model, _, _ = ready(settings, kind, **{"train.prefix-cache": 64})
    assert model.prefix
    lengths = (16, 16, 13, 16, 9, *[16] * 6, 7)
    rows = synthetic(model.tokenizer, 0, lengths=lengths)
    real, seen = model.prefix._enter, list[list[int]]()

    def enter(peft: object, some: Sequence[torch.Tensor], width: int) -> torch.Tensor:
        seen.append([row.shape[1] for row in some])
        assert min(seen[-1]) < width
        return real(peft, some, width)  # type: ignore[arg-type]

    model.prefix._enter = enter  # type: ignore[method-assign]
    batch = collate(rows, torch.arange(len(lengths)))
    model.prefix.remember(model.peft, [batch])
    together = dict(model.prefix._kept)
    for n in range(len(lengths)):
        model.prefix._kept.clear()
        model.prefix.remember(model.peft, [collate(rows, torch.tensor([n]))])
        ((key, alone),) = model.prefix._kept.items()
        assert torch.equal(alone, together[key])
    full = [found for found in seen if 16 in found]
    assert all(len(found) == GROUP and {*found} == {16, 1} for found in full)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.layers": ""},  # nothing is frozen below the first layer
        {"model.dropout": 0.1},
        {"lora.modules-to-save": "word_embeddings"},
    ],
)
def test_it_is_off_where_the_prefix_trains_or_varies(settings: Settings, changes) -> None:
    model, _, _ = ready(settings, "bert", **{"train.prefix-cache": 64, **changes})
    assert model.prefix is None


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing_leaves_training_its_bits(settings: Settings, kind: str) -> None:
    trained = []
    for on in (False, True):
        given = {"train.prefix-cache": 64, "train.gradient-checkpointing": on, "train.steps": 3}
        model, rows, _ = ready(settings, kind, **given)
        assert model.prefix
        config = model.config
        fit(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
        assert model.prefix.computed
        trained.append(model.read())
    assert all(torch.equal(x, trained[1].B[m]) for m, x in trained[0].B.items())


def test_a_federation_with_it_ends_in_the_same_bytes_on_one_worker_and_on_two(
    settings: Settings,
) -> None:
    def run(name: str, workers: int) -> bytes:
        given = quick("fedex", **LAST, **{"train.prefix-cache": 8, "train.steps": 4})
        return federate(
            settings(**given, **{"run.name": name, "simulate.workers": workers})
        ).adapter

    assert run("one", 1) == run("two", 2)
