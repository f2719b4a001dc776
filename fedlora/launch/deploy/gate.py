"""The gate of a deployment: a reverse proxy that lets /v1/fleet/* pass and nothing else.

    python -m fedlora.launch.deploy.gate --listen 0.0.0.0:9443 --upstream 127.0.0.1:8000 \
        --ca ca.crt --certificate server.pem --key server.key

A body larger than --limit is cut off and refused. What is refused is printed, a line each, and not
more than SAID of them a minute. Slow and many connections: patience.py.
"""

import argparse
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx

from fedlora.launch.deploy.notify import Notify
from fedlora.launch.deploy.patience import HEADERS, Patience, open_many

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PASSES = "/v1/fleet/"
HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
    b"trailers", b"transfer-encoding", b"upgrade",
}  # fmt: skip


SAID, LONGEST = 60, 200
"""Lines a minute of what was refused, and characters of a path in one."""


class TooLargeError(Exception):
    """A request's body is over the limit."""


class GoneError(Exception):
    """Whoever asked went away before the request was whole."""


class Gate:
    """The proxy, as an ASGI app."""

    def __init__(self, client: httpx.AsyncClient, limit: int) -> None:
        self.client = client
        self.limit = limit
        self._minute, self._said = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["raw_path"].decode("latin-1")
        plain = scope["path"].startswith(PASSES) and path.startswith(PASSES)
        if not plain or ".." in path or "%" in path or "//" in path:
            await self._refuse(scope, send, 403, "nodes have no business there")
            return
        query = scope["query_string"].decode("latin-1")
        headers = [(k, v) for k, v in scope["headers"] if k not in HOP]
        request = self.client.build_request(
            scope["method"],
            path + (f"?{query}" if query else ""),
            headers=headers,
            content=self._body(receive),
        )
        if not any(k in (b"content-length",) for k, _ in headers):
            request.headers["transfer-encoding"] = "chunked"
        try:
            await self._pass_on(await self.client.send(request, stream=True), send)
        except GoneError:
            return
        except TooLargeError:
            await self._refuse(scope, send, 413, f"the body is over {self.limit} bytes")
        except httpx.HTTPError as e:
            await self._refuse(scope, send, 502, f"the SuperLink does not answer: {e!r}")

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        total, more = 0, True
        while more:
            if (event := await receive())["type"] == "http.disconnect":
                raise GoneError
            part: bytes = event.get("body", b"")
            total += len(part)
            if total > self.limit:
                raise TooLargeError
            more = event.get("more_body", False)
            if part:
                yield part

    async def _pass_on(self, answer: httpx.Response, send: Send) -> None:
        headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in HOP]
        try:
            await send(
                {"type": "http.response.start", "status": answer.status_code, "headers": headers}
            )
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    async def _refuse(self, scope: Scope, send: Send, status: int, reason: str) -> None:
        who = (scope.get("client") or ("?",))[0]
        self._say(f"refused {scope['method']} {scope['path'][:LONGEST]!r} of {who}: {reason}")
        head = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": reason.encode()})

    def _say(self, line: str) -> None:
        """A line of the log, which strangers cannot fill."""
        now, minute = time.strftime("%Y-%m-%dT%H:%M:%S"), int(time.time() // 60)
        if minute != self._minute:
            if (more := self._said - SAID) > 0:
                print(f"{now} and {more} more were refused", flush=True)
            self._minute, self._said = minute, 0
        self._said += 1
        if self._said <= SAID:
            print(f"{now} {line}", flush=True)


def upstream_client(address: str, verify: ssl.SSLContext | bool) -> httpx.AsyncClient:
    """Of as many connections as there are of nodes: with a limit, slow ones would keep out all."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    return httpx.AsyncClient(
        base_url=address, verify=verify, timeout=60.0, limits=limits, trust_env=False
    )


def serve(listen: str, upstream: str, limit: int, ca: str, certificate: str, key: str) -> None:
    """Serve until SIGTERM; in plaintext, on both sides, where there is no `ca`."""
    import uvicorn

    host, _, port = listen.rpartition(":")
    secure = bool(ca)
    verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=ca) if secure else False
    address = f"{'https' if secure else 'http'}://{upstream}"
    open_many()
    client = upstream_client(address, verify)
    tls = {"ssl_certfile": certificate, "ssl_keyfile": key} if secure else {}
    notify = Notify()

    async def alive() -> None:
        notify.alive()

    config = uvicorn.Config(
        Gate(client, limit),
        http=Patience,
        h11_max_incomplete_event_size=HEADERS,
        ws="none",
        lifespan="off",
        callback_notify=alive,
        timeout_notify=1,
        host=host,
        port=int(port),
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        **tls,  # type: ignore[arg-type]
    )
    uvicorn.Server(config).run()


def main() -> None:
    """Serve as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--ca", default="")
    parser.add_argument("--certificate", default="")
    parser.add_argument("--key", default="")
    parser.add_argument("--limit", type=int, default=64 << 20)
    given = parser.parse_args()
    serve(given.listen, given.upstream, given.limit, given.ca, given.certificate, given.key)


if __name__ == "__main__":
    main()
