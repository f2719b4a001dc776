"""The frozen layers below the first adapted one: computed once an example, then remembered.

Where only the last layers train, the states that enter the first of them are a function of the
example alone. They are always computed in groups of GROUP examples whose lengths round up to the
same multiple of WIDTH, padded to it, short groups filled up: a matrix product's order of summation
depends on its size, and this one's size on the example alone. Those as long as the multiple are in
groups of their own, with a filler of one token: a kernel may take another way where nothing is
masked, and that must not depend on the group's others. So the states are the same bits
whichever client computes them, when, and for which batch, and what was forgotten for want of room
comes back to the same bits. Computed in the batches as they come (train.prefix-cache = 0) they
differ by rounding. They are kept on the model's device, those of each precision apart.

`ahead` computes what several batches lack at once, so that the groups are full.
"""

import contextlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.config.task_names import kind_of
from fedlora.training.data.batches import examples_in
from fedlora.training.devices import casts, moved
from fedlora.training.model.agreement import pads_left
from fedlora.training.model.dropout import drops
from fedlora.training.model.layers import depth_of
from fedlora.training.model.shape import Shape
from fedlora.training.model.targets import stacks
from fedlora.training.precision import autocast
from fedlora.training.tasks import task_of
from fedlora.training.user_code import is_code

GROUP, WIDTH = 8, 8
AHEAD = 128
"""Examples that `ahead` looks at together."""


class Prefix:
    """The first `depth` layers of a base whose adapted modules all lie above them."""

    def __init__(
        self, layers: nn.ModuleList, depth: int, megabytes: int, device: torch.device
    ) -> None:
        self.layers, self.depth, self.device = layers, depth, device
        self.room = megabytes * 2**20
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()  # least recently used first
        self._size = 0
        self.computed = 0
        """Examples computed so far."""

    @classmethod
    def of(cls, base: nn.Module, shapes: Mapping[str, Shape], config: Config) -> "Prefix | None":
        """The prefix that may be remembered; None where nothing is frozen below, or it varies."""
        found = {m.split(f".{depth_of(m)}.")[0] for m in shapes if depth_of(m) is not None}
        depths = [d for m in shapes if (d := depth_of(m)) is not None]
        whole = len(found) == 1 and len(depths) == len(shapes) and min(depths, default=0) > 0
        varies = bool(
            config.lora.modules_to_save  # they may lie below
            or is_code(config.model.path)  # whose layers may be called in any way
            or pads_left(base)
            or _writes_beside(base, config)
            or task_of(config.model.task).pictured  # whose states are known by no token ids
            or any(drops(m) for m in base.modules())
            or stacks(base)  # how many of a group's tokens an expert gets depends on the others
        )
        if not config.train.prefix_cache or not whole or varies:
            return None
        layers = base.get_submodule(found.pop())
        if not isinstance(layers, nn.ModuleList):
            return None
        device = next(base.parameters()).device
        return cls(layers, min(depths), config.train.prefix_cache, device)

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """What the model makes of a batch that is padded on the right: its own output."""
        rows = self._examples(inputs)
        found = self._computed(model, dict(rows))
        states = [found[key] if key in found else self._kept[key] for key, _ in rows]
        self._keep({key: x for (key, _), x in zip(rows, states, strict=True)})
        hidden = nn.utils.rnn.pad_sequence(states, batch_first=True)
        more = inputs["input_ids"].shape[1] - hidden.shape[1]  # of a batch wider than its longest
        hidden = nn.functional.pad(hidden, (0, 0, 0, more))  # (b, t, width)
        with self._given(hidden):
            return model(**moved(inputs, self.device))

    def remember(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Compute what these batches lack, as far as there is room for it."""
        rows = {key: row for batch in batches for key, row in self._examples(batch)}
        self._keep(self._computed(model, rows, self.room))

    def snapshot(self) -> tuple[OrderedDict[bytes, Tensor], int, int]:
        """What is remembered now, for `restore`. Copies no states."""
        return self._kept.copy(), self._size, self.computed

    def restore(self, snapshot: tuple[OrderedDict[bytes, Tensor], int, int]) -> None:
        """Remember what was remembered then, and nothing else."""
        self._kept, self._size, self.computed = snapshot

    def _examples(self, inputs: Mapping[str, Tensor]) -> list[tuple[bytes, Tensor]]:
        """Each example of a batch under its key, its (1 or 2, tokens) numbers without padding."""
        how = f"{self.device} {casts(self.device)} ".encode()
        columns = [inputs[c] for c in ("input_ids", "token_type_ids") if c in inputs]
        lengths = inputs["attention_mask"].sum(1).tolist()
        rows = [torch.stack([c[i, :n] for c in columns]) for i, n in enumerate(lengths)]
        return [(how + row.numpy().tobytes(), row) for row in rows]

    def _keep(self, states: Mapping[bytes, Tensor]) -> None:
        """Remember these as the most recently used, and forget what there is no room for."""
        for key, x in states.items():
            if key not in self._kept:
                self._size += x.nbytes
            self._kept[key] = x
            self._kept.move_to_end(key)
        while self._size > self.room:
            self._size -= self._kept.popitem(last=False)[1].nbytes

    def _computed(
        self, model: nn.Module, rows: Mapping[bytes, Tensor], most: float = math.inf
    ) -> dict[bytes, Tensor]:
        """What enters the first adapted layer for those that are not kept, (tokens, width).

        Stops once it has `most` bytes.
        """
        found: dict[bytes, Tensor] = {}
        by_width: dict[tuple[int, bool], list[bytes]] = {}
        for key, row in rows.items():
            if key not in self._kept:
                n = row.shape[1]
                width = -(-n // WIDTH) * WIDTH
                by_width.setdefault((width, n == width), []).append(key)
        for (width, full), alike in by_width.items():
            for start in range(0, len(alike), GROUP - full):
                group = alike[start : start + GROUP - full]
                some = [rows[key] for key in group] + [rows[group[0]]] * (GROUP - len(group))
                some[-1] = some[-1][:, :1] if full else some[-1]
                states = self._enter(model, some, width)
                if states.nbytes > most:
                    return found
                most -= states.nbytes
                found |= {key: states[i, : rows[key].shape[1]].clone()
                          for i, key in enumerate(group)}  # fmt: skip
                self.computed += len(group)
        return found

    def _enter(self, model: nn.Module, rows: Sequence[Tensor], width: int) -> Tensor:
        """Rows of (1 or 2, tokens) up to the first adapted layer: (n, width, hidden)."""
        padded = torch.stack([nn.functional.pad(row, (0, width - row.shape[1])) for row in rows], 1)
        inputs = dict(zip(("input_ids", "token_type_ids"), padded, strict=False))
        lengths = torch.tensor([[row.shape[1]] for row in rows])
        inputs["attention_mask"] = (torch.arange(width) < lengths).long()

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        hook = self.layers[self.depth].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                model(**moved(inputs, self.device))
        except _Reached as reached:
            return reached.states
        finally:
            hook.remove()
        raise AssertionError("the model ended without entering its first adapted layer")

    @contextlib.contextmanager
    def _given(self, hidden: Tensor) -> Iterator[None]:
        """Within it, the prefix gives back these states and computes nothing."""
        skipped = list(self.layers)[: self.depth]
        for layer in skipped:
            layer.forward = lambda *_, **__: hidden
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward


def _writes_beside(base: Any, config: Config) -> bool:
    """Is what a decoder is given another text than the encoder's, by which states are kept?"""
    two = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return bool(two) and not kind_of(config.model.task).pooled


def ahead(
    prefix: Prefix | None, model: nn.Module, batches: Iterable[dict[str, Tensor]], precision: str
) -> Iterator[dict[str, Tensor]]:
    """The same batches; what the next AHEAD examples lack is computed before the first of them."""
    batches = iter(batches)
    if prefix is None:
        yield from batches
        return
    while some := list(itertools.islice(batches, 1)):
        more = max(0, AHEAD // examples_in(some[0]) - 1)
        some += itertools.islice(batches, more)
        with autocast(precision, prefix.device):
            prefix.remember(model, some)
        yield from some


class _Reached(Exception):  # noqa: N818 (no error: it ends a pass early)
    """The states that enter the first adapted layer."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
