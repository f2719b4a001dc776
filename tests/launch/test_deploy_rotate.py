"""A node's key is exchanged for another, and the server learns of it."""

import shutil
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import DeployError
from fedlora.launch.deploy import host, keys
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.progress import nodes
from fedlora.launch.deploy.registering import registered, revoked, save, take_new_keys
from fedlora.launch.deploy.supervise import read_state
from tests.support.deployment import bring_up, brought_up, prepared, ran


@pytest.fixture
def plan(settings, tmp_path: Path) -> Plan:
    plan = prepared(tmp_path / "dep", settings("bert"), 2)
    plan.run_directory.mkdir()
    return plan


def rotated(plan: Plan, i: int = 0) -> str:
    done = CliRunner().invoke(app, ["node", "rotate", str(plan.node(i) / "node.toml")])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def pair(directory: Path, name: str) -> tuple[bytes, bytes]:
    return (directory / f"{name}.key").read_bytes(), (directory / f"{name}.pub").read_bytes()


def test_a_new_key_takes_the_old_ones_place_and_says_what_the_server_does(plan: Plan) -> None:
    place = plan.node(0)
    before = pair(place, "node")
    said = rotated(plan)
    assert "flwr supernode register node.pub fedlora" in said
    assert "flwr supernode unregister" in said
    assert pair(place, "old") == before
    assert pair(place, "node") != before
    for name in ("node.key", "old.key"):
        assert stat.S_IMODE((place / name).stat().st_mode) == 0o600
    assert not list(place.glob("new.*"))
    with pytest.raises(DeployError, match="not finished"):
        rotated(plan)
    assert pair(place, "old") == before, "the one that the SuperLink knows is never lost"
    keys.forget_old(place)
    rotated(plan)


@pytest.mark.parametrize("writes", range(6))
def test_a_rotation_that_was_cut_short_goes_on(plan: Plan, monkeypatch, writes: int) -> None:
    place, left, server = plan.node(0), [writes], Server(plan)
    before = pair(place, "node")

    class Killed(BaseException):
        pass

    def mortal(real):
        def wrapped(*args: object, **kw: object) -> object:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return real(*args, **kw)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(keys, "node_key", mortal(keys.node_key))
        patch.setattr(shutil, "copy2", mortal(shutil.copy2))
        patch.setattr(Path, "replace", mortal(Path.replace))
        with pytest.raises(Killed):
            keys.rotate(place)
    take_new_keys(plan, server, print)  # type: ignore[arg-type]
    assert set(server.known.values()) == {"1", "2"}, "nothing is taken from it in between"
    keys.rotate(place)
    assert pair(place, "old") == before
    assert pair(place, "node") != before
    take_new_keys(plan, server, print)  # type: ignore[arg-type]
    assert server.known == {keys.pem(place / "node.pub"): "3", server.second: "2"}


class Server:
    """Stands in for Flower: it knows the keys of both nodes."""

    def __init__(self, plan: Plan) -> None:
        found = [keys.pem(plan.node(i) / "node.pub") for i in (0, 1)]
        self.known = {key: str(n) for n, key in enumerate(found, 1)}
        self.second = found[1]
        self.ids = 2

    def keys(self) -> dict[str, str]:
        return dict(self.known)

    def __call__(self, *arguments: str) -> dict[str, str]:
        if arguments[1] == "unregister":
            (key,) = (k for k, n in self.known.items() if n == arguments[2])
            del self.known[key]
            return {}
        self.ids += 1
        self.known[keys.pem(Path(arguments[2]))] = str(self.ids)
        return {"node-id": str(self.ids)}


def test_up_registers_the_new_key_and_unregisters_the_old_one_once(plan: Plan) -> None:
    server, said = Server(plan), []
    save(plan, {"node-0": "1", "node-1": "2"})
    take_new_keys(plan, server, said.append)  # type: ignore[arg-type]
    assert said == []
    rotated(plan)
    take_new_keys(plan, server, said.append)  # type: ignore[arg-type]
    assert said == [
        "node-0 has a new key; the old one is registered no more. It is back in a minute or so"
    ]
    assert server.known == {server.second: "2", keys.pem(plan.node(0) / "node.pub"): "3"}
    assert registered(plan) == {"node-0": "3", "node-1": "2"}
    assert not list(plan.node(0).glob("old.*"))
    take_new_keys(plan, server, said.append)  # type: ignore[arg-type]
    assert len(said) == 1


def test_who_was_taken_off_the_list_is_not_waited_for_nor_put_on_it_again(plan: Plan) -> None:
    """Not by another's rotation either; by hand it comes back, under another id."""
    server = Server(plan)
    save(plan, {"node-0": "1", "node-1": "2"})
    assert revoked(plan, server) == []  # type: ignore[arg-type]
    del server.known[server.second]
    rotated(plan)
    take_new_keys(plan, server, print)  # type: ignore[arg-type]
    assert revoked(plan, server) == ["node-1"]  # type: ignore[arg-type]
    assert server.second not in server.known
    server.known[server.second] = "9"
    assert revoked(plan, server) == []  # type: ignore[arg-type]
    assert registered(plan) == {"node-0": "3", "node-1": "9"}


def test_a_node_without_a_key_has_nothing_to_rotate(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"no node\.key"):
        keys.rotate(tmp_path)


def test_status_says_since_when_a_key_is_registered(plan: Plan) -> None:
    found = {"node-id": "1", "status": "online", "created-at": "2026-02-03 04:05:06Z"}
    table = nodes(plan, [found])
    columns = {str(c.header): list(c.cells) for c in table.columns}
    assert columns["key of"] == ["2026-02-03"]


@pytest.mark.slow
def test_a_real_node_works_on_under_its_new_key(tiny, tmp_path: Path) -> None:
    from tests.conftest import tiny_settings

    given = tiny_settings(tiny, tmp_path, "float32", "bert", **{"run.rounds": 1})
    plan = brought_up(tmp_path / "dep", given, 2)
    try:
        ids, first = registered(plan), read_state(plan)["children"]["node-0"]["pid"]
        rotated(plan)
        bring_up(plan)
        now = registered(plan)
        assert now["node-0"] != ids["node-0"]
        assert now["node-1"] == ids["node-1"]
        assert read_state(plan)["children"]["node-0"]["pid"] != first
        with Operator(plan) as operator:
            online = {n["node-id"] for n in operator.nodes() if n["status"] == "online"}
            assert operator.keys() == {
                keys.pem(plan.node(i) / "node.pub"): now[f"node-{i}"] for i in (0, 1)
            }
        assert online == set(now.values())
        assert ran(plan)[0] == "finished:completed"
    finally:
        host.down(plan, print)
