"""Factors to Flower records and back, with every size checked before anything is allocated.

A tensor travels as `Array(dtype, shape, stype="fedlora.<dtype>", data)` whose data are its raw
little-endian bytes, or for "int8" and "int4" those of `quantize`. No built-in strategy of Flower
can read that type, so none can average adapters by mistake. Nothing here is pickled.
"""

import math
from collections.abc import Mapping, Sequence
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

LARGEST = 1e6
"""What a number that a client sends may be: trained factors are a millionth of it, and products of
numbers below it are finite in float32."""

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
    data = array.data if isinstance(array.data, bytearray) else bytearray(array.data)
    x = torch.frombuffer(data, dtype=dtype).reshape(array.shape)
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
    record: ArrayRecord,
    scale: Mapping[str, float],
    shapes: Shapes | None = None,
    dtype: str = "",
) -> Factors:
    """The factors of a record; with `shapes`, exactly these keys in exactly these shapes.

    With `dtype`, packed as `pack` does for it; and then no number is beyond LARGEST or not finite.
    """
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
        if dtype:
            _check_dtype(array, key, dtype)
        x = unpack(array, key, shapes[column, name] if shapes is not None else None)
        if dtype:
            _check_values(x, key)
        columns[column][name] = x
    return Factors(scale, **columns)


def pack_chosen(chosen: Mapping[str, Tensor]) -> ConfigRecord:
    """The ranks that a client chose, by module."""
    ranks = [j for mine in chosen.values() for j in mine.tolist()]
    counts = [len(mine) for mine in chosen.values()]
    return ConfigRecord({"modules": list(chosen), "counts": counts, "ranks": ranks})


def unpack_chosen(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """What `pack_chosen` packed, as it came: nothing in it was checked but its form.

    Raises:
        WireError: it has another form.
    """
    modules, counts, ranks = (record[key] for key in ("modules", "counts", "ranks"))
    if not all(isinstance(x, list) for x in (modules, counts, ranks)):
        raise WireError("the ranks that it chose: must be lists")
    whole = all(isinstance(n, int) and n >= 0 for n in counts) and len(counts) == len(modules)
    if not whole or sum(counts) != len(ranks) or len(set(modules)) != len(modules):
        raise WireError("the ranks that it chose: counts and ranks do not fit")
    parts = iter(ranks)
    return {m: [next(parts) for _ in range(n)] for m, n in zip(modules, counts, strict=True)}


def _check_dtype(array: Array, key: str, dtype: str) -> None:
    """Raises WireError where an array is not of the type in which `pack` sends it."""
    want = "float32" if dtype in LEVELS and len(array.shape) < 2 else dtype
    if array.dtype != want:
        raise WireError(f"{key}: type {array.dtype!r}, must be {want!r} (wire.dtype = {dtype!r})")


def _check_values(x: Tensor, key: str) -> None:
    """Raises WireError where a number is not finite, or larger than any that training makes."""
    if not bool(torch.isfinite(x).all()):
        raise WireError(f"{key} holds NaN or Inf")
    if x.numel() and float(x.abs().max()) > LARGEST:
        raise WireError(f"{key} holds {float(x.abs().max()):.3g}: must be within +-{LARGEST:g}")


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
    """The inverse of `pack_download`.

    Raises:
        WireError: it does not decode, or names a version of the base by no number.
    """
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
            for n in (whole({"base": n}, "base") for n in seq(settings, "base"))
        ),
        fold=fold,
        penalty=penalty,
        block=int(settings["block"]),  # type: ignore[arg-type]
    )


def whole(record: Mapping[str, Any], key: str, most: int = 2**31) -> int:
    """A number of a record, of which a file's name, or a size, is made."""
    if type(value := record[key]) is not int or not 0 <= value < most:
        raise WireError(f"{key}: must be a whole number from 0 to {most}")
    return value


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
    """A list of a record.

    Raises:
        WireError: it is none.
    """
    value = settings[key]
    if not isinstance(value, list):
        raise WireError(f"{key}: must be a list")
    return value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
