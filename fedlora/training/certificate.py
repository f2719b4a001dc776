"""The certificate: each model's outputs on a few shared inputs, before and after a round.

For a module of k inputs and d outputs, and K pairs of sign vectors x_j (k), u_j (d) that server and
clients draw alike,

    c_j(model) = u_j . (module(x_j) - module(0))        K numbers, through the module's own forward
    c_j(tensor) = u_j^T T x_j                           of every other trained tensor, a head, say

Each client measures them when it has loaded what it was sent, and again when it has trained, and
sends both with its update. They are linear in the model, so the server, which measures its own
model, can hold the whole round against them without knowing the algorithm:

    start    c(client's start) = c(server's model of the version that it was sent)
    round    sum_i q_i (c(end_i) - c(start_i)) = c(server's model after) - c(before)

q_i = n_i over the clients that hold the module. Nothing here imports a strategy, an adapter's
algebra or the wire: a helper that is wrong there is wrong on one side of these equations only.

A module's parameters are taken as they lie in memory and computed with in float64, so that no
rounding of a product hides a small fault. A module whose output is not linear in x has no such
numbers; it is NaN here and "not certified" in the record.

Signs are bits of SHAKE-256, the same on every processor.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlora.training.devices import norm_of, on_host, wide_on_host
from fedlora.training.model.expert import Expert
from fedlora.training.model.model import Model
from fedlora.training.model.quantized import is_stored, weight_of

K = 8
"""Numbers a module or tensor, at either time."""
LINEAR = 1e-5
"""How far f(x + y) may be from f(x) + f(y), relative, in a module that is linear in x: some of
PEFT's forms compute a part of theirs in float32 whatever they are given."""

Numbers = Mapping[str, Tensor]
"""By module path or tensor name: (K,) float64."""


def signs(key: str, rows: int, n: int) -> Tensor:
    """(rows, n) of +1 and -1, which follow from the key alone; float64."""
    size = -(-rows * n // 8)
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(key.encode()).digest(size), np.uint8))
    return torch.from_numpy(bits[: rows * n].astype(np.float64) * 2 - 1).view(rows, n)


@torch.no_grad()
def measure(model: Model, key: str, modules: Iterable[str], others: Iterable[str]) -> Numbers:
    """The numbers of these modules and of these other trained tensors, as the model is now."""
    model.peft.eval()
    tensors = model.live()["other"]
    found = {m: _of_module(model, m, key) for m in modules}
    return found | {name: of_tensor(tensors[name], f"{key}/{name}") for name in others}


def _of_module(model: Model, m: str, key: str) -> Tensor:
    layer, shape = model.adapted[m], model.shapes[m]
    return of_layer(layer, f"{key}/{m}", shape.d, shape.k, model.asleep(), model.form.after)


@torch.no_grad()
def of_layer(
    layer: nn.Module | Expert,
    key: str,
    d: int,
    k: int,
    asleep: frozenset[str] = frozenset(),
    after: bool = False,
) -> Tensor:
    """The numbers of one module of k inputs and d outputs, (K,); NaN where it is not linear.

    asleep: names of PEFT adapters that are not active. after: it acts from an invocation on.
    """
    x = signs(f"{key}/x", K, k)
    y = _outputs(layer, torch.cat([x, torch.zeros(1, k), x[:1] + x[1:2]]), d, asleep, after)
    f = y - y[K]  # (K + 2, d)
    gap = (f[K + 1] - f[0] - f[1]).norm()
    if not gap <= LINEAR * (f[0].norm() + f[1].norm() + y[K].norm()):
        return torch.full((K,), torch.nan, dtype=torch.float64)
    return (signs(f"{key}/u", K, d) * f[:K]).sum(1)


@torch.no_grad()
def measure_shared(model: Model, key: str, cuts: Sequence[int]) -> Numbers:
    """The numbers of A alone, where clients share it and keep B: v . (A x), by blocks of its rows.

    Read at the live lora_A while its module's own forward runs; where a form has none, off its
    tensor, which may have fewer columns than the module has inputs. cuts are the ranks of all
    clients, so that the rows of a block are held by the same ones; "module[4:8]" names a block.
    """
    model.peft.eval()
    found = {}
    for m in model.held():
        A = model.sides(m)[0]
        if A.ndim == 1:  # VeRA's vector on the side of A, which is one row by the strategies' count
            found[f"{m}[0:1]"] = signs(f"{key}/{m}/v", K, len(A)) @ wide_on_host(A)
            continue
        x = signs(f"{key}/{m}/x", K, A.shape[1])
        reads = isinstance(layer := model.adapted[m], Expert) or hasattr(layer, "lora_A")
        inner = _inner(model, m, x) if reads else x @ wide_on_host(A).T  # (K, r)
        v = signs(f"{key}/{m}/v", K, max(*cuts, inner.shape[1]))
        edges = [0, *(c for c in sorted(set(cuts)) if c < inner.shape[1]), inner.shape[1]]
        for a, b in pairwise(edges):
            found[f"{m}[{a}:{b}]"] = (v[:, a:b] * inner[:, a:b]).sum(1)
    return found


def _inner(model: Model, m: str, x: Tensor) -> Tensor:
    """A x for rows of x, (K, r), as the module computes it.

    DoRA's code applies A to the unit rows as well, for the norm that it divides by.
    """
    if isinstance(model.adapted[m], Expert):
        return model.adapted[m].inner(x)  # type: ignore[no-any-return]
    seen: list[Tensor] = []
    side = model.adapted[m].lora_A[model.active]

    def keep(_: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        if given[0].shape == x.shape and torch.equal(given[0].to(x.dtype), x):
            seen.append(y)

    hook = side.register_forward_hook(keep)
    try:
        layer, d = model.adapted[m], model.shapes[m].d
        _outputs(layer, x, d, model.asleep(), model.form.after)
    finally:
        hook.remove()
    return seen[0]


def _outputs(layer: Any, x: Tensor, d: int, asleep: frozenset[str], after: bool) -> Tensor:
    """The live module's output (n, d) for rows of x, in float64; a quantised base's as 0.

    On the host, with its parameters there: not every device has float64.
    """
    if isinstance(layer, Expert):
        return layer(x)
    base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    held = {name: t for name, t in held.items() if asleep.isdisjoint(name.split("."))}
    tensors = {name: wide_on_host(t) for name, t in held.items() if not is_stored(t)}
    tensors |= {n: on_host(t) for n, t in layer.named_buffers() if n in held and n not in tensors}
    with ExitStack() as stack:
        if is_stored(base.weight):
            zeros = torch.zeros(len(x), d, dtype=torch.float64)
            stack.enter_context(patch.object(base, "forward", lambda _: zeros))
        kwargs = {"alora_offsets": [1] * len(x)} if after else {}
        found: Tensor = functional_call(layer, tensors, (x,), kwargs)
    return found


@torch.no_grad()
def of_tensor(p: Tensor, key: str) -> Tensor:
    """The numbers of one tensor, (K,)."""
    T = wide_on_host(p).reshape(p.shape[0] if p.ndim > 1 else 1, -1)
    u, x = signs(f"{key}/u", K, T.shape[0]), signs(f"{key}/x", K, T.shape[1])
    return ((u @ T) * x).sum(1)


# -- what is held against them --------------------------------------------------------------------

FLOAT32 = 2.0**-24
WIRE = {"float64": 0.0, "float32": FLOAT32, "bfloat16": 2.0**-9, "int8": 0.015, "int4": 0.26}
"""Root mean square of what sending does to a tensor's numbers, of their own; the narrow ones where
a row's largest number is 4.5 times its typical one, rounded stochastically."""
BASE = {"float32": FLOAT32, "bfloat16": 2.0**-9, "float16": 2.0**-12}
"""The same of a base weight that takes a change in."""
SIGMAS = 3.0
"""How many standard deviations of all this the numbers may be off: eight of them, averaged."""


@dataclass(frozen=True, slots=True)
class Size:
    """Frobenius norms: of the weight that takes changes in, and of what travels."""

    base: float
    adapter: float
    """s |B R| |A|, or of any other trained tensor its own norm."""


Sizes = Mapping[str, Size]


def sizes(model: Model, modules: Iterable[str], others: Iterable[str]) -> Sizes:
    """Of each module and tensor of `measure`, as the model is now."""
    live = model.live()
    found = {m: Size(_base_size(model, m), _adapter_size(model, m)) for m in modules}
    for name in others:
        p, size = live["other"][name], norm_of(live["other"][name])
        found[name] = Size(size if p.dtype != torch.float32 else 0.0, size)
    return found


def shared_sizes(model: Model, names: Iterable[str]) -> Sizes:
    """Of each block of rows of A that `measure_shared` names."""
    found = {}
    for name in names:
        m, _, block = name.rstrip("]").rpartition("[")
        a, b = map(int, block.split(":"))
        A = model.sides(m)[0]
        found[name] = Size(0.0, norm_of(A[a:b] if A.ndim > 1 else A))
    return found


def _base_size(model: Model, m: str) -> float:
    """0 where the weight takes no change in: what stays beside it is not rounded."""
    return 0.0 if model.base.beside else norm_of(weight_of(model.adapted[m].get_base_layer()))


def _adapter_size(model: Model, m: str) -> float:
    """s |B R| |A|; of a form that has no such factors the weight's own norm, which is more."""
    if model.form.kind != "factors":
        return norm_of(weight_of(model.adapted[m].get_base_layer()))
    if model.active not in model.adapted[m].lora_A:
        return 0.0
    A, B = (x.detach() for x in model.sides(m))
    B = B @ model.cores[m].whole().detach() if m in model.cores else B
    return float(model.adapted[m].scaling[model.active]) * norm_of(A) * norm_of(B)


@dataclass(frozen=True, slots=True)
class Witness:
    """What one client measured in a round, and how much it counts."""

    weight: float
    """n_i; times what a stage made of it, where that is a number."""
    start: Numbers
    end: Numbers

    def change(self, name: str) -> Tensor:
        return self.end[name] - self.start[name]


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two sets of numbers are apart, and what rounding explains: root mean squares."""

    found: float
    bound: float

    @property
    def excess(self) -> float:
        """Above 1 it is no rounding. NaN counts as infinite, and so does any gap without room."""
        if self.found <= self.bound:
            return self.found / self.bound if self.bound else 0.0
        return self.found / self.bound if self.bound and self.found < math.inf else math.inf


def start_gaps(
    before: Numbers, size: Sizes, start: Numbers, wire: str, dtype: str
) -> dict[str, Gap]:
    """A client's start against the server's model of the version it was sent, by name."""
    found = {}
    for name, c in start.items():
        s = size[name]
        room = 2 * max(FLOAT32, BASE[dtype]) * s.base + (4 * FLOAT32 + 2 * WIRE[wire]) * s.adapter
        found[name] = Gap(_rms(c - before[name]), SIGMAS * room)
    return found


def round_gaps(
    before: Numbers,
    after: Numbers,
    size: tuple[Sizes, Sizes],
    witnesses: Sequence[Witness],
    ranks: Mapping[str, int],
    wire: str,
    dtype: str,
) -> dict[str, Gap]:
    """sum_i q_i (end_i - start_i) against the server's change of the round, by name.

    size: of the server's model before and after. ranks: the largest of each module, which bounds
    how much larger |B| |A| may be than what they make.
    """
    found = {}
    for name in after:
        here = [w for w in witnesses if name in w.start]
        total = sum(w.weight for w in here)
        if not total:
            found[name] = Gap(_rms(after[name] - before[name]), _still(size, name, dtype))
            continue
        mean = sum((w.weight / total * w.change(name) for w in here), torch.zeros(K).double())
        moved = sum(w.weight / total * _rms(w.change(name)) for w in here)
        factors = size[0][name].adapter + size[1][name].adapter + ranks.get(name, 1) ** 0.5 * moved
        room = _still(size, name, dtype) + SIGMAS * (4 * FLOAT32 + 2 * WIRE[wire]) * factors
        found[name] = Gap(_rms(mean - (after[name] - before[name])), room)
    return found


def _still(size: tuple[Sizes, Sizes], name: str, dtype: str) -> float:
    """What rounding explains where no client trained."""
    base = size[0][name].base + size[1][name].base
    return SIGMAS * (max(FLOAT32, BASE[dtype]) * base + 4 * FLOAT32 * size[1][name].adapter)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def public_scales(model: Model, names: Iterable[str]) -> dict[str, float]:
    """By what differences are divided to fit into a secure sum's range; alike on every machine.

    Of a module |W0| + sqrt(d + k), of another tensor or rows of A the root of how many there are.
    """
    weights, others, found = model.weights(), model.live()["other"], {}
    for name in names:
        if name in weights:
            W = weights[name]
            found[name] = norm_of(W) + sum(W.shape) ** 0.5
        elif name in others:
            found[name] = max(1.0, others[name].numel() ** 0.5)
        else:
            a, b = map(int, name.rstrip("]").rpartition("[")[2].split(":"))
            found[name] = (b - a) ** 0.5
    return found


def quantised(
    model: Model, error: float, own: float, names: Iterable[str], scales: Mapping[str, float]
) -> dict[str, float]:
    """What a secure sum's quantisation explains.

    It moves any number of the factors, s folded into B or R, by `error` at most, and any of the
    certificate's own, over its scale, by `own`.
    """
    live, held, found = model.live(), {*model.held()}, {}
    for name in names:
        if name in held and model.sides(name)[0].ndim > 1:
            A, B = model.sides(name)
            s = float(model.adapted[name].scaling[model.active])
            pair = len(B) ** 0.5 * norm_of(A) + s * A.shape[1] ** 0.5 * norm_of(B)
            spread = norm_of(A) * norm_of(B) if name in model.cores else pair
        elif name in model.shapes:
            spread = max(model.shapes[name].d, model.shapes[name].k)
        else:
            m = name.partition("[")[0]
            size = model.shapes[m].k if m in model.shapes else live["other"][name].numel()
            spread = scales[name] * size**0.5
        found[name] = SIGMAS * (own * scales[name] + error * spread)
    return found


# -- names and keys, alike on both sides ----------------------------------------------------------


def key_of(seed: int, round: int, buffered: bool) -> str:
    """The key that a round's signs are drawn from.

    Updates of several rounds that meet in one buffer must have the same signs, so a buffered run
    draws once.
    """
    return f"certificate/{seed}/{0 if buffered else round}"


def names_of(ranks: Mapping[str, int], others: Iterable[str], cuts: Sequence[int]) -> list[str]:
    """The names of a client's numbers, in the order they travel in.

    ranks: of the modules it holds. cuts: where A alone is shared, all clients' ranks; else none.
    """
    if not cuts:
        return [*sorted(ranks), *sorted(others)]
    edges = {m: [0, *(c for c in sorted(set(cuts)) if c < r), r] for m, r in ranks.items()}
    return [f"{m}[{a}:{b}]" for m in sorted(ranks) for a, b in pairwise(edges[m])]


def measure_as(
    model: Model, key: str, ranks: Mapping[str, int], others: Iterable[str], cuts: Sequence[int]
) -> Numbers:
    """`measure`, or where A alone is shared `measure_shared`: by the names of `names_of`."""
    return measure_shared(model, key, cuts) if cuts else measure(model, key, ranks, others)
