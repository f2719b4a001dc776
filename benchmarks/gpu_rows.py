"""Equality with the host, resume and memory, for `benchmarks/gpu.py`; and the bases of its rows."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.measure import Row
from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.launch.simulate.run import local
from fedlora.reports.console import Observer, Silent
from fedlora.strategies.base import Client
from fedlora.training import cache, devices
from fedlora.training.data.batches import collate
from fedlora.training.footprint import footprint
from fedlora.training.model.model import Model
from fedlora.training.optimizers import build_optimizer
from fedlora.training.train import steps, training

MARKS = ["[P]", "[E]", "[U]"]
WORDS = [f"w{n}" for n in range(200)]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}  # fmt: skip
SIZES: Mapping[str, Mapping[str, int]] = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32000},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Llama's shapes: of 0.5b those of Qwen2.5-0.5B, of the others Llama 3.2's and 3.1's."""
Settings = Callable[..., dict[str, Any]]
COLUMNS = frozenset({"A", "B", "other"})


class SkippedError(Exception):
    """What is missing here for a part of the rows."""


@dataclass(frozen=True)
class Shape:
    """One client's training in a round."""

    tokens: int
    batch: int
    steps: int
    rank: int


FLOWERTUNE = Shape(tokens=512, batch=16, steps=10, rank=32)
"""As its template has them: adap/flower, the app template pyproject.flowertune.toml.tpl."""
TINY = Shape(tokens=16, batch=4, steps=2, rank=4)


@dataclass
class Bench:
    """A device, the bases that its rows are measured on, and how long they may take."""

    root: Path
    """Where the bases are written."""
    device: torch.device
    tiny: bool = False
    """Everything small, and on a pretend card."""
    budget: float = 60.0
    """Seconds of a series of clients."""
    made: dict[str, Settings] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return TINY if self.tiny else FLOWERTUNE

    def of_time(self, target: str) -> str:
        """A target, or none on a pretend card, whose seconds say nothing."""
        return "" if self.tiny else target

    def small(self) -> Settings:
        """A base that the host trains in a second."""
        if "small" not in self.made:
            self.made["small"] = written(self.root / "small", SMALL, 12, 120)
        return self.made["small"]

    def large(self, size: str) -> Settings:
        """A base of this size and one client's rows, as FlowerTune's settings have them.

        Raises:
            SkippedError: there is no room for it.
        """
        if size not in self.made:
            sizes = SMALL if self.tiny else SIZES[size]
            self.check_room(size, weights(sizes))
            shape = self.shape
            examples = shape.batch * shape.steps + HELD_OUT
            at = self.root / size
            made = written(at, sizes, shape.tokens, examples, self.device)
            self.made[size] = lambda name, **changes: made(
                name, **{**trained_as(shape), "simulate.devices": str(self.device), **changes}
            )
        return self.made[size]

    def check_room(self, size: str, numbers: int) -> None:
        """Two bases of 16 bits on the card, ours and the pattern's, and one on the disk."""
        free = devices.memory_of(self.device).free
        if (need := 4.4 * numbers) > free:
            raise SkippedError(
                f"{size} needs {need / 1e9:.0f} GB of the card, {free / 1e9:.0f} are free"
            )
        if (need := 2.2 * numbers) > (free := shutil.disk_usage(self.root).free):
            raise SkippedError(
                f"{size} needs {need / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free"
            )


HELD_OUT = 8
"""Test rows, which nothing here asks for."""


def weights(sizes: Mapping[str, int]) -> int:
    """Numbers of a Llama of these sizes, its head apart from its embeddings; without its norms."""
    h, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    shared = h * sizes["num_key_value_heads"] // heads
    layer = h * (2 * h + 2 * shared + 3 * sizes["intermediate_size"])
    return sizes["num_hidden_layers"] * layer + 2 * h * sizes["vocab_size"]


def trained_as(shape: Shape) -> dict[str, Any]:
    """FlowerTune's training as our keys; its own are named in `gpu_speed`."""
    return {
        "clients.count": 1, "clients.ranks": str(shape.rank), "lora.alpha": 2.0 * shape.rank,
        "lora.dropout": 0.075, "train.steps": shape.steps, "train.batch-size": shape.batch,
        "train.lr": 5e-5, "data.max-length": shape.tokens, "model.dtype": "bfloat16",
        "train.precision": "auto", "model.attention": "auto", "data.client-test-fraction": 0.0,
    }  # fmt: skip


def written(
    root: Path,
    sizes: Mapping[str, int],
    tokens: int,
    examples: int,
    device: torch.device = devices.HOST,
) -> Settings:
    """A base of these sizes, its weights drawn on the device, and rows of so many tokens, as the
    settings of a run on them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    known = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(MARKS + WORDS)}, unk_token="[U]")
    )
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="[P]", eos_token="[E]",
                                        unk_token="[U]")  # fmt: skip
    shape = LlamaConfig(max_position_embeddings=2048, bos_token_id=1, eos_token_id=1, **sizes)
    with torch.random.fork_rng(devices=[]), device:
        torch.default_generator.manual_seed(0)
        drawn = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    drawn.to(devices.HOST).save_pretrained(root / "base")
    del drawn
    devices.release(device)
    tokenizer.save_pretrained(root / "base")
    chance = random.Random(0)
    lines = [
        {"prompt": " ".join(chance.choices(WORDS, k=tokens // 2)),
         "response": " ".join(chance.choices(WORDS, k=tokens - tokens // 2 - 1))}
        for _ in range(examples)
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    def settings(name: str, **changes: Any) -> dict[str, Any]:
        return {
            "run.out": str(root), "run.name": name, "run.rounds": 2, "strategy.name": "fedex",
            "model.path": str(root / "base"), "model.task": "causal-lm", "model.attention": "eager",
            "data.path": str(root / "rows.jsonl"), "data.prompt": "prompt",
            "data.test-size": HELD_OUT, "data.partition": "iid", "data.max-length": 2 * tokens,
            "clients.count": 2, "clients.ranks": "4", "train.steps": 2, "train.batch-size": 8,
            "train.precision": "float32", "evaluate.baselines": False, "evaluate.every": 0,
            "evaluate.generate-tokens": 0, "evaluate.clients": False, "output.plots": False,
            "simulate.workers": 1, **changes,
        }  # fmt: skip

    return settings


# -- equality and resume --------------------------------------------------------------------------


class Stop(Silent):
    """Ends a run as Ctrl-C does, when its second round begins."""

    def round_started(self, number: int, *_: Any) -> None:
        if number == 2:
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


EQUAL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "plain": ("<= 0.001", {"train.optimizer": "sgd", "train.lr": 0.1}),
    "AdamW": ("<= 0.2", {"strategy.name": "fedavg"}),
    "private": ("<= 0.001", {"privacy.epsilon": 8.0, "strategy.name": "fedavg",
                             "privacy.insecure-reproducible-noise": True}),
    "bf16 base": ("<= 0.2", {"model.dtype": "bfloat16", "strategy.name": "fedavg"}),
}  # fmt: skip
"""Target and settings of each. AdamW's first steps are of the rate's size whatever the gradient's,
so a number whose gradient is rounding alone may go the other way: one such moved a tensor by 0.01.
fedex's residual, a small difference of large products, is compared by SGD in float32 alone:
bfloat16 moves it by a quarter of its size."""


def equality(bench: Bench, what: str) -> Iterator[Row]:
    target, changes = EQUAL[what]
    settings = bench.small()
    runs = [
        ended(settings(f"{what} {n}", **{"simulate.devices": d, **changes}))
        for n, d in enumerate((str(devices.HOST), str(bench.device)))
    ]
    how = "largest relative distance of a tensor after 2 rounds, host and card"
    yield Row(f"equality, {what}", apart(*runs), target, how)


def resume(bench: Bench) -> Iterator[Row]:
    settings = bench.small()
    for attention in ("eager", "sdpa"):
        changes = {"simulate.devices": str(bench.device), "lora.dropout": 0.1,
                   "model.attention": attention}  # fmt: skip
        whole = ended(settings(f"whole {attention}", **changes))
        with contextlib.suppress(KeyboardInterrupt):
            ended(settings(f"parts {attention}", **changes), [Stop()])
        parts = ended(settings(f"parts {attention}", **changes, **{"run.resume": True}))
        differ = sum(not torch.equal(x, parts[k]) for k, x in whole.items())
        how = f"tensors of {len(whole)} with other bits: 2 rounds in two starts, with dropout"
        yield Row(f"resume, {attention}", float(differ), "<= 0", how)


# -- memory ---------------------------------------------------------------------------------------


def loaded(config: Config) -> Model:
    """The warm base with a client's first adapter in it."""
    model = cache.model(config, cache.corpus(config).labels)
    ranks = dict.fromkeys(model.shapes, config.clients.ranks[0])
    model.load(model.init_factors(Client(0, model.layers(ranks)), 0))
    return model


def memory(bench: Bench, size: str) -> Iterator[Row]:
    """What a client of a few examples was said to need, against what its steps took."""
    config = preflight.read(bench.large(size)("memory"))
    model = loaded(config)
    rows = cache.encoded("train", 0, config, cache.corpus(config).labels)
    need = footprint(model, config)
    examples = max(1, config.train.batch_size // 4)
    batch = collate(rows, torch.arange(examples))
    live = model.trainable(COLUMNS)
    optimizer = build_optimizer(live, config.train, 1e-3)
    devices.forget_most(model.device)
    before = devices.most_used(model.device)
    with training(model, config, 1, 0):
        for _ in steps(model, [batch] * 3, live, optimizer, config):
            pass
        devices.synchronise(model.device)
    most = devices.most_used(model.device) - before
    said = need.trained + need.activations(examples)
    what = f"{need.frozen / 1e9:.2g} GB base, {config.data.max_length} tokens"
    how = f"peak over the estimate, {what}, {examples} examples"
    if devices.counts_memory(model.device):
        yield Row(f"memory {size}, of what was said", most / said, "<= 1.1", how)
    else:
        what_lacks = "torch counts no memory of this device"
        yield Row(f"memory {size}, of what was said", None, "", what_lacks)
    devices.release(model.device)
    free = devices.memory_of(model.device).free
    fitting = float(need.fitting(free + need.frozen))
    yield Row(f"memory {size}, examples at once", fitting, ">= 1", what)
    del model, live, optimizer
    cache.forget_model()
