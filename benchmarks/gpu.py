"""What an accelerator must show, beside the host: `make gpu`, `python -m benchmarks.gpu [--tiny]`.

    equality   a short run on the card and on the host: how far the last adapters are apart
    resume     a run that stopped and went on: tensors whose bits are not the whole run's
    memory     what a client was said to need against what it took
    speed      tokens a second of a plain step; a private step's time over it

A Llama of random weights and made-up rows: nothing is fetched. --tiny: small, on a pretend card,
which shows that every row runs and nothing of a card. Rows are in the order of what matters most,
and each is printed as it is known, so a machine that is lent for a quarter of an hour is enough.
"""

import argparse
import contextlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.measure import Row, machine
from fedlora import preflight
from fedlora.launch.simulate.run import local
from fedlora.reports.console import Observer, Silent
from fedlora.strategies.base import Client
from fedlora.training import cache, devices
from fedlora.training.data.batches import collate
from fedlora.training.footprint import footprint
from fedlora.training.optimizers import build_optimizer
from fedlora.training.train import steps, training

ROOT = Path(__file__).parent.parent
MARKS = ["[P]", "[E]", "[U]"]
WORDS = [f"w{n}" for n in range(200)]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
HALF_BILLION = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                "num_attention_heads": 14, "num_key_value_heads": 2}  # fmt: skip
Settings = Callable[..., dict[str, Any]]


def written(root: Path, sizes: dict[str, int], tokens: int) -> Settings:
    """A base of these sizes and rows of so many tokens, as the settings of a run on them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(MARKS + WORDS)}, unk_token="[U]")
    )
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="[P]", eos_token="[E]",
                                        unk_token="[U]")  # fmt: skip
    base = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, bos_token_id=1,
                       eos_token_id=1, **sizes)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        LlamaForCausalLM(base).to(torch.bfloat16).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    chance = random.Random(0)
    lines = [
        {"prompt": " ".join(chance.choices(WORDS, k=tokens // 2)) + f" w{n}",
         "response": " ".join(chance.choices(WORDS, k=tokens // 2))} for n in range(120)
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    def settings(name: str, **changes: Any) -> dict[str, Any]:
        return {
            "run.out": str(root), "run.name": name, "run.rounds": 2, "strategy.name": "fedex",
            "model.path": str(root / "base"), "model.task": "causal-lm", "model.attention": "eager",
            "data.path": str(root / "rows.jsonl"), "data.prompt": "prompt", "data.test-size": 8,
            "data.partition": "iid", "data.max-length": 2 * tokens, "clients.count": 3,
            "clients.ranks": "4", "train.steps": 2, "train.batch-size": 8,
            "train.precision": "float32", "evaluate.baselines": False, "evaluate.every": 0,
            "evaluate.generate-tokens": 0, "evaluate.clients": False, "output.plots": False,
            "simulate.workers": 1, **changes,
        }  # fmt: skip

    return settings


class Stop(Silent):
    """Ends a run as Ctrl-C does, when its third round begins."""

    def round_started(self, number: int, *_: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt


def ended(given: dict[str, Any], observers: Sequence[Observer] = ()) -> dict[str, Tensor]:
    """The tensors of a run's last checkpoint."""
    directory = local(preflight.read(given), {}, True, observers)
    return load_file(max((directory / "checkpoint").glob("*.safetensors")))


def apart(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    """The largest relative distance of a tensor from the one that it should be."""
    floats = [k for k, x in here.items() if x.is_floating_point() and x.numel()]
    return max(
        float((here[k].double() - there[k].double()).norm() / (here[k].double().norm() + 1e-12))
        for k in floats
    )


def equality(settings: Settings, device: str) -> Iterator[Row]:
    private = {
        "privacy.epsilon": 8.0,
        "privacy.insecure-reproducible-noise": True,
        "strategy.name": "fedavg",
    }
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "private": private,
        "bf16 base": {"model.dtype": "bfloat16"},
    }
    for what, changes in cases.items():
        runs = [
            ended(settings(f"{what} {n}", **{"simulate.devices": d, **changes}))
            for n, d in enumerate(("cpu", device))
        ]
        target = "<= 0.2" if what == "bf16 base" else "<= 0.001"
        how = "largest relative distance of a tensor after 2 rounds, host and card"
        yield Row(f"equality, {what}", apart(*runs), target, how)


def resume(settings: Settings, device: str) -> Iterator[Row]:
    four = {"run.rounds": 4, "simulate.devices": device, "lora.dropout": 0.1}
    whole = ended(settings("whole", **four))
    with contextlib.suppress(KeyboardInterrupt):
        ended(settings("parts", **four), [Stop()])
    parts = ended(settings("parts", **four, **{"run.resume": True}))
    differ = sum(not torch.equal(x, parts[k]) for k, x in whole.items())
    how = f"tensors of {len(whole)} with other bits: 4 rounds in two starts, with dropout"
    yield Row("resume", float(differ), "<= 0", how)


def taken(settings: Settings, device: str, rank: str) -> Iterator[Row]:
    """Memory and speed of one client's step, plain."""
    given = settings("step", **{"simulate.devices": device, "clients.ranks": rank,
                                "model.dtype": "bfloat16", "train.precision": "auto"})  # fmt: skip
    config = preflight.read(given)
    labels = cache.corpus(config).labels
    model = cache.model(config, labels)
    ranks = dict.fromkeys(model.shapes, int(rank))
    model.load(model.init_factors(Client(0, model.layers(ranks)), 0))
    rows = cache.encoded("train", 0, config, labels)
    need = footprint(model, config)
    batch = collate(rows, torch.arange(config.train.batch_size))
    live = model.trainable(frozenset({"A", "B", "other"}))
    optimizer = build_optimizer(live, config.train, 1e-3)
    devices.forget_most(model.device)
    before = devices.most_used(model.device)
    with training(model, config, 1, 0):
        for _ in steps(model, [batch] * 2, live, optimizer, config):  # the first sets things up
            pass
        devices.synchronise(model.device)
        most = devices.most_used(model.device) - before
        begun = time.perf_counter()
        for _ in steps(model, [batch] * 5, live, optimizer, config):
            pass
        devices.synchronise(model.device)
    took = (time.perf_counter() - begun) / 5
    said = need.trained + need.activations(config.train.batch_size)
    size = f"{sum(p.numel() for p in model.peft.parameters()) / 1e6:.0f} M weights, rank {rank}"
    yield Row("memory, of what was said", most / said, "<= 1.1", f"peak over the estimate, {size}")
    free = devices.memory_of(model.device).free
    yield Row("memory, examples at once", float(need.fitting(free + need.frozen)), ">= 1", size)
    yield Row(
        "speed, tokens a second", batch["input_ids"].numel() / took, "", f"plain step, {size}"
    )


def rows(root: Path, device: str, tiny: bool) -> Iterator[Row]:
    (root / "small").mkdir()
    small = written(root / "small", SMALL, 12)
    yield from equality(small, device)
    yield from resume(small, device)
    (root / "large").mkdir()
    large = written(root / "large", SMALL if tiny else HALF_BILLION, 12 if tiny else 256)
    yield from taken(large, device, "4" if tiny else "32")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small, on a pretend card")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    given = parser.parse_args()
    found: list[Row] = []
    with contextlib.ExitStack() as stack:
        if given.tiny:
            from tests.support import pretend_device

            stack.enter_context(pretend_device.cards())
        device = devices.chosen("auto")
        if devices.is_host(device):
            print("no accelerator that torch knows; TINY=1 runs on a pretend one")
            return 2
        name = devices.name_of(device)
        print(f"on {name}, torch {torch.__version__}", flush=True)
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for row in rows(root, str(device), given.tiny):
            verdict = {True: "yes", False: "NO", None: ""}[row.met]
            print(
                f"{row.name:32} {row.value:12.4g} {row.target:10} {verdict:4} {row.how}", flush=True
            )
            found.append(row)
    if not given.tiny:
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "device": name,
                  "machine": machine(), "rows": [r.record() for r in found]}  # fmt: skip
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.met is False for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
