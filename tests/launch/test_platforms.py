"""What a platform lacks: worked around, or refused in a line at the start."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from tests.support.tiny_federation import ROOT, quick

Settings = Callable[..., dict[str, object]]

WINDOWS = """
import os, shutil, socket, socketserver, sys
shutil._use_fd_functions = False
for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp"):
    vars(os).pop(name, None)
for module in ("fcntl", "pwd", "grp"):
    sys.modules[module] = None
vars(socket).pop("SO_PEERCRED", None)  # psutil's part for Linux needs AF_UNIX
for name in [n for n in vars(socketserver) if "Unix" in n]:
    del vars(socketserver)[name]
opened = os.open
def no_directories(path, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *rest, **options)
os.open = no_directories
"""
"""What Python has not on Windows, taken away before anything else is imported."""


def fedlora(
    directory: Path, *args: str, before: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with `before` run first."""
    code = f"{before}\nimport sys\nfrom fedlora.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=directory, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


@pytest.fixture
def mine(settings: Settings, tmp_path: Path) -> Path:
    """A config in a directory of its own."""
    keys = {k: v for k, v in settings(**quick("fedsa")).items() if k != "run.out"}
    given = {**keys, "run.rounds": 1, "clients.count": 2, "simulate.workers": 0}
    (tmp_path / "a b \u00e9").mkdir()
    path = tmp_path / "a b \u00e9" / "mine.toml"
    path.write_text(tomli_w.dumps(given))
    return path


@pytest.mark.slow
def test_without_fork_fcntl_and_unix_sockets_a_simulation_runs_in_one_process(mine: Path) -> None:
    done = fedlora(mine.parent, "simulate", mine.name, before=WINDOWS)
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path(mine.parent, "runs", "run", "summary.json").read_text())
    assert summary["rounds"] == 1
    done = fedlora(mine.parent, "simulate", mine.name, "--set", "run.name=more",
                   "--set", "simulate.workers=2", before=WINDOWS)  # fmt: skip
    assert done.returncode == 1
    assert "cannot fork worker processes; set it to 1" in done.stderr
    assert "Traceback" not in done.stderr
    done = fedlora(mine.parent, "deploy", "init", "there", "--clients", "2", before=WINDOWS)
    assert done.returncode == 1
    assert done.stderr.startswith("DeployError: fedlora deploy needs Unix sockets")
    done = fedlora(mine.parent, "node", "keeper", mine.name, "--user", "0", before=WINDOWS)
    assert done.stderr.startswith("DeployError: a keeper needs Unix sockets")
    assert not Path(mine.parent, "there").exists()


@pytest.mark.slow
def test_under_the_c_locale_from_a_path_with_spaces_and_accents_it_runs(mine: Path) -> None:
    """Without UTF-8 mode, whose absence Python would otherwise make up for."""
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = fedlora(mine.parent, "simulate", str(mine), **plain)
    assert done.returncode == 0, done.stderr
    report = Path(mine.parent, "runs", "run", "report.html").read_text(encoding="utf-8")
    assert "<html" in report


@pytest.mark.slow
def test_with_a_home_that_cannot_be_written_it_runs(mine: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    done = fedlora(mine.parent, "simulate", str(mine), HOME=str(home), HF_HOME=str(home / "hf"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_runs_of_one_name_at_once_end_in_one_run_and_one_line(mine: Path) -> None:
    code = "import sys\nfrom fedlora.cli import main\nsys.exit(main())"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, "simulate", mine.name], cwd=mine.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [p.communicate(timeout=300)[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 1], said
    (refused,) = [text for p, text in zip(both, said, strict=True) if p.returncode]
    assert "Traceback" not in refused
    assert "run" in refused
    lines = Path(mine.parent, "runs", "run", "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1]
