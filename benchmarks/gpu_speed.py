"""Speed, DP, the certificate and quantised bases on a card, for `benchmarks/gpu.py`.

FlowerTune's pattern is built from what its template does in every `train` call (adap/flower,
src/py/flwr/cli/new/templates/app: pyproject.flowertune.toml.tpl, code/flwr_tune/): the base is
loaded from the disk (in 4 bits by bitsandbytes, its settings left at their defaults), prepared by
PEFT for training in few bits with gradient checkpointing, wrapped by `get_peft_model` (rank 32,
alpha 64, dropout 0.075, the default modules), and trained for 10 steps of 16 examples of at most
512 tokens by trl's SFTTrainer, for which transformers' own Trainer stands here. What the data set
and Flower's messages take is in neither side.

Without bitsandbytes, and on a pretend card, the base stays in bfloat16, which PEFT's preparation
would double into float32: there only the checkpointing of it is done.
"""

import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_rows import COLUMNS, SIZES, SMALL, Bench, Shape, SkippedError, loaded
from benchmarks.measure import Row
from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.training import cache, devices
from fedlora.training.data.rows import Rows
from fedlora.training.footprint import footprint
from fedlora.training.model.loading import checkpoint_activations
from fedlora.training.train import fit

CLIENTS = (1, 4, 16, 64)
ONE_CARD = "ACCELERATE_TORCH_DEVICE"
"""Where accelerate is told of a device that it does not look for itself."""


@dataclass
class Side:
    """What one way's clients took, one after the other."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    """That one client trains on."""
    numbers: int = 0
    """That it trains."""
    most: int = 0
    """Bytes of the card at once."""

    def of(self, n: int) -> float:
        """Seconds of the first n clients; those beyond what was measured as the later ones."""
        measured = self.seconds[:n]
        later = statistics.median(self.seconds[1:] or self.seconds)
        return sum(measured) + (n - len(measured)) * later

    def call(self, work: Callable[[], tuple[int, int]], device: torch.device) -> None:
        devices.synchronise(device)
        begun = time.perf_counter()
        self.tokens, self.numbers = work()
        devices.synchronise(device)
        self.seconds.append(time.perf_counter() - begun)


# -- ours -----------------------------------------------------------------------------------------


def ours(config: Config, number: int) -> tuple[int, int]:
    """A client's call on the warm base, which the first one loads: tokens, and numbers trained."""
    model = loaded(config)
    rows = cache.encoded("train", 0, config, cache.corpus(config).labels)
    trained = fit(model, rows, COLUMNS, config, 1, number)
    model.read()
    live = model.trainable(COLUMNS)
    return trained.tokens, sum(p.numel() for ps in live.values() for p in ps.values())


def fitted(given: dict[str, Any], bench: Bench) -> Config:
    """The settings with as many examples at once as the card has room for beside the base."""
    config = preflight.read(given)
    model = loaded(config)
    need = footprint(model, config)
    devices.release(bench.device)
    room = need.fitting(int(0.9 * devices.memory_of(bench.device).free) + need.frozen)
    del model
    cache.forget_model()
    if not room:
        raise SkippedError("not one example of this base fits on the card")
    size = 0 if room >= config.train.batch_size else room
    return preflight.read({**given, "train.microbatch": size})


# -- FlowerTune's pattern -------------------------------------------------------------------------


@dataclass
class Pattern:
    """FlowerTune's clients; the adapter that each begins with is the first one's."""

    base: Path
    rows: Rows
    shape: Shape
    device: torch.device
    bits: bool
    """Whether the base is in 4 bits."""
    pinned: bool = True
    """Whether batches lie in pinned memory, as the Trainer has it; a pretend card has none."""
    state: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"FlowerTune's pattern ({'4-bit' if self.bits else 'bf16'})"

    def quiet_client(self) -> tuple[int, int]:
        """A call without what its libraries warn of: the pattern is as it ships."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.client()

    def client(self) -> tuple[int, int]:
        """One call: the tokens of its batches, and the numbers that it trains."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        torch.use_deterministic_algorithms(False)  # as torch has it; ours asks for them anew
        model = self.model()
        if self.state is not None:
            set_peft_model_state_dict(model, self.state)
        self.train(model)
        found = get_peft_model_state_dict(model)
        self.state = self.state or {k: devices.on_host(x) for k, x in found.items()}
        tokens = self.shape.steps * self.shape.batch * self.shape.tokens
        return tokens, sum(p.numel() for p in model.parameters() if p.requires_grad)

    def model(self) -> Any:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if self.bits else {}
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16, **how)
        if self.bits:
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
        else:
            checkpoint_activations(base)
        base.config.use_cache = False
        return get_peft_model(
            base,
            LoraConfig(r=self.shape.rank, lora_alpha=2 * self.shape.rank, lora_dropout=0.075,
                       task_type="CAUSAL_LM"),
        )  # fmt: skip

    def train(self, model: Any) -> None:
        from datasets import Dataset
        from transformers import (
            AutoTokenizer,
            PrinterCallback,
            Trainer,
            TrainingArguments,
            default_data_collator,
        )

        tokenizer = AutoTokenizer.from_pretrained(self.base)
        texts = [f"{x} {y} [E]" for x, y in zip(self.rows.text, self.rows.response, strict=True)]
        found = tokenizer(
            texts, truncation=True, max_length=self.shape.tokens, padding="max_length"
        )
        data = Dataset.from_dict({**found, "labels": found["input_ids"]})
        os.environ.setdefault(ONE_CARD, str(self.device))
        with tempfile.TemporaryDirectory() as d:
            arguments = TrainingArguments(
                d, per_device_train_batch_size=self.shape.batch, max_steps=self.shape.steps,
                learning_rate=5e-5, lr_scheduler_type="constant", logging_steps=10,
                save_strategy="no", report_to="none", disable_tqdm=True,
                dataloader_pin_memory=self.pinned,
            )  # fmt: skip
            assert arguments.device.type == self.device.type, "both sides on one device"
            arguments._n_gpu = 1  # of several cards the Trainer would use all
            trainer = Trainer(model, arguments, default_data_collator, data)
            trainer.remove_callback(PrinterCallback)
            trainer.train()


# -- side by side ---------------------------------------------------------------------------------


def side_by_side(bench: Bench, size: str) -> Iterator[Row]:
    """The pattern's clients and ours in turns, ours first and last, within the budget."""
    given = bench.large(size)("speed")
    config = fitted(given, bench)
    rows = cache.corpus(config).client(0).train
    pattern = Pattern(
        Path(config.model.path), rows, bench.shape, bench.device,
        bits=not bench.tiny and find_spec("bitsandbytes") is not None, pinned=not bench.tiny,
    )  # fmt: skip
    own, theirs = Side(), Side()
    devices.release(bench.device)
    devices.forget_most(bench.device)
    idle, begun = devices.most_used(bench.device), time.perf_counter()

    def one_of_ours() -> None:
        devices.forget_most(bench.device)
        own.call(lambda: ours(config, len(own.seconds)), bench.device)
        own.most = max(own.most, devices.most_used(bench.device) - idle)

    one_of_ours()
    while len(theirs.seconds) < CLIENTS[-1]:
        gc.collect()
        devices.release(bench.device)
        devices.forget_most(bench.device)
        warm = devices.most_used(bench.device)
        theirs.call(pattern.quiet_client, bench.device)
        theirs.most = max(theirs.most, devices.most_used(bench.device) - warm)
        gc.collect()
        one_of_ours()
        if time.perf_counter() - begun > bench.budget:
            break
    cache.forget_model()
    assert (own.tokens, own.numbers) == (theirs.tokens, theirs.numbers), "the same work"
    part = config.train.microbatch
    yield from compared(bench, f"speed {size}", own, theirs, pattern.name, part)


def compared(
    bench: Bench, title: str, own: Side, theirs: Side, name: str, part: int
) -> Iterator[Row]:
    """The rows of two series, for 1 to 64 clients of one round from the base's file on."""
    shape = bench.shape
    client = f"a client: {shape.steps} steps of {shape.batch} x {shape.tokens} tokens"
    client += f", {part} examples at once in ours" if part else ""
    for n in CLIENTS:
        measured = min(n, len(theirs.seconds))
        how = f"{client}; from the base's file on"
        if measured < n:
            how += f"; {measured} measured, the others a linear repeat of them"
        at = f"{title}, {n} client{'s' * (n > 1)}"
        for who, side in (("ours", own), (name, theirs)):
            yield Row(f"{at}: tokens a second, {who}", n * side.tokens / side.of(n), "", how)
        for who, side in (("ours", own), (name, theirs)):
            yield Row(f"{at}: clients an hour, {who}", 3600 * n / side.of(n), "", how)
        yield Row(f"{at}: ours / {name}", theirs.of(n) / own.of(n), bench.of_time(">= 1"), how)
    how = f"above what lay on the card before; {client}"
    for who, side in (("ours, base and all", own), (name, theirs)):
        yield Row(f"{title}: peak GB, {who}", side.most / 1e9, "", how)


# -- DP, the certificate --------------------------------------------------------------------------


def private(bench: Bench, size: str) -> Iterator[Row]:
    """A DP step beside a plain one and Opacus', in turns."""
    from benchmarks import dp_step

    sizes = SMALL if bench.tiny else SIZES[size]
    length, rounds = (16, 1) if bench.tiny else (256, 7)
    names = ("plain", "ours", "hooks", "ghost")
    ways = {name: dp_step.WAYS[name] for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus: of its generator, and of hooks that see no input
        found = dp_step.measure("llama", length, rounds, bench.device, sizes, ways)
    how = f"float32, batch {dp_step.BATCH} x {length} tokens, rank {dp_step.RANK}, {rounds} rounds"
    own = found["ours"]
    yield Row(f"DP step {size}: / plain step", own["ratio"], bench.of_time("<= 1.5"), how)
    for way in names[2:]:
        at = f"DP step {size}: / {dp_step.WORDS[way]}"
        if way in found:
            yield Row(at, own["ratio"] / found[way]["ratio"], bench.of_time("<= 1"), how)
    yield Row(f"DP step {size}: memory / plain step's", own["memory_ratio"], "", how)
    missing = [dp_step.WORDS[way] for way in names[2:] if way not in found]
    if missing:
        raise SkippedError(f"{' and '.join(missing)} failed here, as printed above")


def certificate(bench: Bench, size: str) -> Iterator[Row]:
    """Its share of a round."""
    from benchmarks.certificate import measured

    changes = {"clients.count": 2, "run.rounds": 10, "simulate.workers": 1}
    config = fitted(bench.large(size)("certificate", **changes), bench)

    def clock() -> float:
        devices.synchronise(bench.device)
        return time.perf_counter()

    ran = measured(config, 2 if bench.tiny else 3, clock)
    shares = [x / whole for x, whole in zip(ran.certificates, ran.rounds, strict=True)][1:]
    seconds = statistics.median(ran.rounds[1:])
    how = (
        f"fedex, 2 clients of {bench.shape.steps} steps, rounds of {seconds:.3g} s from the second"
    )
    yield Row(f"certificate {size}: share of a round's time", statistics.median(shares), "", how)
    cache.forget_model()


# -- quantised ------------------------------------------------------------------------------------

KINDS = {"4bit": "bitsandbytes", "int8": "torchao"}


def quantised(bench: Bench, size: str, kind: str) -> Iterator[Row]:
    """Our clients on a base in few bits.

    Raises:
        SkippedError: its package or a real card is missing.
    """
    if bench.tiny or find_spec(KINDS[kind]) is None:
        raise SkippedError(f"needs {KINDS[kind]} on a card")
    given = bench.large(size)(kind, **{"model.quantization": kind})
    config = fitted(given, bench)
    devices.forget_most(bench.device)
    side, idle, begun = Side(), devices.most_used(bench.device), time.perf_counter()
    while len(side.seconds) < 3 and time.perf_counter() - begun < bench.budget:
        side.call(lambda: ours(config, len(side.seconds)), bench.device)
    most = devices.most_used(bench.device) - idle
    here = loaded(config).fingerprint
    cache.forget_model()
    at, shape = f"quantised {size}, {kind}", bench.shape
    how = f"{shape.steps} steps of {shape.batch} x {shape.tokens} tokens, the base warm"
    warm = statistics.median(side.seconds[1:] or side.seconds)
    yield Row(f"{at}: tokens a second", side.tokens / warm, "", how)
    yield Row(f"{at}: clients an hour", 3600 / warm, "", how)
    yield Row(f"{at}: peak GB", most / 1e9, "", "base and all")
    if size == next(iter(SIZES)):
        host = preflight.read({**given, "simulate.devices": str(devices.HOST)})
        there = cache.model(host, cache.corpus(host).labels).fingerprint
        how = "1: a node on the card and a server on the host agree that it is one base"
        yield Row(f"{at}: the host's fingerprint", float(here == there), ">= 1", how)
        cache.forget_model()
