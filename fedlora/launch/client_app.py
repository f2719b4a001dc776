"""The client: every message it can get, and who answers it.

Nothing heavy is imported here: a deployed node starts this anew for every message, and may have a
warm worker that answers. See fedlora/federation/client/dispatch.py.
"""

from functools import partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.federation.client import dispatch

app = ClientApp()


def here(kind: str, message: Message, context: Context) -> Message:
    """This process's reply, imports and all."""
    from fedlora.launch.client_reply import reply

    return reply(kind, message, context)


for registered, kind in (
    (app.query(), "query"),
    (app.query("collect"), "collect"),
    (app.train(), "train"),
    (app.train("gradient"), "gradient"),
    (app.evaluate(), "evaluate"),
    (app.train("secagg_setup"), "secagg_setup"),
    (app.train("secagg_share"), "secagg_share"),
    (app.train("secagg_collect"), "secagg_collect"),
    (app.train("secagg_unmask"), "secagg_unmask"),
):
    registered(partial(dispatch.answer, kind, here))
