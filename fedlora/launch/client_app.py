"""The ClientApp: every message that a client can get, and the function that answers it.

    app                       fedlora's own: what a deployed node answers with, and `flwr run` names
    make_client_app(...)      one that may run a model, data, a loss or metrics of yours

Nothing heavy is imported here: a deployed node starts this anew for every message, and may have a
warm worker that answers. See fedlora/federation/client/dispatch.py.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.federation.client.dispatch import failed, handed_over
from fedlora.training.user_code import name_of

Code = str | Callable[..., Any] | Any
"""A function of a module, its name "package.module:function", or an object of this process."""


def make_client_app(
    *,
    model: Code | None = None,
    tokenizer: Code | None = None,
    data: Code | None = None,
    loss: Code | None = None,
    metrics: Code | None = None,
) -> ClientApp:
    """A ClientApp for one's own project, which may run this code and no other.

    The run's config says which code a run uses (`Federation`, or its keys); a client refuses what
    its app does not name. `data` is more than a permission: these are this node's rows, in place
    of its share of the server's. What each must be: fedlora/training/user_code.py.

    >>> from fedlora import make_client_app
    >>> app = make_client_app(loss="torch.nn.functional:cross_entropy")

    Raises:
        ConfigError: a text is no "package.module:function".
    """
    given = [x for x in (model, tokenizer, data, loss, metrics) if x is not None]
    return client_app(map(name_of, given), "" if data is None else name_of(data))


def client_app(code: Iterable[str] = (), rows: str = "") -> ClientApp:
    """A ClientApp that may run this code, by its names; `rows` are the node's own."""
    made, allowed = ClientApp(), ",".join(code)
    for registered, kind in (
        (made.query(), "query"),
        (made.query("collect"), "collect"),
        (made.train(), "train"),
        (made.train("gradient"), "gradient"),
        (made.evaluate(), "evaluate"),
        (made.train("secagg_setup"), "secagg_setup"),
        (made.train("secagg_share"), "secagg_share"),
        (made.train("secagg_collect"), "secagg_collect"),
        (made.train("secagg_agree"), "secagg_agree"),
        (made.train("secagg_unmask"), "secagg_unmask"),
    ):
        registered(partial(answer, kind, allowed=allowed, rows=rows))
    return made


def answer(
    kind: str, message: Message, context: Context, allowed: str = "", rows: str = ""
) -> Message:
    """The reply to a message of this kind ("train", "evaluate", ...). Never nothing."""
    try:
        own = {"user-code": allowed, "data-path": rows}  # a node's own config comes first
        for key, value in own.items():
            if value and not context.node_config.get("policy"):  # which says both itself
                context.node_config.setdefault(key, value)
        if (came := handed_over(kind, message, context)) is not None:
            return came
        from fedlora.federation.client.oversight import overseen
        from fedlora.launch.client_reply import handler_of

        with overseen(kind, message, context) as leave:
            content = handler_of(kind, message, context)(message, context)
            leave(content)
        return Message(content, reply_to=message)
    except Exception as e:  # an import that fails, too: without a reply the server waits long
        return failed(e, message, context)


app = client_app()
