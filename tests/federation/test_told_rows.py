"""Of every task's rows, spoilt in every column, no word leaves a node in a reply."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.federation.client.dispatch import as_bytes
from fedlora.training import cache
from tests.federation.test_told import NODE, answer
from tests.support.task_rows import MADE, task_settings

Settings = Callable[..., dict[str, object]]
SECRET = "Zanzibar"
EVERYWHERE: tuple[Any, ...] = (
    SECRET, None, {SECRET: SECRET}, [SECRET], [{"role": SECRET, "content": SECRET}],
)  # fmt: skip
ONCE: tuple[Any, ...] = (
    *EVERYWHERE, [[SECRET]], [{"role": "user", "content": {SECRET: SECRET}}],
    [{"content": SECRET}], [{"role": "assistant", "content": SECRET}], f"/{SECRET}.png",
    f"data:image/png;base64,{SECRET}", SECRET * 3000, f"\ud800{SECRET}", ["I-x", SECRET, SECRET],
    10**400,
)  # fmt: skip
LINES = (
    f"{SECRET}\n".encode(), f'"{SECRET}"\n'.encode(), f'{{"{SECRET}": \n'.encode(),
    b"\xff" + f"{SECRET}\n".encode(), f'[{{"{SECRET}": 1}}]\n'.encode(),
    f'{{"{SECRET}": "{SECRET}"}}\n'.encode(),
)  # fmt: skip


def written(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def spoilt(honest: list[dict[str, Any]]) -> Iterator[bytes]:
    """Files in which a cell, a column, a row or a line is not as it must be."""
    for column in honest[0]:
        for value in ONCE:
            rows = copy.deepcopy(honest)
            rows[7][column] = value
            yield written(rows)
        for value in EVERYWHERE:
            yield written({**row, column: value} for row in honest)
        rows = copy.deepcopy(honest)
        rows[3][SECRET] = rows[3].pop(column)
        yield written(rows)
    for line in LINES:
        yield written(honest) + line
        yield line


@pytest.mark.slow
@pytest.mark.parametrize("how", ["max-epsilon", "secure"])
@pytest.mark.parametrize("case", MADE)
def test_no_reply_has_a_word_of_a_row_whatever_is_in_it(
    settings: Settings, tmp_path: Path, case: str, how: str
) -> None:
    on = {"max-epsilon": {"privacy.epsilon": 3.0, "privacy.clip-norm": 0.5},
          "secure": {"secure.aggregation": True, "secure.colluding": 0}}[how]  # fmt: skip
    short = {"strategy.name": "ffa", "clients.ranks": "3", "train.steps": 1}
    given = task_settings(settings, case, tmp_path, **short, **on)  # type: ignore[arg-type]
    path = tmp_path / f"{case}.jsonl"
    honest = [json.loads(line) for line in path.read_text().splitlines()]
    own = {**NODE, "data-path": str(path), "memory": str(tmp_path / "memory")}
    own |= {"max-epsilon": 5.0} if how == "max-epsilon" else {"secure-aggregation": True}
    errors = 0
    for n, text in enumerate(spoilt(honest)):
        path.write_bytes(text)
        cache.forget_data()
        kind = "evaluate" if n % 4 == 0 or how == "secure" else "train"
        reply = answer(given, own, kind)
        errors += reply.has_error()
        whole = reply.error.reason.encode() if reply.has_error() else as_bytes(reply)
        assert SECRET.encode() not in whole
        assert str(tmp_path).encode() not in whole
    assert errors > 20
