"""Sends an update in a narrow wire dtype, and adds its rounding error to the next one.

    x = trained + e        e: what the last accepted upload lost to rounding
    sent = Q(x)            stochastic, seeded from (seed, round, client)
    e' = x - sent          kept in the client's memory for the next round

Error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847. Differs from the
paper: Q is of the factors, not of a gradient, and is unbiased without it; e is then what lowers
the variance of the average over rounds. A strategy that turns the factors' coordinates between
rounds makes e a perturbation below one step of the quantiser; `wire.error-feedback = false` leaves
it out. Left out, too, where the base moves, and under client-level privacy, whose clip it would
undo.
"""

from typing import Any

from flwr.app import ArrayRecord

from fedlora.config.reader import Config
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.wire.job import Job
from fedlora.federation.wire.messages import pack_factors, unpack_factors
from fedlora.lora.adapter import COLUMNS, Factors
from fedlora.lora.quantize import LEVELS
from fedlora.strategies.base import Round, Strategy


def send(
    sent: Factors, strategy: Strategy[Any], memory: ClientMemory, config: Config, job: Job
) -> ArrayRecord:
    """The record of what this client sends this round; the memory keeps what rounding lost."""
    dtype = config.wire.dtype
    if dtype not in LEVELS:
        return pack_factors(sent, dtype)
    generator = Round(job.round, config.run.seed).generator(job.client, "wire")
    still = _still(strategy) and not config.privacy.by_client
    if not (config.wire.error_feedback and still):
        return pack_factors(sent, dtype, generator)
    whole = _sum(sent, memory.lost(job.last_round), 1.0)
    record = pack_factors(whole, dtype, generator)
    memory.lose(job.round, _sum(whole, unpack_factors(record, sent.scale), -1.0))
    return record


def carried(
    trained: Factors, strategy: Strategy[Any], memory: ClientMemory, config: Config, job: Job
) -> Factors | None:
    """The trained factors plus what `send` will add to them; None where it adds nothing."""
    still = _still(strategy) and not config.privacy.by_client
    if config.wire.dtype not in LEVELS or not (config.wire.error_feedback and still):
        return None
    return _sum(trained, memory.lost(job.last_round), 1.0)


def _still(strategy: Strategy[Any]) -> bool:
    """Does what a client sends in one round add up with what it sends in another?"""
    return not (strategy.needs().moving_base or strategy.needs().client_choice)


def _sum(x: Factors, y: Factors, sign: float) -> Factors:
    """x + sign * y, in x's tensors; where y has none of that shape, x."""
    there = {(column, name): t for column, name, t in y.items()}
    columns: dict[str, dict[str, object]] = {c: {} for c in COLUMNS}
    for column, name, t in x.items():
        other = there.get((column, name))
        fits = other is not None and other.shape == t.shape
        columns[column][name] = t + sign * other if fits else t  # type: ignore[operator]
    return Factors(x.scale, **columns)  # type: ignore[arg-type]
