"""The client: every message it can get, and who answers it. See fedlora/client.py."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora import client

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    return client.answer(client.query, message, context)


@app.query("collect")
def collect(message: Message, context: Context) -> Message:
    return client.answer(client.collect, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return client.answer(client.train, message, context)


@app.train("gradient")
def gradient(message: Message, context: Context) -> Message:
    return client.answer(client.gradient, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return client.answer(client.score, message, context)
