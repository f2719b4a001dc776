"""Hands a client's message to the node's warm worker, where there is one.

Flower starts a new process for every message. Where the node config names a `worker-socket` (or
the environment FEDLORA_WORKER_SOCKET), that process imports no torch: it hands the message to the
worker, which has the model and the data in memory (`fedlora.launch.deploy.worker`), and passes on
the reply. A worker that cannot be reached has not seen the message, so this process answers itself,
slowly. One that is lost with the message in hand costs that message: an error reply, never a
second try, since a private step may have been paid for; and never a wait past the deadline.
"""

import os
import time
from pathlib import Path

from flwr.app import Context, Error, Message

from fedlora.federation.client.frames import assembled, frames
from fedlora.federation.client.told import LOG, told
from fedlora.federation.wire.codes import Code, code_of
from fedlora.federation.wire.same_machine import is_own_machine

METHOD = "/fedlora.Worker/Answer"
READY = 60.0
"""Seconds to wait for a worker that is starting."""


def handed_over(kind: str, message: Message, context: Context) -> Message | None:
    """The warm worker's reply to a message of this kind; None where there is no worker.

    kind: "train", "evaluate", ... An error reply where the worker was lost with the message.
    """
    named = context.node_config.get("worker-socket") or os.environ.get("FEDLORA_WORKER_SOCKET")
    return ask(Path(str(named)), kind, message, context) if named else None


def failed(error: Exception, message: Message, context: Context) -> Message:
    """An error reply: the server must hear of every error, and of no row: see told.py."""
    words = told(error, is_own_machine(context.node_config))
    return Message(Error(code_of(error), words), reply_to=message)


HANDLERS = {
    "query": "query",
    "collect": "collect",
    "train": "train",
    "gradient": "gradient",
    "evaluate": "score",
    "secagg_setup": "secagg_setup",
    "secagg_share": "secagg_share",
    "secagg_collect": "secagg_collect",
    "secagg_agree": "secagg_agree",
    "secagg_unmask": "secagg_unmask",
}
"""Kind of message to the function of fedlora.federation.client.handlers that answers it."""


def ask(socket: Path, kind: str, message: Message, context: Context) -> Message | None:
    """The worker's reply, or an error reply where it was lost; None where it never was there."""
    import grpc

    with grpc.insecure_channel(f"unix:{socket}", OPTIONS) as channel:
        if not _reachable(channel, socket):
            return None
        call = channel.stream_stream(METHOD)
        asked = frames(message, lambda bare: pack(kind, bare, context))
        try:
            reply = assembled(call(asked, timeout=left(message)), message_of_bytes, lambda m: m)
        except grpc.RpcError as e:
            LOG.error("the worker was lost: %s: %s", e.code().name, e.details())
            return _lost(message, e.code().name)  # its details may be the words of an error
        except (EOFError, ValueError) as e:
            LOG.error("the worker's reply is not whole: %s", e)
            return _lost(message, "its reply is not whole")
    if reply.has_error():
        return Message(reply.error, reply_to=message)
    return Message(reply.content, reply_to=message)


OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


def left(message: Message) -> float:
    """Seconds until the server no longer waits for a reply to this message."""
    return max(1.0, message.metadata.created_at + message.metadata.ttl - time.time())


def as_bytes(message: Message) -> bytes:
    """The message's protobuf."""
    from flwr.common.serde import message_to_proto

    return bytes(message_to_proto(message).SerializeToString())


def message_of_bytes(data: bytes) -> Message:
    """The message whose protobuf this is."""
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as ProtoMessage

    return message_from_proto(ProtoMessage.FromString(data))


def pack(kind: str, message: Message, context: Context) -> bytes:
    """The kind, then the message and the context as Flower's protobuf, in one string of bytes."""
    from flwr.common.serde import context_to_proto

    head = as_bytes(message)
    tail = context_to_proto(context).SerializeToString()
    return b"".join([kind.encode(), b"\n", len(head).to_bytes(8, "little"), head, tail])


def unpack(data: bytes) -> tuple[str, Message, Context]:
    """The kind, the message and the context that `pack` put together."""
    from flwr.common.serde import context_from_proto
    from flwr.proto.message_pb2 import Context as ProtoContext

    start = data.index(b"\n", 0, 64) + 1
    middle = start + 8 + int.from_bytes(data[start : start + 8], "little")
    message = message_of_bytes(data[start + 8 : middle])
    context = context_from_proto(ProtoContext.FromString(data[middle:]))
    return data[: start - 1].decode(), message, context


def _lost(message: Message, why: str) -> Message:
    reason = f"the node's worker was lost with this message in hand ({why})"
    return Message(Error(Code.WORKER_LOST, reason), reply_to=message)


def _reachable(channel: object, socket: Path) -> bool:
    """Does the worker serve? One that is starting up gets a while."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    until = time.monotonic() + READY
    while socket.exists() or time.monotonic() < until - READY + 1.0:
        try:
            asked = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=2.0
            )
            if asked.status == health_pb2.HealthCheckResponse.SERVING:
                return True
        except grpc.RpcError:
            pass
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    return False
