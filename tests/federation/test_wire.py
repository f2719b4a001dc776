"""Adapters on the wire: the same bits on the other side, and nothing but WireError for the rest."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import (
    recorddict_from_proto,
    recorddict_to_proto,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.errors import WireError
from fedlora.federation.wire.job import Job
from fedlora.federation.wire.messages import (
    DTYPES,
    count_bytes,
    pack,
    pack_download,
    pack_factors,
    pack_pairs,
    unpack,
    unpack_download,
    unpack_factors,
    unpack_pairs,
)
from fedlora.federation.wire.sent_digest import digest_of
from fedlora.lora.adapter import Factors, Pair, Stack, dense
from fedlora.lora.lowrank import weighted
from fedlora.strategies.base import Download, Penalty, Version

SPECIAL = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38, 1 / 3]


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def some_factors(d: int = 7, k: int = 5, r: int = 3) -> Factors:
    return Factors(
        {"m": 2.5, "n.o": 1 / 3},
        {"m": drawn(r, k), "n.o": drawn(r + 1, k, seed=1)},
        {"m": drawn(d, r, seed=2)},
        {"n.o": drawn(r, r, seed=3)},
        {"head.weight": drawn(2, d, seed=4), "scalar": drawn(), "none": drawn(0, 3)},
    )


def over_the_wire(content: RecordDict) -> RecordDict:
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(dtype: str) -> None:
    x = torch.tensor(SPECIAL, dtype=DTYPES[dtype]).reshape(3, 3)
    y = unpack(pack(x, dtype), "x")
    assert y.dtype == torch.promote_types(DTYPES[dtype], torch.float32)
    back, number = y.to(x.dtype), ~x.isnan()
    assert torch.equal(back[number].view(torch.uint8), x[number].view(torch.uint8))
    assert torch.equal(back.isnan(), x.isnan())


def test_a_view_is_sent_as_what_it_shows() -> None:
    x = drawn(4, 6).T[1:, ::2]
    assert not x.is_contiguous()
    assert torch.equal(unpack(pack(x, "float32"), "x"), x)


def test_bfloat16_rounds_float32_to_nearest() -> None:
    x = drawn(50)
    assert torch.equal(unpack(pack(x, "bfloat16"), "x"), x.to(torch.bfloat16).float())
    assert not torch.equal(unpack(pack(x, "bfloat16"), "x"), x)


def test_factors_come_back_as_they_were() -> None:
    sent = some_factors()
    record = over_the_wire(RecordDict({"sent": pack_factors(sent, "float32")}))
    came = unpack_factors(record.array_records["sent"], sent.scale)
    assert came.scale == sent.scale
    assert [k[:2] for k in came.items()] == [k[:2] for k in sent.items()]
    for (_, _, x), (_, _, y) in zip(sent.items(), came.items(), strict=True):
        assert torch.equal(x, y)


def test_what_arrives_shares_no_memory_with_the_message() -> None:
    sent = some_factors()
    record = pack_factors(sent, "float32")
    came = unpack_factors(record, sent.scale)
    came.A["m"].zero_()
    assert torch.equal(unpack_factors(record, sent.scale).A["m"], sent.A["m"])


def test_a_download_comes_back_whole() -> None:
    full = drawn(7, 5, seed=8)
    pair = Pair(drawn(2, 5, seed=5), drawn(7, 2, seed=6), 1 / 3)
    download = Download(
        some_factors(),
        frozenset({"A", "other"}),
        base=(Version(3, {"m": full}, snapshot=True), Version(4, {"m": pair, "n.o": full})),
        fold={"m": Pair(drawn(1, 5), drawn(7, 1), 0.7)},
        penalty=Penalty("tail", 0.25, {"m": 2}),
        block=4,
    )
    came = unpack_download(over_the_wire(pack_download(download, "float32")))
    assert came.send.scale == download.send.scale
    assert came.trainable == download.trainable
    assert came.penalty == download.penalty
    assert came.block == 4
    assert [(v.number, v.snapshot) for v in came.base] == [(3, True), (4, False)]
    assert torch.equal(came.base[0].delta["m"], full)  # type: ignore[arg-type]
    back = came.base[1].delta["m"]
    assert isinstance(back, Pair)
    assert back.scale == pair.scale  # not rounded to float32
    assert torch.equal(back.A, pair.A)
    assert torch.equal(back.B, pair.B)
    assert torch.equal(came.fold["m"].B, download.fold["m"].B)


def test_a_base_change_is_packed_once_for_all_clients_and_no_record_is_shared() -> None:
    download = Download(Factors(), frozenset(), base=(Version(1, {"m": drawn(7, 5)}),))
    first, second = (pack_download(download, "float32")["base-1"] for _ in range(2))
    assert first is not second
    assert first["D/m"].data is second["D/m"].data
    wide = pack_download(download, "float64")["base-1"]
    assert wide["D/m"].dtype == "float64"


def test_a_stack_travels_as_its_terms() -> None:
    stack = weighted([Pair(drawn(r, 5, seed=r), drawn(7, r), r / 3) for r in (1, 2)], [0.1, 0.7])
    download = Download(Factors(), frozenset(), base=(Version(1, {"m": stack}),))
    came = unpack_download(over_the_wire(pack_download(download, "float32")))
    back = came.base[0].delta["m"]
    assert isinstance(back, Stack)
    assert back.scale == stack.scale  # not rounded to float32
    assert torch.equal(dense(back), dense(stack))  # bit for bit what the server holds


@pytest.mark.parametrize("ranks", [(1, 1), (1, 2, 0), (3, -1, 1), (float("nan"), 3), (4,), ()])
def test_a_stack_whose_ranks_are_not_its_terms_is_refused(ranks: tuple[float, ...]) -> None:
    stack = weighted([Pair(drawn(r, 5), drawn(7, r)) for r in (1, 2)], [0.5, 0.5])
    record = pack_pairs({"m": stack}, "float32")
    record["r/m"] = pack(torch.tensor(ranks, dtype=torch.float64), "float64")
    with pytest.raises(WireError, match="a base change does not decode"):
        unpack_pairs(record)


def test_the_plainest_download_comes_back() -> None:
    came = unpack_download(
        over_the_wire(pack_download(Download(Factors(), frozenset()), "float32"))
    )
    assert (came.base, came.fold, came.penalty, came.block) == ((), {}, None, 0)


def test_a_job_comes_back() -> None:
    job = Job(3, "t", "i", 4, {"m": 2, "n": 3}, 1, 2, "f", ("a", "b"))
    content = over_the_wire(RecordDict({"job": job.record()}))
    assert Job.read(content.config_records["job"]) == job


def forged(shape: tuple[int, ...], data: bytes = b"\0" * 12, dtype: str = "float32") -> Array:
    return Array(dtype=dtype, shape=shape, stype=f"fedlora.{dtype}", data=data)


@pytest.mark.parametrize(
    "shape",
    [
        (2**40,),
        (2**31, 2**31),
        (2**62, 0),
        (2**70, 0),
        (2**63,),
        (4,),
        (2,),
        (-3,),
        (-1, -3),
        (3, -1, -1),
    ],
)
def test_a_shape_that_its_bytes_do_not_fill_is_refused_and_never_allocated(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(WireError, match=r"^A/m: "):
        unpack(forged(shape), "A/m")


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=b"\0" * 12),
        Array(dtype="float64", shape=(3,), stype="fedlora.float32", data=b"\0" * 24),
        Array(dtype="float16", shape=(3,), stype="fedlora.float16", data=b"\0" * 6),
        Array(dtype="", shape=(3,), stype="", data=b"\0" * 12),
    ],
    ids=lambda a: f"{a.stype}/{a.dtype}",
)
def test_a_foreign_type_is_refused(array: Array) -> None:
    with pytest.raises(WireError, match="none of ours"):
        unpack(array, "A/m")


def test_flower_itself_cannot_read_and_so_cannot_average_ours() -> None:
    with pytest.raises(TypeError):
        pack(drawn(3), "float32").numpy()


def test_extra_missing_and_misshapen_tensors_are_refused_by_name() -> None:
    sent = some_factors()
    shapes = {(c, n): tuple(x.shape) for c, n, x in sent.items()}
    record = pack_factors(sent, "float32")
    assert unpack_factors(record, sent.scale, shapes)
    less = ArrayRecord({k: v for k, v in record.items() if k != "B/m"})
    with pytest.raises(WireError, match="missing: B/m"):
        unpack_factors(less, sent.scale, shapes)
    more = ArrayRecord({**record, "B/n.o": record["B/m"]})
    with pytest.raises(WireError, match=r"too many: B/n\.o"):
        unpack_factors(more, sent.scale, shapes)
    turned = ArrayRecord({**record, "A/m": pack(sent.A["m"].T, "float32")})
    with pytest.raises(WireError, match=r"A/m: shape \(5, 3\), must be \(3, 5\)"):
        unpack_factors(turned, sent.scale, shapes)
    with pytest.raises(WireError, match="no such kind"):
        unpack_factors(ArrayRecord({"Q/m": record["A/m"]}), {})


@pytest.mark.parametrize("shape", [(2**70, 0), (0, 2**31, 2**31, 2**31)])
def test_an_empty_tensor_of_absurd_sizes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match=r"^A/m: "):
        unpack(forged(shape, b""), "A/m")


arrays = st.builds(
    Array,
    dtype=st.sampled_from([*DTYPES, "int8", "object"]),
    shape=st.lists(st.integers(-(2**65), 2**65) | st.integers(-2, 4), max_size=4).map(tuple),
    stype=st.sampled_from(["fedlora.float32", "fedlora.bfloat16", "fedlora.float64", "numpy"]),
    data=st.binary(max_size=64),
)
keys = st.sampled_from(["A/m", "B/m", "D/m", "s/m", "r/m", "R/m", "other/x", "A", "", "Z/m"])


@given(array=arrays)
@settings(max_examples=300, deadline=None)
def test_no_array_raises_anything_but_a_wire_error(array: Array) -> None:
    try:
        x = unpack(array, "x")
    except WireError:
        return
    assert tuple(x.shape) == tuple(array.shape)
    assert x.numel() * DTYPES[array.dtype].itemsize == len(array.data)


@given(record=st.dictionaries(keys, arrays, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_record_raises_anything_but_a_wire_error(record: dict[str, Array]) -> None:
    for read in (
        lambda r: unpack_factors(r, {}),
        lambda r: unpack_factors(r, {}, {("A", "m"): (2, 2)}),
        unpack_pairs,
    ):
        try:
            read(ArrayRecord(record))  # type: ignore[no-untyped-call]
        except WireError:
            continue


@given(
    values=st.lists(st.floats(width=32), max_size=12), dtype=st.sampled_from(["float32", "float64"])
)
@settings(max_examples=100, deadline=None)
def test_any_float32_survives_the_round_trip(values: list[float], dtype: str) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    y = unpack(pack(x, dtype), "x").float()
    assert torch.equal(y.view(torch.int32)[~x.isnan()], x.view(torch.int32)[~x.isnan()])
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [2, 16])
def test_the_bytes_counted_are_those_protobuf_writes(dtype: str, rank: int) -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(6)]
    sent = Factors(
        dict.fromkeys(names, 1.0),
        {m: drawn(rank, 96) for m in names},
        {m: drawn(64, rank) for m in names},
    )
    content = pack_download(Download(sent, frozenset("AB")), dtype)
    content["job"] = Job(1, "t" * 32, "i", 0, dict.fromkeys(names, rank), 0, 0, "f", ()).record()
    real = recorddict_to_proto(content).ByteSize()
    assert abs(count_bytes(content) - real) < 0.01 * real


def sent(**changes: Any) -> RecordDict:
    """A download with a base change, a penalty and something to fold."""
    pair = Pair(drawn(3, 5), drawn(7, 3), 2.0)
    given: dict[str, Any] = {
        "send": some_factors(), "trainable": frozenset({"A", "B"}),
        "base": (Version(3, {"m": pair}),),
        "fold": {"x": pair}, "penalty": Penalty("tail", 0.5, {"m": 2}),
    }  # fmt: skip
    return pack_download(Download(**{**given, **changes}), "float32")


JOB = Job(1, "t" * 32, "i", 0, {"m": 3}, 0, 2, "f", ("a", "b"))


def with_job(content: RecordDict, job: Job = JOB) -> RecordDict:
    content["job"] = job.record()
    return content


def test_a_download_has_one_digest_on_both_sides_of_the_wire() -> None:
    """The stage of the message is no part of it, nor whose it is; every number and setting is."""
    whole = digest_of(with_job(sent()))
    assert digest_of(over_the_wire(with_job(sent()))) == whole
    beside = with_job(sent(), replace(JOB, client=4, memory_round=1, last_round=1, microbatch=8))
    beside["secagg"] = ConfigRecord({"clients": [1]})
    assert digest_of(beside) == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"send": replace(some_factors(), A={**some_factors().A, "m": drawn(3, 5, seed=9)})},
        {"send": replace(some_factors(), scale={"m": 2.5, "n.o": 0.5})},
        {"trainable": frozenset({"other"})},
        {"block": 2},
        {"fold": {"x": Pair(drawn(3, 5, seed=9), drawn(7, 3), 2.0)}},
        {"penalty": Penalty("tail", 0.25, {"m": 2})},
        {"base": (Version(3, {"m": Pair(drawn(3, 5), drawn(7, 3), 1.0)}),)},
    ],
)
def test_other_numbers_of_one_form_are_another_digest_of_that_form(changes: dict[str, Any]) -> None:
    one, other = digest_of(sent()), digest_of(sent(**changes))
    assert one[0] == other[0]
    assert one[1] != other[1]


@pytest.mark.parametrize(
    "change",
    [{"labels": ("b", "a")}, {"base_number": 1}, {"fingerprint": "g"}, {"ranks": {"m": 2}},
     {"cuts": (3,)}, {"code": "x"}],
)  # fmt: skip
def test_what_the_job_says_of_the_model_is_part_of_it(change: dict[str, Any]) -> None:
    whole, other = digest_of(with_job(sent())), digest_of(with_job(sent(), replace(JOB, **change)))
    assert whole[1] != other[1]


def test_a_download_of_other_tensors_has_another_form() -> None:
    one = digest_of(sent())
    pair = Pair(drawn(3, 5), drawn(7, 3), 2.0)
    fewer = digest_of(sent(send=replace(some_factors(), A={})))
    later = digest_of(sent(base=(Version(4, {"m": pair}),)))
    assert len({one[0], fewer[0], later[0]}) == 3
