"""A round of local training, begun again with half in memory where a device ran out of it.

    for attempt in attempts(work):
        with attempt as work, work.local_round() as local:
            local.outcome = local.train()

Once in a round. The second attempt begins from the download, with the same batches and the same
generators, so it gives the first one's update to rounding (but for dropout, whose masks are drawn
for what is in memory at once). The size is in the client's memory before it begins: whatever
happens then, later rounds and a resumed run have it.

Under example-level privacy there is no second attempt: whether the first one fits depends on which
examples it drew, and an update that is released only if they were few is not what was accounted.
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType

from fedlora.errors import DeviceMemoryError
from fedlora.federation.client.job import ClientJob, with_microbatch
from fedlora.training.devices import OutOfMemory, chosen, name_of, release, used


@dataclass
class Attempt:
    """One attempt: a context that ends quietly where the next is to follow."""

    work: ClientJob
    last: bool
    failed: bool = False

    def __enter__(self) -> ClientJob:
        return self.work

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> bool:
        if not isinstance(error, OutOfMemory):
            return False
        device = chosen(self.work.config.simulate.devices)
        spread = self.work.config.model.device_map != "none"
        if self.last:
            raise DeviceMemoryError(self._told(name_of(device))) from error
        self.failed = True
        traceback.clear_frames(where)  # else what they hold stays in memory
        for card in used(self.work.config.simulate.devices, spread):
            release(card)
        return True

    def _told(self, device: str) -> str:
        config, client = self.work.config, self.work.job.client
        if config.privacy.by_example:
            return (
                f"client {client}: {device} is out of memory; lower privacy.microbatch or "
                "data.max-length (a private round is not begun anew with less)"
            )
        return (
            f"client {client}: {device} is out of memory with {at_once(self.work)} examples at "
            "once; lower data.max-length, set train.gradient-checkpointing, or use a smaller base"
        )


def attempts(work: ClientJob) -> Iterator[Attempt]:
    """One, and where it runs out of memory another with half of the examples at once."""
    size = at_once(work)
    first = Attempt(work, last=work.config.privacy.by_example or size <= 1)
    yield first
    if not first.failed:
        return
    half = (size + 1) // 2
    work.memory.halve(half)
    yield Attempt(replace(work, config=with_microbatch(work.config, half)), last=True)


def at_once(work: ClientJob) -> int:
    """Examples of a batch that this client has in memory at once."""
    train = work.config.train
    return min(train.microbatch or train.batch_size, train.batch_size)
