"""A ServerApp whose messages to each node lie first, as orders.json says, then are honest.

An order has "changes", keys of the run's config with hostile values, or "fields" of the message's
records. What the nodes answered is in answers.json: (number of the order, error code or 0, reason).
"""

import copy
import json
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedlora.config.reader import Config
from fedlora.errors import FedLoraError
from fedlora.launch.federation import Federation

app = ServerApp()


class Lying:
    """A grid that sends every other order's lie to each node before the first honest training."""

    def __init__(self, grid: Grid, given: dict, orders: list) -> None:
        self.grid, self.given, self.orders = grid, given, orders
        self.told: dict[int, int] = {}
        self.answers: list = []

    def __getattr__(self, name: str):
        return getattr(self.grid, name)

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            node = message.metadata.dst_node_id
            if message.metadata.message_type == "train" and node not in self.told:
                self.told[node] = len(self.told)
                self.lie(message)
        return self.grid.push_messages(messages)

    def lie(self, honest: Message) -> None:
        node = honest.metadata.dst_node_id
        for n in range(self.told[node], len(self.orders), 2):
            message = Message(
                self.changed(honest.content, self.orders[n]), node, "train", ttl=600.0
            )
            (reply,) = self.grid.send_and_receive([message], timeout=600.0)
            said = [reply.error.code, reply.error.reason] if reply.has_error() else [0, ""]
            self.answers.append([n, *said])
            Path("answers.json").write_text(json.dumps(self.answers))

    def changed(self, content: RecordDict, order: dict) -> RecordDict:
        made = copy.deepcopy(content)
        job = dict(made.config_records["job"])
        if changes := order.get("changes"):
            job["changes"] = json.dumps({**json.loads(job.get("changes", "{}")), **changes})
            try:
                job["config"] = Config.read({**self.given, **json.loads(job["changes"])}).identity()
            except (FedLoraError, RecursionError):
                job["config"] = ""
        made["job"] = ConfigRecord(job)
        for name, fields in order.get("fields", {}).items():
            made[name] = ConfigRecord({**made.config_records[name], **fields})
        return made


@app.main()
def main(grid: Grid, context: Context) -> None:
    orders = json.loads(Path("orders.json").read_text())
    given = dict(context.run_config)
    Federation(Config.read(given)).start(Lying(grid, given, orders))
