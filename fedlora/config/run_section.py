"""The keys of a run itself, and where in its schedules a round of an extended run is."""

import re
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from fedlora.config.fields import Names, Section

Extension = Literal["restart", "hold"]
"""What schedules do where a finished run is extended: begin anew, over the rounds that are added,
or stay as they were in the last round."""
EXTENSIONS: tuple[Extension, ...] = get_args(Extension)


class RunConfig(Section):
    name: str = "quickstart"
    """Directory of the run, below `out`."""
    out: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    """All chance derives from it, but privacy noise never does."""
    rounds: Annotated[int, Field(gt=0)] = 8
    resume: bool = False
    """Continue from the run's checkpoint."""
    extended: Names = ()
    """Written, not set: after which rounds `--rounds` extended the finished run, and what its
    schedules did there, "2:restart, 4:hold"."""
    defaults: Names = ()
    """Written, not set: the strategy, and the keys that its defaults gave. Such a key gives way
    to another strategy's default, as long as its value is still the one that stands here.
    "by-modules": how many modules the model has decides the rate, as the run begins."""

    @field_validator("extended")
    @classmethod
    def _in_order(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if strange := [x for x in value if not re.fullmatch(r"[1-9]\d{0,8}:(restart|hold)", x)]:
            raise ValueError(f'{strange[0]!r} is not as "2:restart" or "2:hold"')
        ends = [*(int(x.partition(":")[0]) for x in value), info.data.get("rounds", 10**9)]
        if any(a >= b for a, b in pairwise(ends)):
            raise ValueError("its rounds must rise, and stay below run.rounds")
        return value

    def _ends(self) -> list[int]:
        return [int(x.partition(":")[0]) for x in self.extended]

    @property
    def planned(self) -> int:
        """The rounds that the run was begun for, whatever extended it: noise is calibrated to
        them."""
        return next(iter(self._ends()), self.rounds)

    def place(self, round: int) -> tuple[int, int]:
        """A round's number in its schedule, from 1 on, and how many rounds that schedule has."""
        begun, of = 0, "restart"
        for end, extension in zip(self._ends(), self.extended, strict=True):
            if round <= end:
                return self._at(round, begun, end, of)
            begun, of = end, extension.partition(":")[2]
        return self._at(round, begun, self.rounds, of)

    def _at(self, round: int, begun: int, end: int, of: str) -> tuple[int, int]:
        return self.place(begun) if of == "hold" else (round - begun, end - begun)
