"""What example-level DP costs: one training step by every way there is, side by side.

    make bench-dp                                     both model types, as below
    python -m benchmarks.dp_step --rounds 31 --length 128

Models of MiniLM's size (6 layers, hidden 384) with LoRA of rank 8 on query and value, batch 8,
AdamW; random weights, since no speed depends on them. All ways take turns in a round, so what
else the machine does hits all alike; single thread, CPU time, and the median over rounds of each
way's ratio to the plain step of the same round. Memory is the peak of what torch has allocated
during a step, above what it had before.

    plain        the LoRA step without privacy
    ours         fedlora.privacy: per-example gradients, clipping, AES-CTR noise, the same optimiser
    hooks        Opacus, grad_sample_mode="hooks"
    ghost        Opacus, grad_sample_mode="ghost" (two backward passes)
    torch.func   vmap(grad) over functional_call, then clip and noise
"""

import argparse
import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.measure import Row
from fedlora.privacy.chance import Chance
from fedlora.privacy.mechanism import ClippedSum
from fedlora.privacy.per_example import kept_apart
from fedlora.training import devices

C, SIGMA, RANK, BATCH = 0.3, 1.0, 8, 8
Step = Callable[[], None]
Batch = dict[str, Tensor]
Sizes = Mapping[str, int]
MINILM: Sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
                 "intermediate_size": 1536}  # fmt: skip


def build(kind: str, attention: str, device: torch.device, sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    common = {**sizes, "attn_implementation": attention}
    if kind == "bert":
        base: nn.Module = BertForSequenceClassification(
            BertConfig(vocab_size=30522, num_labels=6, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, **common)
        )  # fmt: skip
        targets = ["query", "value"]
    else:
        base = LlamaForCausalLM(LlamaConfig(**{"vocab_size": 4000, **common}, pad_token_id=0))
        targets = ["q_proj", "v_proj"]
    heads = ["classifier"] if kind == "bert" else None
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, modules_to_save=heads)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model.to(device).train()


def data(kind: str, length: int, device: torch.device, most: int) -> Batch:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, most - 1, (BATCH, length), generator=g)
    labels = torch.randint(0, 6, (BATCH,), generator=g) if kind == "bert" else ids.clone()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return devices.moved(batch, device)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 1:
        return cross_entropy(logits, labels, reduction="none")
    token = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return token.mean(1)


def forward(model: Any, batch: Batch) -> Tensor:
    return losses(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        batch["labels"],
    )


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def plain(kind: str, batch: Batch, sizes: Sizes) -> Step:
    model = build(kind, "sdpa", batch["labels"].device, sizes)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(model, batch).mean().backward()
        optimizer.step()

    return step


def ours(kind: str, batch: Batch, sizes: Sizes) -> Step:
    model = build(kind, "sdpa", batch["labels"].device, sizes)
    params = tuple(trained(model))
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    chance = Chance()
    apart = kept_apart(model, "default", frozenset(params))
    sink = apart.__enter__()

    def step(_: Any = apart) -> None:  # held, or its end would come at once
        optimizer.zero_grad(set_to_none=True)
        clipped = ClippedSum(params, C)
        forward(model, batch).sum().backward()
        clipped.add(sink.take(BATCH))
        for p, g in clipped.noised(SIGMA, chance).items():
            p.grad = (g / BATCH).to(p.dtype).to(p.device)
        optimizer.step()

    return step


def opacus(kind: str, batch: Batch, sizes: Sizes, mode: str) -> Step:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model = build(kind, "sdpa", batch["labels"].device, sizes)
    optimizer: Any = torch.optim.AdamW(trained(model), lr=1e-4)
    loader = DataLoader(TensorDataset(torch.zeros(10 * BATCH, 1)), batch_size=BATCH)
    made = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=SIGMA,
        max_grad_norm=C, poisson_sampling=False, grad_sample_mode=mode, wrap_model=False,
        criterion=nn.CrossEntropyLoss(reduction="mean"),
    )  # fmt: skip
    optimizer = made[1]

    def hooks() -> None:
        optimizer.zero_grad()
        forward(model, batch).mean().backward()
        optimizer.step()

    def ghost() -> None:
        optimizer.zero_grad()
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"]
        if labels.ndim == 1:
            made[2](out, labels).backward()
        else:
            shape = (BATCH, labels.shape[1] - 1)
            flat = out[:, :-1].reshape(-1, out.shape[-1])
            made[2](flat, labels[:, 1:].reshape(-1), shape=shape).backward()
        optimizer.step()

    return hooks if mode == "hooks" else ghost


def functional(kind: str, batch: Batch, sizes: Sizes) -> Step:
    from torch.func import functional_call, grad, vmap

    model = build(kind, "eager", batch["labels"].device, sizes)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-4)
    mask = torch.zeros(1, 1, 1, 1)  # no padding: an additive mask that hides nothing
    if kind != "bert":
        length = batch["input_ids"].shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]

    def one(live: dict[str, Tensor], ids: Tensor, label: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "attention_mask": mask.expand(1, 1, -1, len(ids))}
        if kind != "bert":
            inputs["use_cache"] = False
        else:
            inputs["attention_mask"] = mask.expand(1, 1, len(ids), len(ids))
        out = functional_call(model, live, (), inputs).logits
        return losses(out, label[None])[0]

    each = vmap(grad(one), in_dims=(None, 0, 0), randomness="different")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        live = {n: p.detach() for n, p in params.items()}
        grads = each(live, batch["input_ids"], batch["labels"])
        norms = sum(g.flatten(1).square().sum(1) for g in grads.values()) ** 0.5
        c = (C / norms).clamp(max=1.0)
        for n, p in params.items():
            total = torch.tensordot(c, grads[n], 1)
            p.grad = (total + SIGMA * C * torch.randn_like(total)) / BATCH
        optimizer.step()

    return step


Ways = Mapping[str, Callable[[str, Batch, Sizes], Step]]
WAYS: Ways = {
    "plain": plain,
    "ours": ours,
    "hooks": lambda kind, batch, sizes: opacus(kind, batch, sizes, "hooks"),
    "ghost": lambda kind, batch, sizes: opacus(kind, batch, sizes, "ghost"),
    "torch.func": functional,
}


WORDS = {"hooks": "Opacus", "ghost": "Opacus ghost clipping", "torch.func": "torch.func"}


def memory(step: Step, device: torch.device) -> float:
    """Peak MB that torch holds during a step, above what it held before."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if not devices.is_host(device):
        devices.forget_most(device)
        before = devices.most_used(device)
        step()
        return (devices.most_used(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    held = peak = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def measure(
    kind: str,
    length: int,
    rounds: int,
    device: torch.device = devices.HOST,
    sizes: Sizes = MINILM,
    ways: Ways = WAYS,
) -> dict[str, dict[str, float]]:
    """On a card the time that passes until it is done, in place of the processor's."""
    batch = data(kind, length, device, sizes.get("vocab_size", 4000))
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, float]] = {}

    def clock() -> float:
        devices.synchronise(device)
        return time.process_time() if devices.is_host(device) else time.perf_counter()

    for name, make in ways.items():
        try:
            steps[name] = make(kind, batch, sizes)
            for _ in range(2):
                steps[name]()
        except Exception as e:
            steps.pop(name, None)
            print(f"  {kind} {name}: {type(e).__name__}: {str(e)[:120]}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(rounds):
        order = list(steps) if n % 2 else list(steps)[::-1]
        for name in order:
            begun = clock()
            steps[name]()
            times[name].append(clock() - begun)
    for name in steps:
        ratios = [t / p for t, p in zip(times[name], times["plain"], strict=True)]
        peaks = [memory(steps[name], device)]
        found[name] = {
            "milliseconds": 1000 * statistics.median(times[name]),
            "ratio": statistics.median(ratios),
            "ratio_of_minima": min(times[name]) / min(times["plain"]),
            "peak_mb": statistics.median(peaks),
        }
    for row in found.values():
        row["memory_ratio"] = row["peak_mb"] / max(found["plain"]["peak_mb"], 1e-9)
    return found


def rows(quick: bool) -> Iterator[Row]:
    """The same for the suite: ours over the plain step, and over Opacus."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds = 2 if quick else 5
    for kind in ("bert", "llama"):
        found = measure(kind, 64, rounds)
        how = f"CPU time, {kind} of MiniLM's size, batch {BATCH}, rank {RANK}, {rounds} rounds"
        memory = found["ours"]["memory_ratio"]
        yield Row(
            f"DP step, {kind}: / plain step", found["ours"]["ratio"], "<= 1.1",
            f"{how}; peak memory {memory:.2f} of the plain step's",
        )  # fmt: skip
        for way in ("hooks", "ghost", "torch.func"):
            if way in found:
                yield Row(
                    f"DP step, {kind}: / {WORDS[way]}",
                    found["ours"]["ratio"] / found[way]["ratio"], "", how,
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--kinds", default="bert,llama")
    parser.add_argument("--out", default="benchmarks/results/dp_step.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    for kind in args.kinds.split(","):
        results[kind] = measure(kind, args.length, args.rounds)
        print(f"\n{kind}, T = {args.length}, batch {BATCH}, rank {RANK}, {args.rounds} rounds")
        print(f"{'':12}{'ms':>8}{'x plain':>9}{'by minima':>11}{'peak MB':>9}{'x plain':>9}")
        for name, x in results[kind].items():
            print(
                f"{name:12}{x['milliseconds']:8.0f}{x['ratio']:9.2f}{x['ratio_of_minima']:11.2f}"
                f"{x['peak_mb']:9.0f}{x['memory_ratio']:9.2f}"
            )
    about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    settings = {"rounds": args.rounds, "length": args.length, "batch": BATCH, "rank": RANK}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(
        json.dumps({**about, **settings, "results": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
