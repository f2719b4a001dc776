"""Narrow wire dtypes: what rounding promises, what is refused, and that bytes are what is said."""

import contextlib
import struct
from pathlib import Path

import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import WireError
from fedlora.federation.server.proof import ROUNDING
from fedlora.federation.wire.messages import (
    count_bytes,
    pack,
    pack_factors,
    unpack,
    unpack_factors,
)
from fedlora.lora.adapter import Factors
from fedlora.lora.quantize import LEVELS, dequantize, quantize, size
from fedlora.strategies.base import seeded

NARROW = sorted(LEVELS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 4, 5), (2, 33)])
def test_rounding_is_within_one_step_and_to_nearest_within_half(dtype, shape) -> None:
    x = drawn(*shape)
    step = x.reshape(shape[0], -1).abs().amax(1) / LEVELS[dtype]
    for generator, most in ((seeded(0, 1, 2, "wire"), 1.0), (None, 0.5)):
        y = dequantize(quantize(x, dtype, generator), shape, dtype)
        worst = (y - x).reshape(shape[0], -1).abs().amax(1)
        assert (worst <= most * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_is_unbiased(dtype: str) -> None:
    x, generator = drawn(3, 11), seeded(0, 1, 2, "wire")
    n = 4000
    mean = sum(dequantize(quantize(x, dtype, generator), (3, 11), dtype) for _ in range(n)) / n
    step = x.abs().amax(1, keepdim=True) / LEVELS[dtype]
    assert ((mean - x).abs() <= 5 * 0.5 * step / n**0.5).all()  # five standard errors


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_to_nearest_is_biased(dtype: str) -> None:
    """The counterexample: the mean over rounds does not come closer."""
    x = torch.tensor([[1.0, 0.3 / LEVELS[dtype]]])
    assert dequantize(quantize(x, dtype), (1, 2), dtype)[0, 1] == 0.0


@pytest.mark.parametrize("dtype", NARROW)
def test_the_same_seed_round_and_client_give_the_same_bytes(dtype: str) -> None:
    x = drawn(4, 9)
    first, again, other = (quantize(x, dtype, seeded(0, 1, i, "wire")) for i in (2, 2, 3))
    assert first == again
    assert first != other


@pytest.mark.parametrize("dtype", NARROW)
def test_zeros_and_a_rows_largest_entry_come_back_as_they_were(dtype: str) -> None:
    x = torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(dequantize(quantize(x, dtype, seeded(0, 1, 2, "w")), (2, 3), dtype), x)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_number_that_is_none_comes_back_as_nan(dtype: str, bad: float) -> None:
    x = drawn(2, 3)
    x[0, 1] = bad
    y = dequantize(quantize(x, dtype), (2, 3), dtype)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(("dtype", "part"), [("int8", 4.0), ("int4", 7.5)])
def test_bytes_shrink_by_what_the_dtype_says(dtype: str, part: float) -> None:
    factors = Factors({"m": 1.0}, {"m": drawn(16, 384)}, {"m": drawn(384, 16)})
    full = sum(len(a.data) for a in pack_factors(factors, "float32").values())
    narrow = sum(len(a.data) for a in pack_factors(factors, dtype).values())
    assert narrow == size((16, 384), dtype) + size((384, 16), dtype)
    assert full / narrow > part * 0.6  # B's rows of 16 carry a scale each


@pytest.mark.parametrize("dtype", NARROW)
def test_vectors_and_numbers_travel_whole(dtype: str) -> None:
    for x in (drawn(5), torch.tensor(2.5)):
        assert torch.equal(unpack(pack(x, dtype), "x"), x)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_proofs_bound_covers_a_product_of_rounded_factors(dtype: str) -> None:
    for seed in range(20):
        f = Factors({"m": 1.0}, {"m": drawn(4, 40, seed=seed)}, {"m": drawn(24, 4, seed=seed + 99)})
        g = unpack_factors(pack_factors(f, dtype), f.scale)
        x, y = f.B["m"] @ f.A["m"], g.B["m"] @ g.A["m"]
        assert (x - y).norm() / x.norm() < ROUNDING[dtype]


@given(
    dtype=st.sampled_from([*NARROW, "float32", "bfloat16", "complex64", ""]),
    shape=st.lists(st.integers(-2, 2**62), max_size=4),
    data=st.binary(max_size=64),
)
def test_no_bytes_raise_anything_but_a_wire_error(dtype, shape, data) -> None:
    array = Array(dtype=dtype, shape=tuple(shape), stype=f"fedlora.{dtype}", data=data)
    with contextlib.suppress(WireError):
        unpack(array, "x")


@pytest.mark.parametrize("dtype", NARROW)
def test_a_shape_of_terabytes_is_refused_before_it_exists(dtype: str) -> None:
    data = struct.pack("<f", 1.0) + b"\1"
    array = Array(dtype=dtype, shape=(1, 2**40), stype=f"fedlora.{dtype}", data=data)
    with pytest.raises(WireError, match="bytes, must be"):
        unpack(array, "x")


# -- a federation ------------------------------------------------------------------------------


def ran(settings, dtype: str, **changes):
    from client_app.app import app
    from fedlora.config.reader import Config
    from fedlora.federation.server.loop import FederatedLora
    from fedlora.launch.simulate.grid import LocalGrid

    name = f"{dtype}-{len(changes)}"
    given = {"wire.dtype": dtype, "strategy.name": "fedavg", "clients.ranks": "3"}
    config = Config.read(settings(**{**given, "run.name": name, **changes}))
    with LocalGrid(app, config.clients.count, config.flat(), 1) as grid:
        server = FederatedLora(config)
        server.start(grid)
    return server


@pytest.mark.parametrize("dtype", NARROW)
def test_a_run_ends_near_the_float32_run_in_a_fraction_of_the_bytes(settings, dtype: str) -> None:
    whole, narrow = ran(settings, "float32"), ran(settings, dtype)
    a, b = (s.setting.strategy.effective(s.run.state).factors for s in (whole, narrow))
    for m in a.A:
        x, y = a.B[m] @ a.A[m], b.B[m] @ b.A[m]
        assert (x - y).norm() < (0.3 if dtype == "int8" else 1.5) * x.norm()
    up = [sum(m.bytes_up for m in s.run.members.values()) for s in (whole, narrow)]
    assert up[1] < 0.75 * up[0]  # names and settings weigh in so small a model


def test_error_feedback_is_kept_by_the_client_and_moves_the_result(settings) -> None:
    with_it = ran(settings, "int8")
    without = ran(settings, "int8", **{"wire.error-feedback": False})
    kept = list(
        Path(with_it.setting.journal.directory).glob("clients/*/client-*/lost-*.safetensors")
    )
    assert kept
    assert not list(
        Path(without.setting.journal.directory).glob("clients/*/client-*/lost-*.safetensors")
    )
    a, b = (s.setting.strategy.effective(s.run.state).factors for s in (with_it, without))
    assert any(not torch.equal(a.A[m], b.A[m]) for m in a.A)


def test_a_moving_base_travels_in_full_precision() -> None:
    from fedlora.federation.wire.messages import pack_download, unpack_download
    from fedlora.strategies.base import Download, Version

    delta = {"m": drawn(6, 5)}
    sent = Download(Factors(), frozenset(), base=(Version(1, delta),))
    for dtype in (*NARROW, "bfloat16"):
        came = unpack_download(pack_download(sent, dtype))
        assert torch.equal(came.base[0].delta["m"], delta["m"])


@pytest.mark.parametrize("dtype", NARROW)
def test_the_bytes_counted_are_those_protobuf_writes(dtype: str) -> None:
    from flwr.app import RecordDict
    from flwr.common.serde import recorddict_to_proto

    factors = Factors({"m": 1.0}, {"m": drawn(16, 84)}, {"m": drawn(84, 16)})
    content = RecordDict({"sent": pack_factors(factors, dtype)})
    assert abs(count_bytes(content) - recorddict_to_proto(content).ByteSize()) < 12
