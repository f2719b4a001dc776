"""A federation whose clients send back what they get: what an engine costs by itself.

    python benchmarks/noop.py local|ray CLIENTS ROUNDS MEGABYTES

Prints the seconds of the run, and of the imports before it. Both engines get the same two apps.
"""

import sys
import time

begun = time.perf_counter()

import numpy as np  # noqa: E402
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402

client_app = ClientApp()


@client_app.train()
def train(message: Message, _: Context) -> Message:
    arrays = message.content["arrays"]
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def server(rounds: int, megabytes: float) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        x = np.zeros(int(megabytes * 2**20 / 4 / 4), np.float32)
        arrays = ArrayRecord({f"w{i}": Array(x) for i in range(4)})
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)

    return app


def main() -> None:
    kind, clients, rounds, megabytes = sys.argv[1], *map(float, sys.argv[2:])
    app = server(int(rounds), megabytes)
    if kind == "local":
        from fedlora.launch.simulate.grid import run_local

        imported = time.perf_counter()
        run_local(app, client_app, {}, int(clients), workers=1)
    else:
        from flwr.simulation import run_simulation

        imported = time.perf_counter()
        backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                   "init_args": {"num_cpus": 2}}  # fmt: skip
        run_simulation(app, client_app, int(clients), backend_config=backend)  # type: ignore[arg-type]
    done = time.perf_counter()
    print(f"seconds {done - imported:.3f} {imported - begun:.3f}")


if __name__ == "__main__":
    main()
