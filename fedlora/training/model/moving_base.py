"""The weights under the adapters: W0, the changes so far, and what is folded in for a round.

    into the base     W = round(W0 + start + sum of the changes), in the weight's own dtype
    beside it         y = W0 x + start x + sum of the changes x, W0 never touched

Beside, the changes stay what they are, factors in float32, so a bfloat16 or a quantised base takes
them without rounding; it costs 2 r (d + k) operations a token and change, and their memory.

`start` is what an initialisation such as PiSSA takes out of the base, the same on every client. The
adapter that a run starts from (start_adapter.py) is part of W0; `aside` is what of it no weight
holds.

W0 and its changes are added up on the host, by one order and one rounding, so that a base has the
same bits on every device; W0 of a weight that has moved is kept there, and nowhere else.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlora.config.sections import ModelConfig
from fedlora.errors import ModelError
from fedlora.lora.adapter import Adapter, Delta, Pair, dense, together
from fedlora.lora.lowrank import accumulate
from fedlora.strategies.base import Version
from fedlora.strategies.base_log import BaseLog
from fedlora.training.devices import on_host
from fedlora.training.model.expert import Expert
from fedlora.training.model.quantized import weight_of
from fedlora.training.model.shape import Shape


def beside(config: ModelConfig) -> bool:
    """Do changes of this base stay beside its weights? By themselves, where those would round."""
    if config.merge == "auto":
        return config.dtype != "float32" or config.quantization != "none"
    return config.merge == "keep-as-adapter"


NOTHING: Adapter = {}


class Beside:
    """A forward hook: y + sum of deltas x, in float32 at least."""

    def __init__(self) -> None:
        self.deltas: tuple[Pair | Tensor, ...] = ()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = inputs[0]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for delta in self.deltas:
            if isinstance(delta, Pair):
                change = linear(linear(x, delta.A.to(x)), delta.B.to(x)) * delta.scale
            else:
                change = linear(x, delta.to(x))
            y = y + change.to(y.dtype)
        return y


class _Fetched(Mapping[str, Tensor]):
    """Tensors by name, each fetched as it is asked for and not kept: never all of them at once."""

    def __init__(self, names: Collection[str], fetch: Callable[[str], Tensor]) -> None:
        self._names, self._fetch = names, fetch

    def __getitem__(self, name: str) -> Tensor:
        return self._fetch(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MovingBase:
    """The base weights of the adapted modules, each (d, k) or, with fan_in_fan_out, (k, d)."""

    def __init__(
        self,
        modules: Mapping[str, Any],
        shapes: Mapping[str, Shape],
        beside: bool,
        aside: Adapter = NOTHING,
    ) -> None:
        self._layers = {m: x.get_base_layer() for m, x in modules.items()}
        self._shapes = shapes
        self.beside, self._aside = beside, aside
        self._origin: dict[str, Tensor] = {}  # W0 of the modules whose weight has moved
        self._shift: dict[str, Tensor] = {}  # what they moved by, without start
        self._log = BaseLog()  # the same in factors, where it stays beside
        self._start: Mapping[str, Delta] = {}
        self._terms: dict[str, Beside] = {}
        self._at: tuple[str, int] = ("", 0)

    def weights(self) -> Mapping[str, Tensor]:
        """W0 of every module, (d, k), on the host; of a card's each is fetched as it is asked for,
        and on the host none is copied."""
        return _Fetched(self._layers, self._fetched)

    def _fetched(self, m: str) -> Tensor:
        W = on_host(self._origin[m] if m in self._origin else weight_of(self._layers[m]))
        W = W.T if self._shapes[m].fan_in_fan_out else W
        return W.float() + dense(self._aside[m]) if m in self._aside else W

    def device_of(self, m: str) -> torch.device:
        """Where a module lies: a base may be spread over several devices."""
        device: torch.device = self._layers[m].weight.device
        return device

    @contextlib.contextmanager
    def gradients(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Within it, base weights gather gradients, given back as (d, k)."""
        layers = self._layers.items()
        weights: dict[str, Any] = {
            m: x.stack if isinstance(x, Expert) else x.weight for m, x in layers
        }

        def gathered() -> dict[str, Tensor]:
            found = {}
            for m, x in layers:
                W = weights[m]  # None: nothing that the loss sees hangs on it
                G = torch.zeros_like(W) if W.grad is None else W.grad
                found[m] = G[x.index] if isinstance(x, Expert) else G
            found = {m: on_host(G) for m, G in found.items()}
            return {m: G.T if self._shapes[m].fan_in_fan_out else G for m, G in found.items()}

        try:
            for W in weights.values():
                W.requires_grad_(True)
            yield gathered
        finally:
            for W in weights.values():
                W.requires_grad_(False)
                W.grad = None

    def rebase(
        self, token: str, versions: Sequence[Version], start: Mapping[str, Delta] | None = None
    ) -> None:
        """See `Model.rebase`."""
        target = versions[-1].number if versions else 0
        for change in (start or {}, *(v.delta for v in versions)):
            self._check(change)
        run, number = self._at
        rest = [v for v in versions if v.number > number]
        follows = run == token and target >= number and not any(v.snapshot for v in rest)
        touched = set[str]()
        if not follows or len(rest) != target - number:
            touched = {*self._shift, *self._start, *self._terms}
            self._shift, self._log, self._start = {}, BaseLog(), start or {}
            touched |= {*self._start}
            rest = list(versions)
        self._at = ("", 0)  # until it is whole
        for m in touched:
            self._set_weight(m, None)
        for version in rest:
            self._take(version)
        for m in {m for v in rest for m in v.delta}:
            self._set_weight(m, self._shift.get(m))
        self._at = (token, target)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Within it every weight is W0; after it, the base has its old bits.

        Not within `folded`.
        """
        touched = {*self._shift, *self._start, *self._terms}
        was = self._shift, self._log, self._start
        try:
            self._shift, self._log, self._start = {}, BaseLog(), {}
            for m in touched:
                self._set_weight(m, None)
            yield
        finally:
            self._shift, self._log, self._start = was
            for m in touched:
                self._set_weight(m, self._shift.get(m))

    def _check(self, change: Mapping[str, Delta]) -> None:
        """Nothing, where each change is of the size of its weight: of factors, before it is made.

        Raises:
            ModelError: one is not, or there is no such weight.
        """
        for m, delta in change.items():
            size = (x.d, x.k) if (x := self._shapes.get(m)) else ()
            if tuple(delta.shape) != size:
                raise ModelError(f"a base change of {m} is {tuple(delta.shape)}, must be {size}")

    def _take(self, version: Version) -> None:
        if self.beside:  # by the log's own rule, so that all who took the same hold the same bits
            version = replace(version, delta={m: together(x) for m, x in version.delta.items()})
            whole = version.snapshot or not self._log.versions
            self._log = BaseLog((version,)) if whole else self._log.add(version.delta)
            return
        for m, delta in version.delta.items():
            before = None if version.snapshot else self._shift.get(m)
            self._shift[m] = accumulate(before, delta)

    @contextlib.contextmanager
    def folded(self, fold: Adapter) -> Iterator[None]:
        """Within it, these pairs are part of the base; after it, the base has its old bits."""
        self._check(fold)
        try:
            for m, pair in fold.items():
                shift = self._shift.get(m)
                self._set_weight(m, None if self.beside else accumulate(shift, pair), pair)
            yield
        finally:
            for m in fold:
                self._set_weight(m, self._shift.get(m))

    def _set_weight(self, m: str, shift: Tensor | None, fold: Pair | None = None) -> None:
        if self.beside:
            self._set_beside(m, fold)
            return
        weight = self._layers[m].weight
        with torch.no_grad():
            if m not in self._origin:
                self._origin[m] = on_host(weight).clone()
            W0 = self._origin[m]
            if m in self._start:
                start = dense(self._start[m])
                shift = start if shift is None else start + shift
            if shift is None:
                weight.copy_(W0)
            else:
                turned = shift.T if self._shapes[m].fan_in_fan_out else shift
                weight.copy_(W0.float() + turned if W0.dtype != turned.dtype else W0 + turned)

    def _set_beside(self, m: str, fold: Pair | None) -> None:
        if m not in self._terms:
            self._terms[m] = Beside()
            self._layers[m].register_forward_hook(self._terms[m])
        changes = [v.delta[m] for v in self._log.versions if m in v.delta]
        start = [self._start[m]] if m in self._start else []
        every = (*start, *changes, *([fold] if fold else []))
        device = self._layers[m].weight.device
        self._terms[m].deltas = tuple(_over(together(x), device) for x in every)


def _over(delta: Pair | Tensor, device: torch.device) -> Pair | Tensor:
    """A change on a device: once, and not in every forward pass."""
    if isinstance(delta, Pair):
        return replace(delta, A=delta.A.to(device), B=delta.B.to(device))
    return delta.to(device)
