"""How many processes a simulation has, by what the platform can do."""

import os
import sys

import pytest

from fedlora.config.processes import workers
from fedlora.errors import ConfigError


@pytest.mark.parametrize(
    ("fork", "platform", "several"),
    [(True, "linux", 5), (False, "win32", 1), (False, "linux", 1), (True, "darwin", 1)],
)
def test_the_default_is_a_process_a_core_on_linux_and_one_where_there_is_no_fork(
    monkeypatch: pytest.MonkeyPatch, fork: bool, platform: str, several: int
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    if not fork:
        monkeypatch.delattr(os, "fork")
    assert workers(0) == several
    assert workers(1) == 1
    if fork:
        assert workers(3) == 3
    else:
        with pytest.raises(ConfigError, match=r"simulate\.workers = 3: .* set it to 1"):
            workers(3)
