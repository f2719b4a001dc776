"""Local training against the loops people write, what is kept of it, and a prototype."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from benchmarks.engine import federation, quickstart
from benchmarks.measure import Row, forked, paired, spent
from fedlora.config.reader import Config
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.strategies.base import Client, seeded
from fedlora.training import cache
from fedlora.training.data.batches import Encoded, batches, collate
from fedlora.training.model.loading import checkpoint_activations, load_base, load_tokenizer
from fedlora.training.model.model import Model
from fedlora.training.precision import lacking
from fedlora.training.train import example_losses, fit

ALL = frozenset({"A", "B", "other"})
Step = Callable[[], Any]


LIMIT = 1200
"""Rows of the quickstart's data that the pattern is run on: all of them take five minutes."""


def flowertune(quick: bool) -> Iterator[Row]:
    """FlowerTune's pattern: each call loads the base, tokenises, trains, returns its adapter."""
    torch.set_num_threads(1)
    changes = {"train__steps": 2, "clients__count": 2} if quick else {"data__limit": LIMIT}
    for shipped in (True, False):
        wall, cpu = forked(_over_flowertune, changes, 4 if shipped and not quick else 2, shipped)[0]
        name = "FlowerTune's pattern" + ("" if shipped else ", no gradient checkpointing")
        how = (
            f"the quickstart's rounds on {LIMIT} rows, 500 of them its test set; same model, "
            "layers, data, engine; nothing evaluated; from the model's file on; theirs: base "
            "loaded in every call, transformers' "
            f"Trainer, gradient checkpointing {'on, as it ships' if shipped else 'off'}"
        )
        yield Row(f"quickstart: speed over {name}", wall, ">= 3" if shipped else "", how)
        yield Row(f"quickstart: the same in CPU time, {name}", cpu, "", how)


def _over_flowertune(changes: Mapping[str, Any], rounds: int, checkpointing: bool) -> list[float]:
    """Wall and CPU time of the pattern's rounds over ours, from the model's file to the last."""
    with tempfile.TemporaryDirectory() as d:
        config = quickstart(d, clients__ranks="8", **changes)
        pattern = quickstart(d, train__gradient_checkpointing=checkpointing, **changes)
        cache.corpus(config)

        def ours() -> None:
            with federation(config) as (server, grid):
                for number in range(1, rounds + 1):
                    server.round(grid, number)

        def theirs() -> None:
            initial = ArrayRecord(get_peft_model_state_dict(_loaded(pattern)))
            with LocalGrid(naive, config.clients.count, pattern.flat(), 1) as grid:
                strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
                found = strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)
            assert len(found.train_metrics_clientapp) == rounds, "every round was aggregated"

        clocks = (time.perf_counter, time.process_time)
        marks = [[c() for c in clocks]]
        for work in (theirs, ours):
            work()
            marks.append([c() for c in clocks])
        return [(y - x) / (z - y) for x, y, z in zip(*marks, strict=True)]


naive = ClientApp()


def _loaded(config: Config) -> Any:
    base = load_base(config.model, cache.corpus(config).labels, config.run.seed)
    layers = [int(n) % base.encoder.config.num_hidden_layers for n in config.lora.layers]
    if config.train.gradient_checkpointing:
        checkpoint_activations(base.encoder)
    return get_peft_model(
        base,
        LoraConfig(r=8, lora_alpha=config.lora.alpha, modules_to_save=["classifier"],
                   target_modules=list(config.lora.target_modules),
                   layers_to_transform=layers or None),
    )  # fmt: skip


@naive.train()
def _naive(message: Message, context: Context) -> Message:
    """FlowerTune's `train`, for a classifier: what its client does in each call, in its order."""
    config = Config.read(context.run_config)
    corpus = cache.corpus(config)
    rows = corpus.client(int(context.node_config["partition-id"])).train
    tokenizer, model = load_tokenizer(config.model), _loaded(config)
    arrays: ArrayRecord = message.content["arrays"]  # type: ignore[assignment]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    found = tokenizer(list(rows.text), truncation=True, max_length=config.data.max_length)
    data = Dataset.from_dict({**found, "labels": [corpus.labels.index(x) for x in rows.label]})
    with tempfile.TemporaryDirectory() as d:
        arguments = TrainingArguments(
            d, per_device_train_batch_size=config.train.batch_size, num_train_epochs=1,
            max_steps=config.train.steps or -1, learning_rate=config.train.lr,
            lr_scheduler_type="constant", max_grad_norm=config.train.grad_clip, logging_steps=10,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            remove_unused_columns=False, label_names=["labels"],
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, DataCollatorWithPadding(tokenizer), data,
            compute_loss_func=lambda found, labels, **_: cross_entropy(found.logits, labels),
        )  # fmt: skip
        loss = trainer.train().training_loss
    content = {
        "arrays": ArrayRecord(get_peft_model_state_dict(model)),
        "metrics": MetricRecord({"num-examples": len(rows), "train_loss": loss}),
    }
    return Message(RecordDict(content), reply_to=message)


# -- one client's steps -------------------------------------------------------------------------


def _ready(config: Config) -> tuple[Model, Encoded]:
    """The quickstart's model with client 0's adapter loaded and all in training, and its rows."""
    labels = cache.corpus(config).labels
    model = cache.model(config, labels)
    client = Client(0, model.layers(dict.fromkeys(model.shapes, 8)))
    model.load(model.init_factors(client, 0))
    model.trainable(ALL)
    return model, cache.encoded("train", 0, config, labels)


def _padded(rows: Encoded, numbers: Tensor, width: int) -> dict[str, Tensor]:
    """A batch padded to this length, as `padding="max_length"` gives it; to its longest for 0."""
    batch = collate(rows, numbers)
    missing = max(0, width - batch["input_ids"].shape[1])
    return {
        k: x
        if k == "labels"
        else nn.functional.pad(x, (0, missing), value=rows.pad * (k[0] == "i"))
        for k, x in batch.items()
    }


def step(quick: bool) -> Iterator[Row]:
    """Our epoch over a plain loop's, and what adapting only the last layers saves."""
    torch.set_num_threads(1)
    steps, times = (2, 1) if quick else (12, 2)
    with tempfile.TemporaryDirectory() as d:
        seconds: dict[str, float] = {}
        fast = f"float32: {why}" if (why := lacking()) else "in bfloat16"
        for layers in ("", "-2,-1", "-1"):
            config = quickstart(d, train__steps=steps, lora__layers=layers, train__prefix_cache=0)
            model, rows, ours = _fitting(config)
            if not layers:
                for name, width, target in (
                    ("a plain loop", config.data.max_length, ">= 2"),
                    ("one padded to each batch's longest", 0, ""),
                ):
                    ratio, _, _ = paired(_plain(model, rows, config, width), ours, times)
                    yield Row(
                        f"local step: speed over {name}", ratio, target,
                        f"CPU time of {steps} steps, all layers adapted, so what length buckets "
                        f"alone give; plain PyTorch, padded to {config.data.max_length} at most; "
                        f"ours {fast}",
                    )  # fmt: skip
            seconds[layers] = min(spent(ours) for _ in range(times))
        config = quickstart(d, train__steps=steps)
        model, rows, ours = _fitting(config)
        ratio, _, _ = paired(_plain(model, rows, config, config.data.max_length), ours, times)
        yield Row(
            "local step: the quickstart's over a plain loop", ratio, ">= 2",
            f"as above, the last two layers adapted on both sides, ours with what the frozen ones "
            f"make of an example kept (from the second epoch on); {fast}",
        )  # fmt: skip
    for layers, n in (("-2,-1", 2), ("-1", 1)):
        yield Row(
            f"local step: adapting the last {n} of 6 layers / all", seconds[layers] / seconds[""],
            "", "CPU time; no gradient passes below the first adapted layer",
        )  # fmt: skip


def _fitting(config: Config) -> tuple[Model, Encoded, Step]:
    """Model, rows, and our steps on them, done once already."""
    model, rows = _ready(config)

    def ours() -> None:
        fit(model, rows, ALL, config, 1, 0)

    ours()
    return model, rows, ours


def _plain(model: Model, rows: Encoded, config: Config, width: int) -> Step:
    """The loop people write over the same model's layers, whole: nothing that we keep is used."""
    steps, size = config.train.steps, config.train.batch_size
    params = [p for p in model.peft.parameters() if p.requires_grad]

    def run() -> None:
        optimizer = torch.optim.AdamW(params, lr=1e-4)
        model.peft.train()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        for n in range(steps):
            batch = _padded(rows, order.roll(-n * size)[:size], width)
            labels = batch.pop("labels")
            loss = cross_entropy(model.peft(**batch).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

    return run


# -- the frozen layers below the first adapted one ------------------------------------------------


def prefix(quick: bool) -> Iterator[Row]:
    """train.prefix-cache over recomputing, and over a pass through all layers."""
    torch.set_num_threads(1)
    steps, times, kept = (2, 1, ("-1",)) if quick else (12, 2, ("-1", "-2,-1"))
    with tempfile.TemporaryDirectory() as d:
        whole, depth = _epoch(quickstart(d, train__steps=steps, lora__layers=""))
        for layers in kept:
            last = len(layers.split(","))
            changes = {"train__steps": steps, "lora__layers": layers}
            recomputing, _ = _epoch(quickstart(d, train__prefix_cache=0, **changes))
            cached, _ = _epoch(quickstart(d, train__prefix_cache=256, **changes))
            first = spent(cached) / spent(recomputing)
            what = f"the last {last} of {depth} layers adapted"
            how = f"CPU time of the same {steps} steps, {what}"
            passes = f"prefix cache, last {last} of {depth}: epoch / full pass"
            ratio, _, _ = paired(cached, whole, times)
            yield Row(
                passes, ratio, f"<= {1.5 * last / depth:.3g}",
                f"from the second epoch on, over all {depth} layers adapted: about K/L = "
                f"{last / depth:.3f}, of which it may be half over; {how}",
            )  # fmt: skip
            ratio, _, _ = paired(cached, recomputing, times)
            yield Row(f"prefix cache, last {last} of {depth}: epoch / recomputing", ratio, "", how)
            yield Row(
                f"prefix cache, last {last} of {depth}: first epoch / recomputing", first, "",
                f"where everything is computed and kept; {how}",
            )  # fmt: skip
        yield Row(
            "prefix cache: losses equal recomputing's bit for bit", float(_same_losses(d, steps)),
            ">= 1", "1: yes; two epochs, against a cache that has no room and computes anew",
        )  # fmt: skip


def _epoch(config: Config) -> tuple[Step, int]:
    """The same steps of client 0 each time it is called, and the model's number of layers."""
    model, rows = _ready(config)
    depth = len(model.peft.get_base_model().encoder.encoder.layer)  # type: ignore[operator, union-attr]
    return lambda: fit(model, rows, ALL, config, 1, 0), depth


def _same_losses(directory: str, steps: int) -> bool:
    """Two epochs' losses with all kept, and with nothing kept: are they the same numbers?"""
    losses = []
    for keep in (True, False):
        changes = {"lora__layers": "-1", "train__epochs": 2.0, "train__steps": 2 * steps}
        model, rows = _ready(quickstart(directory, train__prefix_cache=256, **changes))
        assert model.prefix
        if not keep:
            model.prefix.room = 0
        found = []
        for epoch in (0, 1):
            chance = seeded(epoch, 0, 0, "batches")
            for batch in batches(rows, 16, chance, steps):
                found.append(example_losses(model, batch).tolist())
        losses.append(found)
    return losses[0] == losses[1]


# -- a prototype that is not in fedlora ----------------------------------------------------------


def batched(quick: bool) -> Iterator[Row]:
    """Several clients' batches through the frozen base in one pass: a prototype."""
    torch.set_num_threads(1)
    times = 1 if quick else 3
    with tempfile.TemporaryDirectory() as d:
        model, rows = _ready(quickstart(d, lora__layers=""))
        model.peft.train()
        for clients, size in ((4, 4), (4, 16), (8, 2)):
            parts = torch.arange(clients * size).split(size)
            apart = [collate(rows, p) for p in parts]
            together = collate(rows, torch.arange(clients * size))

            def each(apart: Sequence[dict[str, Tensor]] = apart) -> None:
                for b in apart:
                    example_losses(model, b).mean().backward()  # type: ignore[no-untyped-call]

            def at_once(together: dict[str, Tensor] = together, n: int = clients) -> None:
                with _side_by_side(model, n):
                    example_losses(model, together).mean().backward()  # type: ignore[no-untyped-call]

            each(), at_once()
            ratio, _, _ = paired(each, at_once, times)
            yield Row(
                f"batched adapters: {clients} clients x {size} examples", ratio, "",
                "speed over one after the other, forward and backward; prototype, built at >= 1.3",
            )  # fmt: skip


@contextlib.contextmanager
def _side_by_side(model: Model, clients: int) -> Iterator[None]:
    """Each adapted layer applies the n-th client's own factors to the n-th part of the batch."""
    undo = []
    for layer in (model.adapted[m] for m in model.held()):
        A = layer.lora_A[model.active].weight.detach().expand(clients, -1, -1).clone()
        B = layer.lora_B[model.active].weight.detach().expand(clients, -1, -1).clone()
        A.requires_grad_(), B.requires_grad_()

        def forward(x: Tensor, *_: Any, A=A, B=B, layer=layer, **__: Any) -> Tensor:  # type: ignore[no-untyped-def]
            parts = x.reshape(clients, -1, x.shape[-1])
            delta = parts @ A.transpose(1, 2) @ B.transpose(1, 2) * layer.scaling[model.active]
            y: Tensor = layer.base_layer(x)
            return y + delta.reshape(y.shape)

        layer.forward = forward
        undo.append(layer)
    try:
        yield
    finally:
        for layer in undo:
            del layer.forward
