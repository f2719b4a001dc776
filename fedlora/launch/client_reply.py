"""Answers a message in this process, after a check of the node's own config.

A node's config is the run's with its own settings in place (its limit on epsilon, say), so it is
checked here for what the server's was checked for there: fedlora/preflight.
"""

from collections.abc import Iterator
from functools import lru_cache

from flwr.app import Context, Message

from fedlora import preflight
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.federation.client import handlers
from fedlora.federation.client.dispatch import HANDLERS, failed
from fedlora.federation.client.handlers import Handler
from fedlora.federation.client.job import read_config
from fedlora.federation.client.node_config import check_node_config
from fedlora.federation.client.oversight import overseen
from fedlora.federation.wire.job import job_of
from fedlora.training import user_code

UNCHECKED = ("query",)
"""What reads no config: whoever the node is, it can say so."""


def reply(kind: str, message: Message, context: Context) -> Message:
    """The reply to a message of this kind, or an error reply with the reason. Never nothing."""
    try:
        with overseen(kind, message, context) as leave:
            content = handler_of(kind, message, context)(message, context)
            leave(content)
        return Message(content, reply_to=message)
    except Exception as e:
        return failed(e, message, context)


def handler_of(kind: str, message: Message, context: Context) -> Handler:
    """The function that answers a message of this kind on this node.

    Raises:
        ConfigError: the node's config cannot run, has keys that are none, or names code that the
            node was not told of.
    """
    check_node_config(context.node_config)
    if kind not in UNCHECKED:
        policy = Policy.of(context.node_config)
        config = read_config(context, job_of(message.content), policy)
        problems = _problems(config)
        strange = () if policy else _strange(config, context)
        if found := (*problems, *strange):
            raise ConfigError([*found]) if problems else ConfigError.public([*found])
    handler: Handler = getattr(handlers, HANDLERS[kind])
    return handler


def _strange(config: Config, context: Context) -> Iterator[str]:
    """Code that the run names and neither the node's app nor its node config does."""
    allowed = str(context.node_config.get("user-code", "")).split(",")
    for key, value in user_code.named(config):
        if value not in allowed:
            yield (
                f"{key} = {value!r}: this node runs no code that it was not told of; name it in "
                "its app, make_client_app(...), or in its node config as user-code"
            )


@lru_cache(maxsize=4096)
def _problems(config: Config) -> tuple[str, ...]:
    """Of each config once: a simulation's clients have one, or one each."""
    return tuple(preflight.problems(config))
