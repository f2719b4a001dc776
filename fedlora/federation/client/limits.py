"""A policy's limits, enforced while a message is worked on.

    seconds    looked at before every pass through a module of torch, in training and scoring
    steps      counted before every step of an optimiser; one of several batches (train.gradient-
               accumulation-steps) as so many
    memory     looked at there as well

Torch calls the hooks, so no loop has to know of them. What a single pass or step takes is beyond
them: a hard limit is the system's, MemoryMax and the supervisor.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from fedlora.config.policy import LimitsPolicy
from fedlora.errors import PolicyError


@dataclass
class Watch:
    """One message's use of what is limited."""

    limits: LimitsPolicy
    begun: float
    steps: int = 0
    each: int = 1
    """What a step counts as."""

    def check_time(self) -> None:
        """Look at the clock.

        Raises:
            PolicyError: the seconds are over.
        """
        took = time.monotonic() - self.begun
        if took > self.limits.seconds:
            raise _exceeded("seconds", f"{took:.1f}", f"{self.limits.seconds:g}")

    def step(self) -> None:
        """Count a step, and look at the memory.

        Raises:
            PolicyError: the step would be one too many, or the process is too large.
        """
        self.steps += self.each
        if self.steps > self.limits.steps:
            raise _exceeded("steps", "one more", f"{self.limits.steps}")
        if self.limits.memory_mb:
            used = psutil.Process().memory_info().rss / 1e6
            if used > self.limits.memory_mb:
                raise _exceeded("memory-mb", f"{used:.0f}", f"{self.limits.memory_mb:g}")


_watches: list[Watch] = []


@contextmanager
def watched(limits: LimitsPolicy) -> Iterator[Watch]:
    """A context in which the limits hold, of this process's one message."""
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    watch = Watch(limits, time.monotonic())

    def before_pass(*_: Any) -> None:
        watch.check_time()

    def before_step(*_: Any) -> None:
        watch.check_time()
        watch.step()

    hooks = [
        register_module_forward_pre_hook(before_pass),
        register_optimizer_step_pre_hook(before_step),
    ]
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.pop()
        for hook in hooks:
            hook.remove()


def counted_anew(each: int = 1) -> None:
    """Steps count from here, each as so many: what came before tried the model, and is put back."""
    for watch in _watches:
        watch.steps, watch.each = 0, each


def check_upload(limits: LimitsPolicy, size: int) -> None:
    """Hold a reply's size against the limit.

    Raises:
        PolicyError: a reply of so many bytes is too large to leave.
    """
    if size > limits.upload_mb * 1e6:
        raise _exceeded("upload-mb", f"{size / 1e6:.3f}", f"{limits.upload_mb:g}")


def _exceeded(key: str, used: str, limit: str) -> PolicyError:
    return PolicyError(
        f"this node's policy does not allow it: limits.{key} is reached, and nothing is sent",
        [f"limits.{key}: {used}, the limit is {limit}"],
    )
