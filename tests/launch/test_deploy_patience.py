"""The gate under strangers who are slow, many, or send what has no end: nodes get through."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedlora.launch.deploy import gate
from fedlora.launch.deploy.gate import Gate, upstream_client
from fedlora.launch.deploy.patience import HEADERS, Patience
from fedlora.launch.deploy.plan import free_ports

FLEET = b"POST /v1/fleet/pull HTTP/1.1\r\nhost: gate\r\n"


async def superlink(scope: Any, receive: Any, send: Any) -> None:
    """Stands for the SuperLink: answers once the body is there."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * 10})


@asynccontextmanager
async def serving(app: Any, port: int, **how: Any) -> AsyncIterator[None]:
    config = uvicorn.Config(app, port=port, log_level="error", lifespan="off", ws="none", **how)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done(), task.exception()
    yield
    server.should_exit = server.force_exit = True
    await task


@asynccontextmanager
async def the_gate(
    limits: httpx.Limits | None = None, protocol: Any = Patience
) -> AsyncIterator[int]:
    """A gate as `serve` makes it, before a stand-in; the gate's port."""
    behind, port = free_ports(2)
    client = upstream_client(f"http://127.0.0.1:{behind}", verify=False)
    if limits:
        client = httpx.AsyncClient(
            base_url=client.base_url, limits=limits, timeout=2.0, verify=False
        )
    how = {"http": protocol, "h11_max_incomplete_event_size": HEADERS}
    async with serving(superlink, behind), client, serving(Gate(client, 1000), port, **how):
        yield port


async def asked(port: int, within: float = 30.0) -> int:
    """What a node's own request is answered with."""
    async with httpx.AsyncClient(trust_env=False, verify=False, timeout=within) as node:
        return (
            await node.post(f"http://127.0.0.1:{port}/v1/fleet/pull", content=b"body")
        ).status_code


async def opened(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def dropped(reader: asyncio.StreamReader, within: float) -> bool:
    """Does the other end go away in time?"""
    with contextlib.suppress(ConnectionError):
        try:
            while await asyncio.wait_for(reader.read(1 << 16), within):
                pass
        except TimeoutError:
            return False
    return True


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "head", 0.3)
    monkeypatch.setattr(Patience, "whole", 0.6)


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is outside of tests: no machine is so busy that a node is not in time."""
    monkeypatch.setattr(Patience, "head", 60.0)
    monkeypatch.setattr(Patience, "whole", 60.0)


SLOW = FLEET + b"content-length: 900\r\n\r\nx"


def test_bodies_that_do_not_end_keep_no_node_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than httpx would have connections for."""
    patient(monkeypatch)

    async def test() -> None:
        async with the_gate() as port:
            held = [await opened(port, SLOW) for _ in range(120)]
            assert await asked(port) == 200
            for _, writer in held:
                writer.close()

    run(test)


def test_with_httpx_own_limit_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterexample: a hundred connections, all taken."""
    patient(monkeypatch)

    async def test() -> None:
        async with the_gate(httpx.Limits(max_connections=3)) as port:
            held = [await opened(port, SLOW) for _ in range(3)]
            await asyncio.sleep(0.2)
            assert await asked(port) == 502
            for _, writer in held:
                writer.close()

    run(test)


@pytest.mark.parametrize(
    "data",
    [b"", b"POST /v1/fl", FLEET + b"x-slow: 1\r\n", SLOW],
    ids=["silence", "half a line", "half a head", "half a body"],
)
def test_who_sends_a_byte_now_and_then_is_dropped(
    data: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with the_gate() as port:
            reader, writer = await opened(port, data)

            async def drip() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        writer.write(b"a")
                        await asyncio.sleep(0.1)

            dripping = asyncio.create_task(drip())
            assert await dropped(reader, 20.0)
            dripping.cancel()
            writer.close()
            patient(monkeypatch)
            assert await asked(port) == 200
        assert not Patience.here

    run(test)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_node_that_asks_again_and_again_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "head", 1.0)

    async def test() -> None:
        async with the_gate() as port, httpx.AsyncClient(trust_env=False, verify=False) as node:
            for _ in range(7):
                found = await node.post(f"http://127.0.0.1:{port}/v1/fleet/pull", content=b"b")
                assert found.status_code == 200
                await asyncio.sleep(0.2)

    run(test)


def test_one_address_has_so_many_connections_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    monkeypatch.setattr(Patience, "each", 4)

    async def test() -> None:
        async with the_gate() as port:
            held = [await opened(port, b"POST") for _ in range(4)]
            reader, writer = await opened(port, b"POST")
            assert await dropped(reader, 20.0)
            for _, w in (*held, (reader, writer)):
                w.close()
            await asyncio.sleep(0.05)
            assert await asked(port) == 200

    run(test)


GIANT = FLEET + b"x-giant: " + b"a" * (4 * HEADERS)


def test_a_head_without_end_is_refused_before_it_is_all_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient(monkeypatch)

    async def test() -> None:
        async with the_gate() as port:
            reader, writer = await opened(port, GIANT)
            assert b" 400 " in await asyncio.wait_for(reader.readline(), 30.0)
            writer.close()

    run(test)


def test_uvicorns_own_choice_takes_any_head() -> None:
    """The counterexample, and why the protocol is named."""

    async def test() -> None:
        async with the_gate(protocol=HttpToolsProtocol) as port:
            reader, writer = await opened(port, GIANT + b"\r\ncontent-length: 0\r\n\r\n")
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 30.0)
            writer.close()

    run(test)


def test_what_strangers_ask_does_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "SAID", 3)
    minute = [60.0]
    monkeypatch.setattr(gate.time, "time", lambda: minute[0])
    made = Gate(httpx.AsyncClient(verify=False), 1)

    async def ask(path: str) -> None:
        async def send(_: Any) -> None:
            return None

        scope = {"type": "http", "raw_path": path.encode(), "path": path, "method": "GET"}
        await made(scope, None, send)  # type: ignore[arg-type]

    async def test() -> None:
        for _ in range(9):
            await ask("/" + "long\x1b[2J\u202e\n" * 10_000)
        minute[0] = 121.0
        await ask("/again")

    run(test)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "6 more were refused" in lines[3]
    assert all(line.isprintable() and len(line) < 1200 for line in lines)
