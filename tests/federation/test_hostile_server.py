"""A server whose settings and names are no others than they should be, or whose node refuses them.

Whatever a message holds, no file is opened and no directory made outside of the node's own: an
audit hook sees every one that Python opens while the handler runs.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app.app import app as client_app
from fedlora.config.possible import is_one_name, is_path_name
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, WireError
from fedlora.federation.client.job import read_config
from fedlora.federation.client.node_config import KEYS, check_node_config
from fedlora.federation.wire.job import Job, job_of
from fedlora.federation.wire.messages import pack_download
from fedlora.federation.wire.same_machine import OWN_MACHINE
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Download
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
HOSTILE = [
    "../../elsewhere", "..", ".", ".hidden", "a/b", "/etc/elsewhere", "a\\b", "a\0b", "", "a\n",
    "\x1b[2K", "x" * 129, "~", "$HOME", "a b", "\u00e9", "\u202e",
]  # fmt: skip
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")
_SEEN: list[list[str]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _SEEN and event in WRITES:
        names = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
        _SEEN[-1].extend(os.fsdecode(x) for x in names if isinstance(x, str | bytes))


@pytest.fixture(scope="module", autouse=True)
def _watched() -> None:
    sys.addaudithook(_hook)  # for good: there is no way to take one off


@contextmanager
def opened() -> Iterator[list[str]]:
    """Every path that this process opens, makes, renames or removes meanwhile."""
    _SEEN.append([])
    try:
        yield _SEEN[-1]
    finally:
        _SEEN.pop()


def node(tmp_path: Path, tiny: Mapping[str, str], **more: object) -> dict[str, Any]:
    """A deployed node's own config: its rows, and a directory for its memory."""
    own = {"data-path": tiny["rows"], "memory": str(tmp_path / "node" / "memory")}
    return {OWN_MACHINE: False, **own, **more}


def ask(
    given: Mapping[str, object],
    own: Mapping[str, Any],
    job: Mapping[str, Any] = {},
    download: Mapping[str, Any] = {},
    kind: str = "train",
) -> tuple[Message, list[str]]:
    """A node's answer to a message whose records have these fields, and what it opened."""
    config = Config.read(given)
    made = Job(
        1, "t" * 32, "i" * 8, 0, {}, 0, 0, "", ("colour", "animal", "number"),
        config=config.identity(),
    ).record()  # fmt: skip
    content = pack_download(Download(Factors(), frozenset({"A"})), "float32")
    content["download"] = ConfigRecord({**content.config_records["download"], **download})
    content["job"] = ConfigRecord({**made, **job})
    for name in download.get("base", []):
        content[f"base-{name}"] = content["send"]
    with LocalGrid(client_app, 1, config.flat(), node_configs={0: own}) as grid:  # type: ignore[arg-type]
        message = Message(content, 1000, kind)
        message.metadata.__dict__["_message_id"] = "0" * 32
        with opened() as paths:
            reply = client_app(message, grid.contexts[1000])
    assert reply is not None
    return reply, paths


def outside(paths: list[str], given: Mapping[str, object], own: Mapping[str, Any]) -> list[str]:
    """Of these, what lies neither in the node's directory, nor in the installed code, the model or
    the rows that every honest message has it read."""
    allowed = [
        Path(str(own["memory"])), Path(str(given["model.path"])), Path(str(own["data-path"])),
        Path(str(given["data.path"])), Path(sys.prefix), Path(sys.base_prefix),
        Path(__file__).parents[2], Path("/proc"), Path("/sys"), Path("/dev"), Path("/usr"),
    ]  # fmt: skip
    found = []
    for path in paths:
        if "\0" in path or ".." in Path(path).parts:
            found.append(path)
            continue
        here = Path(os.path.abspath(path))
        near = any(here == a or a in here.parents or here in a.parents for a in allowed)
        cached = "huggingface" in path or "datasets" in path or path.endswith((".py", ".pyc"))
        if not near and not cached and here.suffix not in (".lock",):
            found.append(path)
    return found


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["token", "incarnation"])
def test_a_name_of_a_job_that_is_no_name_is_refused_before_anything_is_opened(
    settings: Settings, tmp_path: Path, tiny: dict[str, str], field: str, name: str
) -> None:
    own = node(tmp_path, tiny)
    given = settings(**quick("fedavg"))
    for kind in ("train", "evaluate", "query.collect", "train.secagg_setup"):
        reply, paths = ask(given, own, {field: name}, kind=kind)
        assert reply.has_error()
        assert f"the job's {field}" in reply.error.reason
        assert not outside(paths, given, own)
        assert not [p for p in paths if p.startswith((tiny["bert"], tiny["rows"]))]
    assert not Path(str(own["memory"])).exists()


@pytest.mark.parametrize("field", ["round", "client", "memory-round", "base-number", "last-round"])
@pytest.mark.parametrize("value", ["../../elsewhere", -1, 2**31, 1.5, True, b"../x", [1]])
def test_a_number_of_a_job_that_is_none_is_refused(
    settings: Settings, tmp_path: Path, tiny: dict[str, str], field: str, value: Any
) -> None:
    own = node(tmp_path, tiny)
    reply, _ = ask(settings(**quick("fedavg")), own, {field: value})
    assert reply.has_error()
    assert not Path(str(own["memory"])).exists()


@pytest.mark.parametrize("name", ["../../../elsewhere", "/tmp/elsewhere", "-1"])
def test_a_version_of_the_base_that_is_no_number_is_written_nowhere(
    settings: Settings, tmp_path: Path, tiny: dict[str, str], name: str
) -> None:
    own = node(tmp_path, tiny)
    given = settings(**quick("flora"))
    reply, paths = ask(given, own, {"base-number": 1}, {"base": [name]})
    assert reply.has_error()
    assert "base: must be a whole number" in reply.error.reason
    assert not [p for p in paths if "elsewhere" in p]


@pytest.mark.parametrize("name", ["../../x", "..", ".", ".ssh", "/etc", "a/b", "a\\b", "a\nb", ""])
def test_a_run_name_that_leaves_its_directory_is_no_config(settings: Settings, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        Config.read(settings(**quick("fedavg", **{"run.name": name})))


@pytest.mark.parametrize("name", ["$(x)", "a b", "\u00e9", "x" * 129])
def test_a_node_takes_plain_run_names_only(
    settings: Settings, tmp_path: Path, tiny: dict[str, str], name: str
) -> None:
    own = node(tmp_path, tiny)
    reply, _ = ask(settings(**quick("fedavg", **{"run.name": name})), own)
    assert "run.name: must be letters" in reply.error.reason
    assert not Path(str(own["memory"])).exists()


def test_a_node_does_not_trust_the_servers_word_on_code_of_a_model(
    settings: Settings, tmp_path: Path, tiny: dict[str, str]
) -> None:
    given = settings(**quick("fedavg", **{"model.trust-remote-code": True}))
    own = node(tmp_path, tiny)
    reply, paths = ask(given, own)
    assert "model.trust-remote-code = true: this node runs no code" in reply.error.reason
    assert not [p for p in paths if p.startswith(tiny["bert"])]
    allowed, _ = ask(given, {**own, "trust-remote-code": True})
    assert "trust-remote-code" not in (allowed.error.reason if allowed.has_error() else "")


def test_in_a_simulation_the_user_trusts_what_the_user_wrote(settings: Settings) -> None:
    given = settings(**quick("fedavg", **{"model.trust-remote-code": True, "run.rounds": 1}))
    assert federate(given).rounds[1]["accepted"] == [0, 1, 2]


def test_an_honest_message_opens_nothing_outside(
    settings: Settings, tmp_path: Path, tiny: dict[str, str]
) -> None:
    """The baseline, by the same measure; and the measure sees what is opened."""
    own, given = node(tmp_path, tiny), settings(**quick("fedavg"))
    _, paths = ask(given, own, kind="evaluate")
    assert not outside(paths, given, own)
    want = [str(tmp_path / "elsewhere"), str(tmp_path / "there")]
    with opened() as seen:
        Path(want[0]).write_text("x")
        Path(want[0]).rename(want[1])
    assert {*want} == {*outside(seen, given, own)}


# -- a node's own config --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_epsilon", 1.0, 'did you mean "max-epsilon"'),
        ("max-epsilo", 1.0, 'did you mean "max-epsilon"'),
        ("Max-Epsilon", 1.0, "no such key"),
        ("secure_aggregation", True, 'did you mean "secure-aggregation"'),
        ("zzz", 1, "there are partition-id"),
        ("max-epsilon", "1.0", "must be int or float"),
        ("max-epsilon", -1.0, "must be 0 or more"),
        ("max-epsilon", float("nan"), "must be 0 or more"),
        ("max-epsilon", True, "must be int or float"),
        ("secure-aggregation", 1, "must be bool"),
        ("secure-aggregation", "true", "must be bool"),
        ("own-machine", "yes", "must be bool"),
        ("rank", -1, "must be 0 or more"),
    ],
)
def test_a_node_key_that_is_none_is_an_error_and_no_missing_limit(
    key: str, value: Any, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"node config, {key}") as caught:
        check_node_config({key: value})
    assert says in str(caught.value)


def test_a_node_counts_epsilon_at_its_own_delta_whatever_a_server_says(
    settings: Settings, tmp_path: Path
) -> None:
    """At a delta near 1 any number of rounds would cost nothing."""
    given = Config.read(settings(**{"privacy.epsilon": 1.0, "privacy.delta": 0.9}))
    told = Job(1, "run", "start", 0, {}, 0, 0, "", (), config=given.identity())
    for node, delta in ({}, 1e-5), ({"delta": 1e-7}, 1e-7), ({OWN_MACHINE: True}, 0.9):
        own = {"memory": str(tmp_path), OWN_MACHINE: False, **node}
        context = Context(1, 2, own, RecordDict(), given.flat())
        assert read_config(context, told).privacy.delta == delta


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_node_with_a_misspelt_limit_answers_nothing(
    settings: Settings, tmp_path: Path, tiny: dict[str, str], kind: str
) -> None:
    own = node(tmp_path, tiny, max_epsilon=1.0)
    reply, _ = ask(settings(**quick("fedavg")), own, kind=kind)
    assert reply.has_error()
    assert reply.error.reason.startswith("NodeFileError: this node's own settings cannot")


def test_every_key_that_the_code_asks_a_node_for_is_a_known_one() -> None:
    import re

    root, asked = Path(__file__).parents[2] / "fedlora", set()
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "node_config" in text:
            asked |= {*re.findall(r"node(?:_config)?\.get\(\"([a-z-]+)\"", text)}
    assert len(asked) >= 8
    assert asked <= KEYS.keys()


@pytest.mark.parametrize("changes", ["[" * 3000, "[1]", "3", "{", "null", '"x"'])
def test_changes_of_a_job_that_are_none_are_said_as_such(changes: str) -> None:
    """And not as a bug of the node, of whatever type the error would be."""
    record = {**Job(1, "t", "i", 0, {"m": 2}, 0, 0, "", ()).record(), "changes": changes}
    with pytest.raises(WireError, match="no job that can be read"):
        job_of(RecordDict({"job": ConfigRecord(record)}))


def test_a_name_for_a_path_is_plain_and_bounded() -> None:
    assert not [x for x in HOSTILE if is_path_name(x)]
    good = ["run", "a" * 128, "fedex-0.3_seed-1", "-x", "_", "0" * 32]
    assert [x for x in good if is_path_name(x)] == good
    assert [x for x in ["a b", "it's", "\u00e9", "$(x)"] if not is_one_name(x)] == []
    assert not [x for x in (None, 1, b"a", ["a"]) if is_path_name(x)]
