"""What every task promises: its loss, its scores, its gradients, its federation and its exports."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn import metrics

from fedlora import Config, export, register_task, simulate
from fedlora.config import task_names
from fedlora.errors import ConfigError, DataError
from fedlora.privacy.per_example import kept_apart
from fedlora.privacy.probe import check_apart
from fedlora.training import cache
from fedlora.training.data.batches import collate
from fedlora.training.data.corpus import load_node
from fedlora.training.evaluate import evaluate
from fedlora.training.tasks import TASKS, task_of
from fedlora.training.tasks import _added as added
from fedlora.training.train import example_losses
from tests.support.private_setting import Setting
from tests.support.task_rows import MADE, task_settings

Settings = Callable[..., dict[str, object]]
Array = np.ndarray[Any, Any]


def cross_entropy(z: Array, y: Array) -> float:
    return float(-np.log(np.exp(z - z.max())[int(y)] / np.exp(z - z.max()).sum()))


def next_tokens(z: Array, y: Array) -> float:
    at = [t for t in range(1, len(y)) if y[t] >= 0]
    return float(np.mean([cross_entropy(z[t - 1], y[t]) for t in at]))


def each_label(z: Array, y: Array) -> float:
    p = special.expit(z)
    return float(np.mean(-(y * np.log(p) + (1 - y) * np.log(1 - p))))


def each_word(z: Array, y: Array) -> float:
    return float(np.mean([cross_entropy(z[t], y[t]) for t in range(len(y)) if y[t] >= 0]))


LOSS: dict[str, Callable[[Array, Array], float]] = {
    "classification": cross_entropy,
    "multi-label": each_label,
    "regression": lambda z, y: float((z[0] - y) ** 2),
    "token-classification": each_word,
    "causal-lm": next_tokens,
    "seq2seq": each_word,  # a token's label is at its own place, as a word's is
    "image-classification": cross_entropy,
}
"""An example's loss by its definition, of its logits and its labels in float64."""


def of_classes(z: Array, y: Array) -> dict[str, float]:
    said = z.argmax(1)
    return {
        "accuracy": metrics.accuracy_score(y, said),
        "macro_f1": metrics.f1_score(y, said, average="macro"),
        "loss": float(np.mean([cross_entropy(*row) for row in zip(z, y, strict=True)])),
    }


def of_labels(z: Array, y: Array) -> dict[str, float]:
    said = (z > 0).astype(int)
    return {
        "accuracy": float((said == y).all(1).mean()),
        "micro_f1": metrics.f1_score(y, said, average="micro", zero_division=0),
        "macro_f1": metrics.f1_score(y, said, average="macro", zero_division=0),
        "loss": float(np.mean([each_label(*row) for row in zip(z, y, strict=True)])),
    }


def of_numbers(z: Array, y: Array) -> dict[str, float]:
    return {
        "loss": metrics.mean_squared_error(y, z[:, 0]),
        "mae": metrics.mean_absolute_error(y, z[:, 0]),
        "pearson": float(np.corrcoef(z[:, 0], y)[0, 1]),
        "spearman": float(stats.spearmanr(z[:, 0], y).statistic),
    }


SCORES = {
    "classification": of_classes,
    "image-classification": of_classes,
    "multi-label": of_labels,
    "regression": of_numbers,
}
"""Scores of a whole set by the libraries, of all logits and labels."""
TOKENS = ("token-classification", "causal-lm", "seq2seq")
"""Tasks whose loss counts every scored token of the whole set once, long rows more than short."""


@pytest.fixture(params=MADE)
def case(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def setting(settings: Settings, case: str, tmp_path: Path) -> Setting:
    return Setting(task_settings(settings, case, tmp_path))


def slowly(s: Setting, task: str, batch: Any) -> list[float]:
    """Each example's loss by its definition."""
    if task == "preference":
        other = {k.removeprefix("other_"): x for k, x in batch.items() if k.startswith("other_")}
        chosen, rejected = (log_p(s, {k: x[k] for k in other}) for x in (batch, other))
        of = zip(chosen, rejected, batch["reference"].double().tolist(), strict=True)
        return [float(-np.log(special.expit(0.1 * ((w - a) - (l - b))))) for w, l, (a, b) in of]
    rows = zip(logits_of(s, batch), batch["labels"].numpy(), strict=True)
    return [LOSS[task](z, y) for z, y in rows]


def log_p(s: Setting, batch: Any) -> list[float]:
    """The log-probability of each row's own answer."""
    rows = zip(logits_of(s, batch), batch["labels"].numpy(), strict=True)
    return [-next_tokens(z, y) * int((y[1:] >= 0).sum()) for z, y in rows]


def logits_of(s: Setting, batch: Any) -> Array:
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        found: Array = s.model.peft(**inputs).logits.double().numpy()
    return found


@pytest.mark.parametrize("left", [False, True])
def test_the_loss_of_a_batch_is_the_definition_row_by_row(
    setting: Setting, case: str, left: bool
) -> None:
    s = setting
    if left and case != "causal-lm":
        pytest.skip("padding before a text is of models that ask for it")
    s.rows = replace(s.rows, left=left)
    batch = collate(s.rows, torch.arange(7))
    with torch.no_grad():
        found = example_losses(s.model, batch).double()
        slow = s.model.task.defined(s.model, batch)
    want = torch.tensor(slowly(s, MADE[case][0], batch), dtype=torch.float64)
    torch.testing.assert_close(slow, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert want.std() > 1e-3, "examples that differ in nothing show nothing"


def test_an_examples_loss_does_not_depend_on_what_is_beside_it(setting: Setting) -> None:
    s, some = setting, [0, 3, 5, 8, 11]
    together = s.losses(some)
    alone = torch.cat([s.losses([i]) for i in some])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.losses(some[::-1]).flip(0), together, rtol=1e-5, atol=1e-6)
    wide = example_losses(s.model, collate(s.rows, torch.tensor(some), 40))
    torch.testing.assert_close(wide, together, rtol=1e-5, atol=1e-6)


def test_how_many_numbers_a_loss_is_a_mean_of_is_counted(setting: Setting) -> None:
    want = setting.model.task.scored(setting.rows)
    for i in range(5):
        labels = collate(setting.rows, torch.tensor([i]))["labels"]
        labels = labels[:, 1:] if setting.model.task.shifted else labels
        assert int((labels != -100).sum()) == int(want[i])


def test_scores_are_the_libraries_on_the_whole_set_in_batches_of_any_size(
    settings: Settings, case: str, tmp_path: Path
) -> None:
    s = Setting(task_settings(settings, case, tmp_path), torch.float32)
    found = []
    for size in (1, 7, 64):
        how = s.config.evaluate.model_copy(update={"batch_size": size})
        found.append(evaluate(s.model, s.rows, s.config.model_copy(update={"evaluate": how})))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)
    task, ones = MADE[case][0], [collate(s.rows, torch.tensor([i])) for i in range(len(s.rows))]
    if task not in SCORES:
        losses = np.array([slowly(s, task, one)[0] for one in ones])
        weights = s.model.task.scored(s.rows).numpy() if task in TOKENS else None
        assert found[0]["loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-4)
    if (score := SCORES.get(task)) is None:
        return
    z = np.concatenate([logits_of(s, one) for one in ones])
    y = np.concatenate([one["labels"].numpy() for one in ones])
    assert found[0] == pytest.approx(score(z, y), rel=1e-4)


def test_per_example_gradients_are_those_of_batches_of_one(setting: Setting) -> None:
    s, some = setting, [0, 3, 5, 8]
    check_apart(s.model, s.live)
    with kept_apart(s.model.peft, s.model.active, frozenset(s.params), s.model.masks) as sink:
        s.losses(some).sum().backward()
        found = sink.take(len(some))
    for i, alone in enumerate(s.one_by_one(some)):
        size = math.sqrt(sum(float(g.square().sum()) for g in alone.values()))
        assert size > 0
        for p in s.params:
            assert float((found[p].dense()[i] - alone[p]).abs().max()) <= 1e-6 * max(size, 1)


def test_rows_that_are_written_are_read_again(setting: Setting, tmp_path: Path) -> None:
    task, data = setting.model.task, setting.config.data
    rows = cache.corpus(setting.config).client(0).train
    columns = {k: v for k, v in task.written(rows, data).items() if k and v}
    import json

    file = tmp_path / "node.jsonl"
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    node = data.model_copy(update={"node_path": str(file), "client_test_fraction": 0.0})
    again = load_node(node, task, setting.labels).train
    assert sorted(zip(*(x for x in again.columns[:6] if x), strict=True)) == sorted(
        zip(*(x for x in rows.columns[:6] if x), strict=True)
    )


FLOOR = {"classification": "majority class", "multi-label": "majority of each label",
         "regression": "training mean",
         "token-classification": "most frequent tag of each word",
         "image-classification": "majority class"}  # fmt: skip


def test_it_federates_is_proved_and_exports(settings: Settings, case: str, tmp_path: Path) -> None:
    more = {"run.rounds": 2, "strategy.name": "fedex", "evaluate.baselines": True,
            "evaluate.generate-tokens": 4}  # fmt: skip
    run = simulate(task_settings(settings, case, tmp_path, **more))
    assert run.rounds["proof.deviation"].dropna().max() < 1e-5
    assert run.rounds["certificate.deviation"].dropna().max() < 1e-5
    losses = run.rounds["train_loss"].dropna()
    assert len(losses) == 2
    assert losses.iloc[-1] < losses.iloc[0]
    final, floor = run.summary["final"], FLOOR.get(MADE[case][0])
    assert all(math.isfinite(value) for value in final.values()), final
    assert floor is None or floor in run.summary["baselines"]
    for merged in (False, True):
        assert export(run, tmp_path / f"out-{merged}", merged=merged).deviation < 1e-4


ASKED = {
    "pairs": lambda t: t(["a text", "another"], ["beside the one", "the other"], padding=True),
    "chat": lambda t: t.apply_chat_template(
        [[{"role": "user", "content": "a question"}]], add_generation_prompt=True, return_dict=True
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", [*ASKED], indirect=True)
def test_a_cards_lines_ask_the_model_in_the_form_of_its_rows(
    settings: Settings, case: str, tmp_path: Path
) -> None:
    model = Setting(task_settings(settings, case, tmp_path), torch.float32).model
    known = {"tokenizer": model.tokenizer, "model": model.peft, "logits": lambda b: model.logits(b)}
    exec(model.task.script(model.config.data, None), known | {"LABELS": model.labels}, known)
    assert known["batch"]["input_ids"].tolist() == ASKED[case](model.tokenizer)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"privacy.level": "example", "privacy.epsilon": 8.0, "privacy.clip-norm": 1.0},
    {"secure.aggregation": True, "clients.ranks": "3", "strategy.name": "fedavg"},
    {"model.pooling": "mean"},
])  # fmt: skip
def test_it_trains_under_privacy_in_masked_sums_and_with_a_mean_pooled_head(
    settings: Settings, case: str, tmp_path: Path, changes: dict[str, object]
) -> None:
    if "model.pooling" in changes and not task_of(MADE[case][0]).pooled:
        with pytest.raises(ConfigError, match=r"model\.pooling"):
            simulate(task_settings(settings, case, tmp_path, **changes))
        return
    run = simulate(task_settings(settings, case, tmp_path, **{"run.rounds": 2, **changes}))
    assert len(run.rounds) >= 2
    assert all(math.isfinite(value) for value in run.summary["final"].values())
    if "secure.aggregation" not in changes:
        assert export(run, tmp_path / "out").deviation < 1e-4


# -- a task from outside --------------------------------------------------------------------------


class Halved(TASKS["classification"]):  # type: ignore[misc, valid-type]
    """A classification whose loss counts half."""

    name = "halved"

    def losses(self, net: Any, batch: Any) -> torch.Tensor:
        found: torch.Tensor = super().losses(net, batch) / 2
        return found

    def defined(self, net: Any, batch: Any) -> torch.Tensor:
        found: torch.Tensor = super().defined(net, batch) / 2
        return found


@pytest.fixture
def registered() -> Any:
    kinds = dict(task_names.KINDS)
    register_task(Halved)
    register_task(Halved)  # the same once more changes nothing
    yield Halved
    added.pop("halved")
    task_names.KINDS.clear()
    task_names.KINDS.update(kinds)


def test_a_registered_task_runs_as_fedloras_own(
    settings: Settings, registered: Any, tmp_path: Path
) -> None:
    given = task_settings(settings, "classification", tmp_path, **{"run.rounds": 1})
    half, whole = (
        simulate({**given, "model.task": task, "run.name": task})
        for task in ("halved", "classification")
    )
    assert half.rounds["train_loss"].iloc[-1] < 0.7 * whole.rounds["train_loss"].iloc[-1]
    assert export(half, tmp_path / "out").deviation < 1e-4


def test_a_task_that_lacks_a_part_or_takes_a_name_is_refused() -> None:
    class Bare:
        name = "bare"

    with pytest.raises(ConfigError, match=r"the task 'bare': it lacks auto, .*encode"):
        register_task(Bare)
    with pytest.raises(ConfigError, match="its name is taken by Classification"):
        register_task(type("Mine", (Halved,), {"name": "classification"}))
    with pytest.raises(ConfigError, match=r"model\.task = 'bare': must be one of 'classification'"):
        Config.read({"model.task": "bare"})


def test_what_is_known_of_a_task_before_it_is_imported_is_what_it_says() -> None:
    assert TASKS.keys() == task_names.KINDS.keys()
    for name, cls in TASKS.items():
        kind = task_names.KINDS[name]
        for part in ("pooled", "headed", "generates", "answers"):
            assert getattr(cls, part) == getattr(kind, part)


def test_a_loss_that_is_not_what_the_task_defines_is_seen_before_training(
    settings: Settings, registered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Halved, "defined", TASKS["classification"].defined)
    given = task_settings(settings, "classification", tmp_path, **{"model.task": "halved"})
    with pytest.raises(Exception, match=r"is not what model\.task = 'halved' defines"):
        simulate(given)


# -- what rows must be ----------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "change", "message"), [
    ("regression", {"data.path": "words"}, r"csv, line 2, has 'red' there, and .*learns numbers"),
    ("multi-label", {"data.path": "words"}, r"line 2, has 'red' there, no list: .*label-separator"),
    ("tokens", {"data.path": "words"}, r"line 2, has 'a b' there, no list: write a JSON list$"),
    ("causal-lm", {"data.response": "turns"}, r"no text .* conversations are named in data\.mess"),
    ("pairs", {"data.text-pair": "third"}, r'data\.text-pair = "third": .*no such column'),
    ("regression", {"data.partition": "dirichlet"}, r'set data\.partition = "iid"'),
])  # fmt: skip
def test_rows_of_another_task_are_refused_by_name(
    settings: Settings, tmp_path: Path, case: str, change: dict[str, str], message: str
) -> None:
    given = task_settings(settings, case, tmp_path, **change)
    if change.get("data.path") == "words":
        given["data.path"] = str(tmp_path / "words.csv")
        Path(str(given["data.path"])).write_text("text,label\na b,red\nc d,blue\n")
    if change.get("data.response") == "turns":
        given["data.path"] = str(tmp_path / "turns.jsonl")
        Path(str(given["data.path"])).write_text('{"text": "a", "turns": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=message):
        cache.corpus(Config.read(given))


def test_labels_between_a_separator_are_those_of_a_list(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = [f"a{i},{'x|y' if i % 2 else ''}" for i in range(40)]
    file.write_text("\n".join(["text,label", *rows]))
    given = task_settings(settings, "multi-label", tmp_path)
    config = Config.read({**given, "data.path": str(file), "data.label-separator": "|"})
    corpus = cache.corpus(config)
    assert corpus.labels == ("x", "y")
    assert {*corpus.test.target} == {"[]", '["x", "y"]'}
    without = cache.corpus(config.model_copy(update={
        "data": config.data.model_copy(update={"map": ("x=",)})
    }))  # fmt: skip
    assert {*without.test.target} == {"[]", '["y"]'}
