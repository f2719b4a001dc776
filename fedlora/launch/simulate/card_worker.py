"""The process of a simulation's worker on a card of its own, with the only base there.

python -P -m fedlora.launch.simulate.card_worker IN OUT      the numbers of its two pipes
"""

import json
import sys

from fedlora.federation.client.dispatch import as_bytes, unpack
from fedlora.launch.client_app import client_app
from fedlora.launch.simulate.workers import (
    READY,
    CardWorker,
    answered,
    live,
    read,
    write,
)
from fedlora.strategies import register_strategy
from fedlora.training import devices
from fedlora.training.user_code import find


def main() -> None:
    """Answer messages until the pipe ends."""
    inbox, outbox = int(sys.argv[1]), int(sys.argv[2])

    def work() -> None:
        told = CardWorker(**json.loads(read(inbox) or b"{}"))
        for x in told.strategies:
            classes = [find(x["name"], value) for value in (x["cls"], *x["states"])]
            register_strategy(x["name"], classes[0], states=classes[1:])
        devices.use(told.device)
        app = client_app(told.code)
        write(outbox, READY)
        while (data := read(inbox)) is not None:
            _, message, context = unpack(data)
            context.node_config["devices"] = told.device
            write(outbox, as_bytes(answered(app, message, context)))

    live(work)


if __name__ == "__main__":
    main()
