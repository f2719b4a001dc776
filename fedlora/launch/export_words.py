"""What `fedlora export` says of what it wrote."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.launch.export import Exported


def told(done: "Sequence[Exported]") -> Iterator[str]:
    """A line or more for each export, then how they are served."""
    for one in done:
        yield f"wrote {one.directory}; {one.measured()}"
        if one.rounding > 1e-3:
            yield f"rounding to the weights' dtype changed the update by {one.rounding:.2%}"
        if one.truncation:
            yield f"truncating to rank {one.rank} changed the update by {one.truncation:.2%}"
    lines = done[0].serve if done else ()
    if lines:
        yield "serve it with:"
        yield from (f"  {line}" for line in lines)
