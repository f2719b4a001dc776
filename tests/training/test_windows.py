"""Long texts in windows: every token is predicted once, and windows of a row stay in one place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.launch.doctor.the_rows import lengths
from fedlora.training import cache
from fedlora.training.data.batches import IGNORE, eval_batches
from fedlora.training.evaluate import evaluate
from fedlora.training.tasks.causal_lm import stretches
from fedlora.training.train import example_losses
from tests.conftest import WORDS
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]


@pytest.fixture
def long(settings: Settings, tmp_path: Path) -> dict[str, object]:
    """Plain texts of 3 to 60 words, and 8 tokens an example."""
    rows = [
        {"response": " ".join(WORDS[(n * 7 + k * (n + 1)) % len(WORDS)] for k in range(3 + n))}
        for n in range(58)
    ]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.path": str(file), "data.prompt": "", "data.max-length": 8,
               "data.long-texts": "windows", "data.test-size": 10, "clients.count": 2}  # fmt: skip
    return settings("llama", **quick("fedex", **changes))


@given(st.integers(1, 60), st.integers(2, 20))
def test_each_id_but_the_first_is_predicted_once_behind_those_before_it(n: int, size: int) -> None:
    found = stretches(list(range(n)), size)
    assert all(len(x) <= size for x in found)
    assert [i for x in found for i in x[1:]] == list(range(1, n))
    assert all(x == list(range(x[0], x[0] + len(x))) for x in found)


def test_the_loss_of_windows_is_that_of_the_definition(long: dict[str, object]) -> None:
    """A token a time, each row by itself, no padding."""
    config = Config.read(long)
    corpus = cache.corpus(config)
    model = cache.model(config, ())
    tokenizer = model.tokenizer
    slow: list[float] = []
    for text in corpus.test.response:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        at = 0
        while at < len(ids) - 1:
            part = ids[at : at + 8]
            with torch.no_grad():
                logits = model.peft(input_ids=torch.tensor([part])).logits[0].double()
            scores = [-logits[j - 1].log_softmax(0)[part[j]].item() for j in range(1, len(part))]
            slow.append(sum(scores) / len(scores))
            at += 7
    encoded = cache.encoded("central", -1, config, ())
    found: list[float] = []
    with torch.no_grad():
        for batch in eval_batches(encoded, 4):
            found += example_losses(model, batch).tolist()
    assert len(slow) > len(corpus.test)
    assert sorted(found) == pytest.approx(sorted(slow), rel=1e-5)


def test_a_row_s_windows_are_where_the_row_is_and_rows_are_counted_as_rows(
    long: dict[str, object],
) -> None:
    config = Config.read(long)
    corpus = cache.corpus(config)
    parts = [("central", -1, corpus.test)]
    parts += [("train", i, c.train) for i, c in enumerate(corpus.clients)]
    tokenizer = cache.model(config, ()).tokenizer
    for part, i, rows in parts:
        encoded = cache.encoded(part, i, config, ())
        assert set(encoded.rows.tolist()) == set(range(len(rows)))
        scored = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in eval_batches(encoded, 8))
        assert scored == sum(len(tokenizer(t)["input_ids"]) for t in rows.response)
    (told,) = [f.what for f in lengths(config, corpus, cache.model(config, ()))]
    assert "rows are longer than data.max-length = 8 tokens" in told
    rows = federate(long).summary["rows"]
    counted = [sum(x.values()) for x in (rows["test"], *rows["train"], *rows["held"])]
    assert sum(counted) == sum(
        s["read"] - sum(x["rows"] for x in s["left"]) for s in rows["sources"]
    )
    cut = Config.read({**long, "data.long-texts": "cut"})
    assert len(cache.encoded("central", -1, cut, ())) == len(corpus.test)


def test_a_client_trains_on_all_windows_and_says_how_many(long: dict[str, object]) -> None:
    ran = federate(long)
    config = Config.read(long)
    lines = [json.loads(x) for x in (ran.directory / "clients.jsonl").read_text().splitlines()]
    windows = [len(cache.encoded("train", i, config, ())) for i in range(2)]
    assert [x["train_examples"] for x in lines] == windows
    assert [x["untokenised"] for x in lines] == [None, None]
    assert sum(windows) > sum(len(c.train) for c in cache.corpus(config).clients)
    assert (evaluate(cache.model(config, ()), cache.encoded("central", -1, config, ()), config)
            or {}).keys() == {"loss", "perplexity"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.prompt": "text"}, "a response is learned behind its prompt"),
        ({"data.chat-template": True}, "a response is learned behind its prompt"),
        ({"model.task": "classification"}, "a label is of a whole text"),
        ({"data.max-length": 1}, "must be 2 or more"),
        ({"privacy.epsilon": 3.0, "clients.ranks": "3"}, "it protects a row"),
    ],
)
def test_windows_are_refused_where_a_part_of_a_text_is_no_example(
    long: dict[str, object], changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.long-texts = 'windows'.*{says}"):
        preflight.read({**long, **changes})
