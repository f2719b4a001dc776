"""The bytes that a run says it sent, against those that a proxy at the nodes' door saw."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.launch.deploy import host
from fedlora.launch.deploy.layout import Wanted, init
from fedlora.launch.deploy.plan import Plan
from tests.conftest import write_tokenizer
from tests.support.deployment import bring_up, ran, rounds
from tests.support.relay import Relay

pytestmark = pytest.mark.slow


@pytest.fixture
def counted(tiny, tmp_path: Path, monkeypatch) -> Iterator[tuple[Plan, Relay]]:
    import torch
    from transformers import BertConfig, BertModel

    from tests.conftest import tiny_settings

    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=32, hidden_size=256, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=4096, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(str(tmp_path / "model"))
    write_tokenizer(tmp_path / "model")
    given = tiny_settings(
        tiny,
        tmp_path,
        "float32",
        "bert",
        **{
            "model.path": str(tmp_path / "model"),
            "strategy.name": "fedavg",
            "lora.target-modules": "all-linear",
            "run.rounds": 2,
            "train.steps": 1,
            "lora.init": "orthogonal",  # where B = 0, A comes back alike from all: sent once
            "evaluate.clients": False,
        },
    )
    overrides = {k: v for k, v in given.items() if k not in ("clients.count", "run.out")}
    wanted = Wanted(tmp_path / "dep", 2, overrides=overrides, ranks=(200,), one_host_trial=True)
    plan = init(wanted)
    proxy = Relay(plan.port)
    monkeypatch.setitem(os.environ, "FEDLORA_SUPERLINK", f"127.0.0.1:{proxy.port}")
    bring_up(plan)
    yield plan, proxy
    host.down(plan, print)
    proxy.close()


def test_the_bytes_counted_are_those_on_the_wire_within_two_percent(counted) -> None:
    plan, proxy = counted
    before = proxy.down, proxy.up
    status, results = ran(plan)
    assert status == "finished:completed"
    seen = {"down": proxy.down - before[0], "up": proxy.up - before[1]}
    said = {way: sum(r["bytes"][way] for r in rounds(results)) for way in ("down", "up")}
    print("on the wire", seen, "counted", said)
    for way in ("down", "up"):
        assert said[way] > 20_000_000
        assert abs(seen[way] - said[way]) < 0.02 * said[way], way
