"""A client's reply, made in this process: the node's own config is checked before it is heeded.

A node's config is the run's with its own settings in place (its limit on epsilon, say), so it is
checked here for what the server's was checked for there: fedlora/preflight.
"""

from functools import lru_cache

from flwr.app import Context, Message

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.federation.client import handlers
from fedlora.federation.client.dispatch import HANDLERS
from fedlora.federation.client.handlers import Handler
from fedlora.federation.client.job import read_config

UNCHECKED = ("query",)
"""What reads no config: whoever the node is, it can say so."""


def reply(kind: str, message: Message, context: Context) -> Message:
    """The reply to a message of this kind, or an error reply with the reason. Never nothing."""
    handler: Handler = getattr(handlers, HANDLERS[kind])
    try:
        if kind not in UNCHECKED and (found := _problems(read_config(context))):
            raise ConfigError([*found])
        return Message(handler(message, context), reply_to=message)
    except Exception as e:
        return handlers.failed(e, message)


@lru_cache(maxsize=4096)
def _problems(config: Config) -> tuple[str, ...]:
    """Of each config once: a simulation's clients have one, or one each."""
    return tuple(preflight.problems(config))
