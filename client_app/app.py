"""The client: every message it can get, and who answers it. See fedlora/client.py.

Nothing heavy is imported here: a deployed node starts this anew for every message, and may have a
warm worker that answers. See fedlora/handover.py.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.handover import answer

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    return answer("query", message, context)


@app.query("collect")
def collect(message: Message, context: Context) -> Message:
    return answer("collect", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return answer("train", message, context)


@app.train("gradient")
def gradient(message: Message, context: Context) -> Message:
    return answer("gradient", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return answer("evaluate", message, context)


@app.train("secagg_setup")
def secagg_setup(message: Message, context: Context) -> Message:
    return answer("secagg_setup", message, context)


@app.train("secagg_share")
def secagg_share(message: Message, context: Context) -> Message:
    return answer("secagg_share", message, context)


@app.train("secagg_collect")
def secagg_collect(message: Message, context: Context) -> Message:
    return answer("secagg_collect", message, context)


@app.train("secagg_unmask")
def secagg_unmask(message: Message, context: Context) -> Message:
    return answer("secagg_unmask", message, context)
