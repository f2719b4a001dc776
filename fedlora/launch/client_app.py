"""The client: every message it can get, and who answers it.

Nothing heavy is imported here: a deployed node starts this anew for every message, and may have a
warm worker that answers. See fedlora/federation/client/dispatch.py.
"""

from functools import partial

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedlora.federation.client.dispatch import handed_over
from fedlora.federation.wire.codes import code_of

app = ClientApp()


def answer(kind: str, message: Message, context: Context) -> Message:
    """The reply to a message of this kind ("train", "evaluate", ...). Never nothing."""
    try:
        if (came := handed_over(kind, message, context)) is not None:
            return came
        from fedlora.launch.client_reply import reply

        return reply(kind, message, context)
    except Exception as e:  # an import that fails, too: without a reply the server waits long
        return Message(Error(code_of(e), f"{type(e).__name__}: {e}"), reply_to=message)


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
    registered(partial(answer, kind))
