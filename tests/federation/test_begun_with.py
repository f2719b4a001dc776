"""A run goes on with the files that it began with, or says which are others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, DataError
from fedlora.federation.client.memory import ClientMemory
from fedlora.launch.doctor.the_run import experiment
from fedlora.training import cache
from fedlora.training.begun_with import begun_with, check_begun_with, digest_of_rows
from fedlora.training.data.corpus import Rows
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> dict[str, object]:
    """A run on copies of the tiny model and rows, which a test may change."""
    given = settings(**quick("fedex", **{"run.rounds": 1, "train.lr-schedule": "constant"}))
    model = shutil.copytree(str(given["model.path"]), tmp_path / "model")
    rows = shutil.copy(str(given["data.path"]), tmp_path / "rows.jsonl")
    return {**given, "model.path": str(model), "data.path": str(rows)}


def edited_labels(given: dict[str, object]) -> None:
    path = Path(str(given["data.path"]))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = sorted({x["label"] for x in lines})
    swapped = dict(zip(names, names[::-1], strict=True))
    text = "".join(json.dumps({**x, "label": swapped[x["label"]]}) + "\n" for x in lines)
    path.write_text(text)


def one_row_less(given: dict[str, object]) -> None:
    path = Path(str(given["data.path"]))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def other_weights(given: dict[str, object]) -> None:
    path = Path(str(given["model.path"]), "model.safetensors")
    tensors = load_file(path)
    name = next(n for n, x in tensors.items() if x.ndim > 1)
    save_file({**tensors, name: tensors[name] + 0.1}, path, {"format": "pt"})


def other_template(given: dict[str, object]) -> None:
    Path(str(given["model.path"]), "chat_template.jinja").write_text("{{ messages }}")


def nothing(given: dict[str, object]) -> None:
    path = Path(str(given["data.path"]))
    path.write_text(path.read_text())


def forget() -> None:
    cache.forget_data()
    cache._model.key = cache._model.value = None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited_labels, r"other rows.*data\.path"),
        (one_row_less, r"other rows.*data\.path"),
        (other_weights, r"another base.*model\.path"),
        (other_template, r"another tokenizer, chat template or image processor"),
        (nothing, ""),
    ],
)
def test_a_run_is_resumed_with_what_it_began_with_or_not_at_all(
    own: dict[str, object], change: Callable[[dict[str, object]], None], says: str
) -> None:
    """And doctor says so before."""
    federate(own)
    change(own)
    forget()
    again = {**own, "run.resume": True, "run.rounds": 2}
    found = [f.what for f in experiment(Config.read(again))[0] if f.level == "problem"]
    if not says:
        assert not found
        assert len(federate(again).rounds) == 3
        return
    with pytest.raises(CheckpointError, match=says) as caught:
        federate(again)
    assert str(caught.value) in found
    forget()


def test_a_run_without_the_record_is_resumed_as_before(own: dict[str, object]) -> None:
    Path(federate(own).directory, "begun_with.json").unlink()
    assert len(federate({**own, "run.resume": True, "run.rounds": 2}).rounds) == 3


def test_rows_that_differ_anywhere_differ_in_their_digest() -> None:
    rows = Rows(("a", "b"), ("x", "y"))
    others = [Rows(("a", "b"), ("y", "x")), Rows(("b", "a"), ("y", "x")), Rows(("a",), ("x",)),
              Rows(("a", "b"), ("x", "y"), ("", "r")), Rows(("a b",), ("x y",))]  # fmt: skip
    digests = [digest_of_rows([r]) for r in (rows, *others)]
    assert len({*digests, digest_of_rows([rows, Rows()])}) == 7
    assert digest_of_rows([Rows(("a", "b"), ("x", "y"))]) == digests[0]


def test_a_node_whose_rows_changed_since_its_first_round_refuses(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    memory.check_rows("one")
    ClientMemory(tmp_path, 3, "run").check_rows("one")
    ClientMemory(tmp_path, 3, "another run").check_rows("two")
    with pytest.raises(DataError, match=r"client 3 began this run with other rows.*node-path"):
        ClientMemory(tmp_path, 3, "run").check_rows("two")


def test_what_a_run_began_with_is_the_same_in_every_process(own: dict[str, object]) -> None:
    config = Config.read(own)
    found = []
    for _ in range(2):
        forget()
        corpus = cache.corpus(config)
        found.append(begun_with(cache.model(config, corpus.labels), corpus))
        torch.manual_seed(1)
    assert found[0] == found[1]


def test_a_node_whose_file_changed_between_two_rounds_is_refused_by_itself(
    own: dict[str, object], tmp_path: Path
) -> None:
    """The server cannot see it: a node's rows are its own."""
    lines = Path(str(own["data.path"])).read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines[:30]))
    nodes = {}
    for i in range(3):
        file = tmp_path / f"node-{i}.jsonl"
        file.write_text("".join(lines[30 + i :: 3]))
        nodes[i] = {"data-path": str(file)}
    changes = {"data.path": "", "data.test-path": str(tmp_path / "test.jsonl")}
    given = {**own, **changes, "run.rounds": 2}
    federate(given, nodes=nodes)
    changed = Path(nodes[1]["data-path"])
    changed.write_text("".join(changed.read_text().splitlines(keepends=True)[1:]))
    forget()
    done = federate({**given, "run.resume": True, "run.rounds": 3}, nodes=nodes)
    failed = [[f["client"] for f in r["failures"]] for r in done.rounds if r["round"]]
    assert failed == [[], [], [1]]
    (failure,) = done.rounds[-1]["failures"]
    assert "client 1 began this run with other rows" in failure["reason"]


def test_of_an_older_run_the_digest_of_the_base_is_a_part_and_nothing_else_is() -> None:
    now = dict.fromkeys(("rows", "labels", "tokenizer"), "0" * 16) | {
        "adapter": "",
        "base": "a" * 64,
    }
    check_begun_with({**now, "base": "a" * 16}, now, "run")
    for key, x in ("base", "b" * 16), ("base", "a" * 63 + "b"), ("adapter", "0" * 16):
        with pytest.raises(CheckpointError, match="was begun with another"):
            check_begun_with({**now, key: x}, now, "run")
    with pytest.raises(CheckpointError, match="another adapter"):
        check_begun_with(now, {**now, "adapter": "0" * 16}, "run")
