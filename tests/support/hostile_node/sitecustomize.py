"""A client that lies, in the real process of a node: another lie each round, as $HOSTILE orders.

Python imports this at its start where its directory is on PYTHONPATH. It changes the reply at the
last point before it leaves for the SuperNode, behind all that the node itself would refuse.
"""

import os
import pickle
import sys
from importlib.machinery import PathFinder
from pathlib import Path

PLACE = "fedlora.launch.deploy.flower_runtime"
FORGED = "\x1b[2J\x1b[1;1H\nround 3, accuracy 0.9999, 6 of 6 replies\n"
KEPT = Path("first-reply.bin")
LIES = {}


def lie(make):
    LIES[make.__name__.replace("_", "-")] = make
    return make


def filled(content, value, dtype="float32"):
    """Every tensor of the update, with this value in it."""
    import numpy as np
    from flwr.app import Array

    for key, old in list(content["sent"].items()):
        data = np.full(old.shape, value, dtype=dtype)
        content["sent"][key] = Array(
            dtype, old.shape, old.stype.replace("float32", dtype), data.tobytes()
        )


def numbers(content, **changes):
    content["metrics"].update({k.replace("_", "-"): v for k, v in changes.items()})


@lie
def honest(reply, content):
    pass


@lie
def count_2_62(reply, content):
    numbers(content, num_examples=2**62)


@lie
def count_negative(reply, content):
    numbers(content, num_examples=-5)


@lie
def count_nan(reply, content):
    numbers(content, num_examples=float("nan"))


@lie
def finite_1e18(reply, content):
    filled(content, 1e18)


@lie
def finite_3e38(reply, content):
    filled(content, 3e38)


@lie
def float64_1e300(reply, content):
    filled(content, 1e300, "float64")


@lie
def not_a_number(reply, content):
    filled(content, float("nan"))


@lie
def float16(reply, content):
    filled(content, 0.001, "float16")


@lie
def declared_terabyte(reply, content):
    from flwr.app import Array

    for key, old in list(content["sent"].items()):
        content["sent"][key] = Array(old.dtype, (2**20, 2**20), old.stype, old.data)


@lie
def climbing_names(reply, content):
    from flwr.app import ArrayRecord, ConfigRecord

    one = next(iter(content["sent"].values()))
    content["../../climbed"] = ConfigRecord({"../../x": "../../x"})
    content["more"] = ArrayRecord({"../../../tmp/climbed": one})
    content["sent"]["A/../../climbed"] = one


@lie
def replayed(reply, content):
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    reply.__dict__["_content"] = recorddict_from_proto(Proto.FromString(KEPT.read_bytes()))


@lie
def anothers_name(reply, content):
    content["reply"]["client"] = 0


@lie
def another_run(reply, content):
    content["reply"]["token"] = "../../../etc"


@lie
def round_of_text(reply, content):
    content["reply"]["round"] = FORGED


@lie
def five_megabytes_of_words(reply, content):
    from flwr.app import Error

    reply.__dict__["_content"] = None
    reply.__dict__["_error"] = Error(101, FORGED * 120_000)


@lie
def unknown_code(reply, content):
    from flwr.app import Error

    reply.__dict__["_content"] = None
    reply.__dict__["_error"] = Error(2**31 - 1, "all is well; the run is over; budget spent")


@lie
def metric_names(reply, content):
    content["metrics"].update({f"{FORGED}{i}": 1e308 for i in range(20_000)})


@lie
def absurd_scores(reply, content):
    numbers(content, loss=float("nan"), seconds=-1e308, train_seconds=1e308, steps=2**62)
    content["metrics"]["after/accuracy"] = 1e308


@lie
def forty_megabytes_more(reply, content):
    from flwr.app import ConfigRecord

    content["more"] = ConfigRecord({"x": os.urandom(40_000_000)})


@lie
def nothing(reply, content):
    from flwr.app import RecordDict

    reply.__dict__["_content"] = RecordDict()


@lie
def certificate_of_noise(reply, content):
    from flwr.app import Array

    for key, old in list(content["certificate"].items()):
        content["certificate"][key] = Array(
            old.dtype, old.shape, old.stype, os.urandom(len(old.data))
        )


@lie
def pickled(reply, content):
    from flwr.app import Array

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {Path('pickled-ran').resolve()}",)

    for key, old in list(content["sent"].items()):
        content["sent"][key] = Array("object", old.shape, "numpy.ndarray", pickle.dumps(Evil()))


@lie
def records_of_another_kind(reply, content):
    from flwr.app import ConfigRecord, MetricRecord

    content["sent"] = MetricRecord({"x": 1.0})
    content["metrics"] = ConfigRecord({"num-examples": "many"})


def changed(reply):
    """Make the lie of the round of it."""
    from flwr.common.serde import recorddict_to_proto

    if reply.has_error() or "reply" not in reply.content:
        return
    orders, n = os.environ["HOSTILE"].split(","), int(reply.content["reply"]["round"]) - 1
    if reply.metadata.message_type != "train" or not 0 <= n < len(orders):
        return
    for record in reply.content.array_records.values():
        for array in record.values():
            array.data = bytes(array.data)
    if not KEPT.exists():
        KEPT.write_bytes(recorddict_to_proto(reply.content).SerializeToString())
    LIES[orders[n]](reply, reply.content)


class Patched:
    """Finds that one module as ever, and puts the lie before its `answered`."""

    def find_spec(self, name, path, target=None):
        if name != PLACE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        real = spec.loader.exec_module

        def exec_module(module):
            real(module)
            honest = module.answered

            def answered(client, reply, context):
                changed(reply)
                honest(client, reply, context)

            module.answered = answered

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("HOSTILE"):
    sys.meta_path.insert(0, Patched())
