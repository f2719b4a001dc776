"""One round of a server whose clients send back what they were sent: its peak memory.

    python echo_server.py DIRECTORY CLIENTS

The adapter has as many bytes as a 7B model's of rank 64 on q and v of 32 layers of 4096 x 4096, on
a base small enough for any machine. Prints {"payload": bytes, "peak": bytes above those before,
in its round; "start": and until then}.
"""

import ctypes
import gc
import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedlora.config.reader import Config
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.wire.certificate import pack_numbers
from fedlora.federation.wire.messages import arrays_of, configs_of
from fedlora.launch.simulate.grid import FIRST_NODE, LocalGrid, _name
from fedlora.reports.console import Silent
from fedlora.training.certificate import names_of
from tests.conftest import WORDS, write_tokenizer
from tests.support.tiny_federation import quick

WIDTH, LAYERS = 512, 32
PAYLOAD = 2 * 32 * 2 * 64 * 4096 * 4
assert PAYLOAD == 2 * LAYERS * 2 * WIDTH * WIDTH * 4


class EchoGrid(LocalGrid):
    """Answers for its clients, whose memory would count here too.

    Nobody trains, so what they would measure of their models is what the server does of its own.
    """

    server: FederatedLora

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            _name(message)
            ids.append(message.metadata.message_id)
            self._keep(message, Message(self._echo(message), reply_to=message))
            del message
        return ids

    def _echo(self, message: Message) -> RecordDict:
        client = message.metadata.dst_node_id - FIRST_NODE
        if message.metadata.message_type == "query":
            return RecordDict({"facts": ConfigRecord({"client": client, "rank": 0})})
        job = configs_of(message.content, "job")
        tag = {key: job[key] for key in ("round", "token", "client")}
        sent = arrays_of(message.content, "send").items()
        measured, _ = self.server.session.certifier.before[int(job["round"])]
        ranks = dict.fromkeys(self.server.setting.model.shapes, 0)
        numbers = {m: measured[m] for m in names_of(ranks, [], ())}
        copied = {k: Array(a.dtype, a.shape, a.stype, bytes(bytearray(a.data))) for k, a in sent}
        return RecordDict(
            {
                "reply": ConfigRecord({**tag, "keeps": False}),
                "metrics": MetricRecord({"num-examples": 2 + client, "loss": 1.0}),
                "sent": ArrayRecord(copied),
                "certificate": pack_numbers(numbers, numbers),
            }
        )


def write(directory: Path, width: int = WIDTH) -> None:
    """A language model of so many features and LAYERS layers, and rows for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=16, max_position_embeddings=64,
        bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(directory / "model"))
    write_tokenizer(directory / "model")
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=6)) for _ in range(90)]
    lines = [json.dumps({"text": text, "response": " animal"}) + "\n" for text in texts]
    (directory / "rows.jsonl").write_text("".join(lines))


def resident(key: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" the most since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class AfterTheCheck(Silent):
    """The most before round 1, where the training check is; then counts anew."""

    start = 0

    def round_done(self, record: Mapping[str, Any]) -> None:
        if record["round"] == 0:
            self.start = resident("VmHWM")
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")


def main(directory: Path, clients: int) -> None:
    write(directory)
    given = {
        **quick("fedavg"), "clients.count": clients, "clients.ranks": str(WIDTH), "run.rounds": 1,
        "run.out": str(directory), "run.name": f"of-{clients}",
        "model.path": str(directory / "model"), "model.task": "causal-lm",
        "lora.target-modules": "q_proj,v_proj", "data.path": str(directory / "rows.jsonl"),
        "data.prompt": "text", "data.test-size": 10, "data.partition": "iid",
        "evaluate.baselines": False, "output.plots": False,
    }  # fmt: skip
    config = Config.read(given)
    seen = AfterTheCheck()
    server = FederatedLora(config, seen)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with EchoGrid(None, clients, config.flat()) as grid:  # type: ignore[arg-type]
        grid.server = server
        server.start(grid)
    found = {"peak": resident("VmHWM") - before, "start": seen.start - before}
    print(json.dumps({"payload": PAYLOAD, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
