"""A client's update as one vector of integers, and a sum of such vectors as uploads.

    [ n_i in the place of its kind | n_i loss_i | m_i | n_i x_i for every tensor, padded ]

A kind is a set of clients of equal ranks and modules. Every tensor has its largest size over the
kinds; a client's own lies in the leading corner, the rest is 0. Scales are folded into R, else
into B, so that clients of different alpha / r add up. The sum S of the vectors holds, entry by
entry, sum n_i x_i over the clients that have the entry, and w_k = sum n_i of each kind k, so that

    x = S / sum of w_k over the kinds that have the entry

is the mean over its holders. One upload a kind, of weight w_k and with its corner of x, then stands
for all its clients, in any aggregate that depends on the uploads through sum n_i x_i and sum n_i
of each entry (`rules.unsummable` measures which do): leaving an entry out, counting it as unchanged
or as zero all weigh x by the same w_k.

The changes of the certificate are tensors of their own range, `terms.CHANGES`. Of a client with one
that is outside of it all of them are random words and m_i = 0, else m_i = 1: its update counts, and
the round has no certificate. What the others' changes add up to is lost with its own, since of
sums over all clients and over all but one the difference would be that one's.

Formal guarantee
    |x - exact mean| <= Terms.error(clients, sum n_i) in every entry. A value that is not finite or
    outside the range is an error of its client, which sends nothing: never a wrong sum.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import UpdateError
from fedlora.federation.secure.masking import Words, fresh_seed, mask, words
from fedlora.federation.secure.terms import CHANGES, Terms
from fedlora.federation.wire.certificate import is_change
from fedlora.federation.wire.messages import Shapes
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Client, Upload

LOSS = 8.0
"""A loss may be so many times as large as any other value."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Kind:
    """Clients that send the same tensors at the same scales, and begin alike."""

    clients: tuple[Client, ...]
    shapes: Shapes
    scale: Mapping[str, float]
    own: bool = False
    """Do they begin with something that each kept?"""


def kinds_of(
    clients: Iterable[tuple[Client, Shapes, Mapping[str, float]]], own: Container[int] = ()
) -> list[Kind]:
    """The clients grouped by the shapes and scales of the tensors they send, and how they begin.

    own: who of them begins with something that it kept.
    """
    found: dict[Any, Kind] = {}
    for client, shapes, scale in clients:
        mine = client.id in own
        key = (tuple(sorted(shapes.items())), tuple(sorted(scale.items())), mine)
        kind = found.setdefault(key, Kind((), shapes, scale, mine))
        found[key] = replace(kind, clients=(*kind.clients, client))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each weight, loss and tensor lies in the vector."""

    kinds: int
    shapes: Mapping[Key, tuple[int, ...]]
    """Sorted; the largest of each tensor over the kinds."""

    @classmethod
    def over(cls, kinds: Sequence[Shapes]) -> "Layout":
        shapes: dict[Key, tuple[int, ...]] = {}
        for kind in kinds:
            for key, shape in kind.items():
                shapes[key] = tuple(map(max, shape, shapes.get(key, shape)))
        return cls(len(kinds), dict(sorted(shapes.items())))

    @property
    def loss(self) -> int:
        """The place of the losses."""
        return self.kinds

    @property
    def fit(self) -> int:
        """The place that counts those whose certificate is in the sum."""
        return self.kinds + 1

    def __len__(self) -> int:
        return self.kinds + 2 + sum(math.prod(shape) for shape in self.shapes.values())

    def places(self) -> Iterator[tuple[Key, tuple[int, ...], slice]]:
        at = self.kinds + 2
        for key, shape in self.shapes.items():
            yield key, shape, slice(at, at := at + math.prod(shape))


def encode(sent: Factors, n: int, loss: float, kind: int, layout: Layout, terms: Terms) -> Words:
    """The vector of one client, not yet masked.

    Raises:
        UpdateError: a value, or n, is outside of what the sum has room for. Names it, and not
            its value.
    """
    if not 1 <= n <= terms.weight:
        raise UpdateError.public(
            "its examples are none, or more than secure.max-weight = "
            f"{terms.weight}: nothing was sent; raise secure.max-weight"
        )
    whole = np.zeros(len(layout), dtype=np.int64)
    whole[kind] = n
    whole[layout.loss] = _integers(
        torch.tensor(loss / LOSS, dtype=torch.float64), n, "the training loss", terms
    )
    mine = folded(sent)
    if strange := mine.keys() - layout.shapes.keys():
        column, name = min(strange)
        raise UpdateError.public(
            f"{column} of {name} has no place in this round's sum: nothing was sent"
        )
    fits = all(_within(x, CHANGES) for key, x in mine.items() if is_change(key))
    whole[layout.fit] = fits
    for key, shape, place in layout.places():
        if key in mine and (fits or not is_change(key)):
            x = mine[key]
            whole[place].reshape(shape)[_corner(x.shape)] = (
                _rounded(x, n, terms.change_unit)
                if is_change(key)
                else _integers(x, n, f"{key[0]} of {key[1]}", terms)
            )
    found = whole.astype(words(terms.bits))
    if not fits:
        for key, _, place in layout.places():
            if is_change(key):
                found[place] = mask(fresh_seed(), place.stop - place.start, terms.bits)
    return found


def fit(total: Words, layout: Layout) -> int:
    """How many clients of a sum have their certificate in it."""
    return int(total[layout.fit])


def decode(
    total: Words, clients: int, layout: Layout, kinds: Sequence[Kind], terms: Terms
) -> tuple[list[Upload], float, float]:
    """One upload for each kind that is in the sum; the mean loss; the error it may have."""
    signed = total.view(np.dtype(f"<i{total.dtype.itemsize}"))
    weights = signed[: layout.kinds].tolist()
    N = sum(weights)
    if N < 1 or min(weights) < 0:
        raise UpdateError.public("the sum of the clients' examples is not a positive number")
    loss = float(signed[layout.loss]) / terms.unit / N * LOSS
    columns: list[dict[str, dict[str, Tensor]]] = [{} for _ in kinds]
    for key, shape, place in layout.places():
        held = np.zeros(shape)
        for kind, w in zip(kinds, weights, strict=True):
            if key in kind.shapes:
                held[_corner(kind.shapes[key])] += w
        unit = terms.change_unit if is_change(key) else terms.unit
        sums = np.asarray(signed[place].reshape(shape) / unit)  # 0-d where the tensor is
        mean = torch.from_numpy(sums) / torch.from_numpy(np.where(held > 0, held, 1))
        for kind, found in zip(kinds, columns, strict=True):
            if key in kind.shapes:
                mine = mean[_corner(kind.shapes[key])].to(torch.float32).contiguous()
                found.setdefault(key[0], {})[key[1]] = mine
    uploads = [
        Upload(kind.clients[0], unfolded(Factors(kind.scale, **found)), w)
        for kind, found, w in zip(kinds, columns, weights, strict=True)
        if w
    ]
    return uploads, loss, terms.error(clients, N)


def folded(sent: Factors) -> dict[Key, Tensor]:
    """Everything that is sent, the scale folded into R where there is one, else into B."""
    return {
        (column, name): x.double() * (sent.scale[name] if _folds(sent, column, name) else 1.0)
        for column, name, x in sent.items()
    }


def unfolded(sent: Factors) -> Factors:
    """The inverse of `folded`, in the tensors' own dtype."""

    def scaled(column: str) -> dict[str, Tensor]:
        return {
            name: x / sent.scale[name] if _folds(sent, column, name) else x
            for name, x in getattr(sent, column).items()
        }

    return replace(sent, B=scaled("B"), R=scaled("R"))


def _folds(sent: Factors, column: str, name: str) -> bool:
    return column == "R" or (column == "B" and name not in sent.R)


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


Integers = np.ndarray[Any, np.dtype[np.int64]]


def _within(x: Tensor, range: float) -> bool:
    return bool((x.abs() <= range).all())  # NaN is not, either


def _integers(x: Tensor, n: int, what: str, terms: Terms) -> Integers:
    if not _within(x, terms.range):
        raise UpdateError.public(
            f"{what} holds a value that is not finite or outside of +-secure.clipping-range = "
            f"{terms.range:g}: nothing was sent; raise secure.clipping-range, or lower train.lr"
        )
    return _rounded(x, n, terms.unit)


def _rounded(x: Tensor, n: int, unit: float) -> Integers:
    found: Integers = np.rint(x.double().numpy() * n * unit).astype(np.int64)
    return found
