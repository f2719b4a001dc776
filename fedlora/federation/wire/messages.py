"""Factors to Flower records and back, with every size checked before anything is allocated.

A tensor travels as `Array(dtype, shape, stype="fedlora.<dtype>", data)` whose data are its raw
little-endian bytes, or for "int8" and "int4" those of `quantize`. No built-in strategy of Flower
can read that type, so none can average adapters by mistake. Nothing here is pickled.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from torch import Tensor

from fedlora.errors import UpdateError, WireError
from fedlora.lora.adapter import COLUMNS, Adapter, Delta, Factors, Pair, Stack, Tensors
from fedlora.lora.quantize import LEVELS, dequantize, quantize, size
from fedlora.strategies.base import Download, Penalty, Version

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ROUNDING = {"float32": 2e-5, "bfloat16": 2e-2, "float64": 1e-11, "int8": 6e-2, "int4": 0.8}
"""Relative error that sending in this dtype may add to an aggregate: see `proof`."""

Kind = TypeVar("Kind", ArrayRecord, ConfigRecord, MetricRecord)

Shapes = Mapping[tuple[str, str], tuple[int, ...]]
"""(column, name) of a `Factors` to the shape it must have."""


def pack(x: Tensor, dtype: str, generator: torch.Generator | None = None) -> Array:
    """One tensor as an Array of exactly numel * itemsize bytes.

    Quantised ones carry a scale a row; vectors and numbers, which are few, travel as float32.
    """
    if dtype in LEVELS and x.ndim > 1:
        data = quantize(x, dtype, generator)
        return Array(dtype=dtype, shape=tuple(x.shape), stype=f"fedlora.{dtype}", data=data)
    return _joined([x], tuple(x.shape), "float32" if dtype in LEVELS else dtype)


def _joined(xs: Sequence[Tensor], shape: tuple[int, ...], dtype: str) -> Array:
    """The tensors' numbers one after the other, as they lie, as one Array of this shape."""
    flat = (x.detach().to(DTYPES[dtype]).contiguous().reshape(-1) for x in xs)
    data = b"".join(x.view(torch.uint8).numpy().data for x in flat)
    return Array(dtype=dtype, shape=shape, stype=f"fedlora.{dtype}", data=data)


def unpack(array: Array, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor of an Array, float32 at least.

    Raises:
        WireError: the type, the shape or the number of bytes is not what it must be. Checked
            before anything of the declared size exists.
    """
    if (
        array.stype not in {f"fedlora.{d}" for d in (*DTYPES, *LEVELS)}
        or array.stype != f"fedlora.{array.dtype}"
    ):
        raise WireError(f"{name}: type {array.stype!r} of {array.dtype!r} is none of ours")
    if shape is not None and tuple(array.shape) != shape:
        raise WireError(f"{name}: shape {tuple(array.shape)}, must be {shape}")
    if any(n < 0 for n in array.shape):
        raise WireError(f"{name}: shape {tuple(array.shape)} has a negative size")
    narrow = array.dtype in LEVELS
    dtype = torch.float32 if narrow else DTYPES[array.dtype]
    n = math.prod(array.shape)
    want = size(tuple(array.shape), array.dtype) if narrow and n else n * dtype.itemsize
    if len(array.data) != want:
        raise WireError(f"{name}: {len(array.data)} bytes, must be {want} for {array.shape}")
    if not want:
        return _empty(array.shape, name, dtype)
    if narrow:
        return dequantize(array.data, tuple(array.shape), array.dtype)
    x = torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(array.shape)
    return x.to(torch.promote_types(dtype, torch.float32))


def _empty(shape: Sequence[int], name: str, dtype: torch.dtype) -> Tensor:
    try:
        return torch.zeros(tuple(shape), dtype=torch.promote_types(dtype, torch.float32))
    except (RuntimeError, OverflowError, TypeError):
        raise WireError(f"{name}: {tuple(shape)} is no shape of a tensor") from None


def pack_factors(
    factors: Factors, dtype: str, generator: torch.Generator | None = None
) -> ArrayRecord:
    tensors = {f"{c}/{name}": pack(x, dtype, generator) for c, name, x in factors.items()}
    return ArrayRecord(tensors)


def unpack_factors(
    record: ArrayRecord, scale: Mapping[str, float], shapes: Shapes | None = None
) -> Factors:
    """The factors of a record; with `shapes`, exactly these keys in exactly these shapes."""
    columns: dict[str, dict[str, Tensor]] = {c: {} for c in COLUMNS}
    if shapes is not None:
        want = {f"{c}/{name}" for c, name in shapes}
        if set(record) != want:
            extra, missing = sorted(set(record) - want), sorted(want - set(record))
            raise WireError(
                "the tensors are not those this round asks for"
                + (f"; too many: {_some(extra)}" if extra else "")
                + (f"; missing: {_some(missing)}" if missing else "")
            )
    for key, array in record.items():
        column, _, name = key.partition("/")
        if column not in columns:
            raise WireError(f"{key}: no such kind of tensor")
        columns[column][name] = unpack(
            array, key, shapes[column, name] if shapes is not None else None
        )
    return Factors(scale, **columns)


def pack_pairs(pairs: Mapping[str, Delta], dtype: str) -> ArrayRecord:
    """Base changes: "A/..", "B/.." with the scale as a 0-d float64 tensor, dense ones as "D/..".

    Of a stack, A holds its terms' rows, B its terms one after the other, each as it lies, "s/.."
    their scales and "r/.." their ranks: the terms are copied once, into the message.
    """
    record: dict[str, Array] = {}
    for m, delta in pairs.items():
        if isinstance(delta, Tensor):
            record[f"D/{m}"] = pack(delta, dtype)
            continue
        if isinstance(delta, Stack):
            (d, k), (As, Bs) = delta.shape, delta.terms()
            ranks = [float(A.shape[0]) for A in As]
            record[f"A/{m}"] = _joined(As, (delta.rank, k), dtype)
            record[f"B/{m}"] = _joined(Bs, (delta.rank * d,), dtype)
            record[f"r/{m}"] = pack(torch.tensor(ranks, dtype=torch.float64), "float64")
        else:
            record[f"A/{m}"] = pack(delta.A, dtype)
            record[f"B/{m}"] = pack(delta.B, dtype)
        record[f"s/{m}"] = pack(torch.tensor(delta.scale, dtype=torch.float64), "float64")
    return ArrayRecord(record)


def unpack_pairs(record: ArrayRecord) -> dict[str, Delta]:
    """The inverse of `pack_pairs`. Raises WireError where a change is not whole."""
    x = {key: unpack(array, key) for key, array in record.items()}
    names = dict.fromkeys(key.partition("/")[2] for key in x)
    try:
        return {m: _change(x, m) for m in names}
    except (LookupError, UpdateError, RuntimeError, ValueError, ArithmeticError) as e:
        raise WireError(f"a base change does not decode: {e}") from None


def _change(x: Tensors, m: str) -> Delta:
    if f"D/{m}" in x:
        return x[f"D/{m}"]
    A, B, scale = x[f"A/{m}"], x[f"B/{m}"], x[f"s/{m}"]
    if f"r/{m}" not in x:
        return Pair(A, B, scale.item())
    ranks = [int(r) for r in x[f"r/{m}"].tolist()]
    d = B.numel() // A.shape[0]
    blocks = zip(B.split([d * r for r in ranks]), ranks, strict=True)
    terms = A.split(ranks), tuple(b.view(d, r) for b, r in blocks), tuple(scale.tolist())
    if len(terms[2]) != len(ranks):
        raise ValueError(f"{len(terms[2])} scales of {len(ranks)} terms")
    return Stack(*terms)


def pack_download(download: Download, dtype: str) -> RecordDict:
    """Everything of a download but what is the same for all clients (`Job` carries that).

    Base changes stay, so a rounding error in them would stay and add up: they travel in float32.
    """
    scale = download.send.scale
    settings: dict[str, Any] = {
        "scale-names": list(scale),
        "scale-values": [float(s) for s in scale.values()],
        "trainable": sorted(download.trainable),
        "base": [v.number for v in download.base],
        "snapshots": [v.number for v in download.base if v.snapshot],
        "block": download.block,
    }
    if download.penalty:
        settings |= {
            "penalty": download.penalty.kind,
            "penalty-weight": download.penalty.weight,
            "penalty-names": list(download.penalty.keep),
            "penalty-keep": list(download.penalty.keep.values()),
        }
    content = RecordDict(
        {"send": pack_factors(download.send, dtype), "download": ConfigRecord(settings)}
    )
    for v in download.base:
        content[f"base-{v.number}"] = _packed(v, _lasting(dtype))
    if download.fold:
        content["fold"] = pack_pairs(download.fold, "bfloat16" if dtype in LEVELS else dtype)
    return content


_PACKED: WeakKeyDictionary[Version, dict[str, ArrayRecord]] = WeakKeyDictionary()


def _packed(version: Version, dtype: str) -> ArrayRecord:
    """A version's record, of bytes that are made once for all the clients that lack it."""
    made = _PACKED.setdefault(version, {})
    if dtype not in made:
        made[dtype] = pack_pairs(version.delta, dtype)
    return ArrayRecord(dict(made[dtype]))  # a record of its own: a message's may be changed


def _lasting(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def unpack_download(content: RecordDict) -> Download:
    """The inverse of `pack_download`."""
    settings = configs_of(content, "download")
    scale = dict(zip(seq(settings, "scale-names"), seq(settings, "scale-values"), strict=True))
    snapshots = set(seq(settings, "snapshots"))
    fold: Adapter = {}
    if "fold" in content:
        pairs = unpack_pairs(arrays_of(content, "fold"))
        fold = {m: p for m, p in pairs.items() if isinstance(p, Pair)}
    penalty = None
    if "penalty" in settings:
        keep = zip(seq(settings, "penalty-names"), seq(settings, "penalty-keep"), strict=True)
        penalty = Penalty(settings["penalty"], float(settings["penalty-weight"]), dict(keep))  # type: ignore[arg-type]
    return Download(
        send=unpack_factors(arrays_of(content, "send"), scale),
        trainable=frozenset(seq(settings, "trainable")),
        base=tuple(
            Version(n, unpack_pairs(arrays_of(content, f"base-{n}")), n in snapshots)
            for n in seq(settings, "base")
        ),
        fold=fold,
        penalty=penalty,
        block=int(settings["block"]),  # type: ignore[arg-type]
    )


@dataclass(frozen=True, slots=True)
class Job:
    """What the server tells a client with every message, beside the download."""

    round: int
    token: str
    """Names the run: it keeps another run's memory and replies out."""
    incarnation: str
    """Names this start of the server: base changes held in memory are trusted within it only."""
    client: int
    ranks: Mapping[str, int]
    memory_round: int
    base_number: int
    fingerprint: str
    labels: tuple[str, ...]
    last_round: int = 0
    """The last round in which this client's reply was accepted."""
    cuts: tuple[int, ...] = ()
    """Where A alone is shared, all clients' ranks: see `certificate.names_of`."""
    code: str = ""
    """A digest of the user's own code, where the config names any: see `user_code.identity`."""
    config: str = ""
    """A digest of the server's config: see `Config.identity`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys that the server's config has otherwise than the run's."""
    microbatch: int = 0
    """What this client has halved train.microbatch to, in an earlier round; 0: it has not."""

    def record(self) -> ConfigRecord:
        return ConfigRecord(
            {
                "round": self.round,
                "token": self.token,
                "incarnation": self.incarnation,
                "client": self.client,
                "modules": list(self.ranks),
                "ranks": list(self.ranks.values()),
                "memory-round": self.memory_round,
                "base-number": self.base_number,
                "fingerprint": self.fingerprint,
                "labels": list(self.labels),
                "last-round": self.last_round,
                "cuts": list(self.cuts),
                "config": self.config,
                **({"code": self.code} if self.code else {}),
                **({"microbatch": self.microbatch} if self.microbatch else {}),
                **({"changes": json.dumps(dict(self.changes))} if self.changes else {}),
            }
        )

    @classmethod
    def read(cls, record: ConfigRecord) -> "Job":
        x: Mapping[str, Any] = record
        return cls(
            x["round"],
            x["token"],
            x["incarnation"],
            x["client"],
            dict(zip(x["modules"], x["ranks"], strict=True)),
            x["memory-round"],
            x["base-number"],
            x["fingerprint"],
            tuple(x["labels"]),
            x["last-round"],
            tuple(x["cuts"]),
            x.get("code", ""),
            x["config"],
            json.loads(x.get("changes", "{}")),
            x.get("microbatch", 0),
        )


def arrays_of(content: RecordDict, key: str) -> ArrayRecord:
    """The array record of a message by its key; likewise `configs_of` and `metrics_of`.

    Flower's own `content.array_records` makes a view that refers to itself and to the message, so
    a message of a payload would stay until Python next looks for garbage.

    Raises:
        KeyError: there is none, or it is of another kind.
    """
    return _of(content, key, ArrayRecord)


def configs_of(content: RecordDict, key: str) -> ConfigRecord:
    return _of(content, key, ConfigRecord)


def metrics_of(content: RecordDict, key: str) -> MetricRecord:
    return _of(content, key, MetricRecord)


def _of(content: RecordDict, key: str, kind: type[Kind]) -> Kind:
    found = content[key]
    if not isinstance(found, kind):
        raise KeyError(key)
    return found


def job_of(content: RecordDict) -> Job:
    """The job that a message brings.

    Raises:
        WireError: it brings none, or one that does not decode.
    """
    try:
        return Job.read(configs_of(content, "job"))
    except (KeyError, TypeError, ValueError) as e:
        raise WireError(f"the message has no job that can be read: {e!r}") from None


def count_bytes(content: RecordDict) -> int:
    """Serialised size of a message's content: the tensors' bytes, names and settings.

    Right to a few bytes a tensor; the tensors themselves are not copied to find it.
    """
    data, bare = 0, RecordDict()
    for key, r in content.items():
        if isinstance(r, ArrayRecord):
            data += sum(len(a.data) + 5 for a in r.values())  # 5: field numbers and lengths
            r = ArrayRecord({n: Array(a.dtype, a.shape, a.stype, b"") for n, a in r.items()})
        bare[key] = r
    return data + int(recorddict_to_proto(bare).ByteSize())


def seq(settings: ConfigRecord, key: str) -> Sequence[Any]:
    """A list of a record."""
    value = settings[key]
    assert isinstance(value, list)
    return value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
