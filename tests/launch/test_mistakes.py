"""A user's mistake is one line that names the key or the file, and never a traceback."""

import datetime
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from typer.main import get_command

from fedlora import preflight
from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, FedLoraError
from fedlora.launch.doctor import examine
from fedlora.launch.experiment_file import load
from tests.support.tiny_federation import ROOT, federate, quick

Settings = Callable[..., dict[str, object]]

TEXTS: list[object] = [
    "", " ", "[/red]", "[bold]x", "\u00e9 \u6f22", "a b", "a\nb", "\x1b[31m", "\ud800", "\udcff",
    "\0", "x" * 5000, "~", "-1", "$(x)", "py:", "py:a:b", "pkg:a", "hf:", "[", "[1]", "{}", "{",
    "(", "*", "(=3", "a=b", "a=1", "a:1:1", "a:nan:1",
]  # fmt: skip
NUMBERS: list[object] = [
    -1, 0, 1, 2, 10**6, 2**63 - 1, -(2**63), 10**400, 1e-320, 1e308, -0.5, 0.5, True,
    math.nan, math.inf,
]  # fmt: skip
OTHERS: list[object] = [
    [], ["a"], [[1]], [1, 2], {}, {"a": 1}, [{"a": 1}], None, datetime.date(2020, 1, 1),
]  # fmt: skip
KEYS = sorted(Config().flat())
NO_NOTES = b"a checkpoint that is whole, and no run's"


def run(*words: str) -> Result:
    return CliRunner().invoke(get_command(app), [*words])


def told(result: Result) -> str:
    """What a user would read; a failure is the error that the command's guard makes a line of."""
    if isinstance(result.exception, FedLoraError):
        return str(result.exception)
    if isinstance(result.exception, OSError) and result.exception.filename is not None:
        return str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.mark.parametrize("part", range(4))
def test_no_value_of_any_key_is_more_than_a_line_that_names_it(
    settings: Settings, part: int
) -> None:
    given = settings(**quick("fedex"))
    for key in KEYS[part::4]:
        for n, value in enumerate([*TEXTS, *NUMBERS, *OTHERS]):
            if n % 4 != part:  # each value meets every fourth key; the slow table has them all
                continue
            accepted_or_named(given, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_value_of_every_key_is_taken_or_named(settings: Settings, key: str) -> None:
    given = settings(**quick("fedex"))
    for value in [*TEXTS, *NUMBERS, *OTHERS]:
        accepted_or_named(given, key, value)


def accepted_or_named(given: dict[str, object], key: str, value: object) -> None:
    said = ""
    try:
        config = preflight.read({**given, key: value})
    except FedLoraError as e:
        said = str(e)
    else:
        config.toml().encode()
        assert Config.read(config.flat()).flat() == config.flat(), (key, value)
    named = not said or key in said or f"{key.split('.')[0]}:" in said
    assert named, (key, value, said)
    said.encode()


@pytest.mark.slow
@pytest.mark.parametrize("key", [k for k in KEYS if not k.startswith("strategy.")])
def test_the_doctor_has_words_for_every_value(
    settings: Settings, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.toml"
    path.write_text(Config.read(settings(**quick("fedex"))).toml(), "utf-8")
    kind = TEXTS if isinstance(Config().flat()[key], str) else NUMBERS
    for value in kind:
        assert examine(path, {key: value}) in (0, 1)
        assert "Traceback" not in capsys.readouterr().out


FILES: dict[str, bytes] = {
    "syntax.toml": b"a = [\n",
    "twice.toml": b'[run]\nname = "a"\nname = "b"\n',
    "utf16.toml": '[run]\nname = "a"\n'.encode("utf-16"),
    "binary.toml": b"\xff\xfe\x00a",
    "scalar.toml": b"run = 3\n",
    "list.toml": b"run = [1]\n",
    "nested.toml": b"a=" + b"[" * 3000,
    "deep.toml": b"a." * 2000 + b"b=1",
}


@pytest.mark.parametrize("command", ["config", "compare"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_experiment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if (name, command) == ("deep.toml", "compare"):
        pytest.skip("read once for each cell")
    (tmp_path / name).write_bytes(FILES[name])
    said = told(run(command, str(tmp_path / name)))
    known = {"scalar.toml": "run", "list.toml": "run"}
    assert known.get(name, name) in said
    assert "problem in the run config" in said


def test_a_byte_order_mark_is_no_part_of_an_experiment(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(b'\xef\xbb\xbf[run]\nname = "\xc3\xa9"\n[model]\npath="m"\n[data]\npath="d"\n')
    assert load(path).run.name == "\u00e9"


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("sock.toml")
        for name in ("sock.toml", str(tmp_path), "none.toml", "[/red]", "x" * 5000, "a\nb"):
            for command in ("config", "doctor", "compare"):
                assert name[:20] in told(run(command, name)).replace("\\n", "\n")


COMPARE = {
    "x = 1": "compare.x",
    'seeds = "a"': "compare.seeds",
    'seeds = ["a"]': "compare.seeds.0",
    "strategies = 3": "compare.strategies",
    "variants = 3": "compare.variants",
    "variants = {a = 3}": "compare.variants.a",
    "variants = {a = {set = 3}}": "compare.variants.a.set",
    "set = 3": "compare.set",
    "set = {fedit = 3}": "compare.set.fedit",
    "full = 3": "compare.full",
    "search = 3": "compare.search",
    "search = {a = []}": "compare.search.a",
}


@pytest.mark.parametrize("line", COMPARE)
def test_a_comparison_names_the_key_of_another_type(tmp_path: Path, line: str) -> None:
    path = tmp_path / "given.toml"
    path.write_text(f"[compare]\n{line}\n")
    assert f"{path}: {COMPARE[line]}" in told(run("compare", str(path)))


OPTIONS: list[tuple[Sequence[str], str]] = [
    (["config", "quickstart", "--set", "a"], "--set a"),
    (["config", "quickstart", "--set", "[/red]=1"], "[/red]"),
    (["config", "quickstart", "--set", "=3"], "no such key"),
    (["config", "quickstart", "--set", "run=3"], "run"),
    (["config", "quickstart", "--set", "run.rounds=" + "9" * 5000], "run.rounds"),
    (["config", "quickstart", "--set", "run.name=\udcff"], "run.name"),
    (["simulate"], "--resume"),
    (["simulate", "quickstart", "--workers", "-1"], "simulate.workers"),
    (["simulate", "quickstart", "--engine", "x"], "engine"),
    (["nosuch"], "nosuch"),
    (["simulate", "--nosuch"], "--nosuch"),
    (["compare", "quickstart", "--strategies", "nosuch"], "nosuch"),
    (["compare", "quickstart", "--strategies", ""], "--strategies"),
    (["compare", "quickstart", "--seeds", "a,b"], "--seeds"),
    (["compare", "quickstart", "--seeds", ""], "--seeds"),
    (["compare", "quickstart", "--workers", "-1"], "--workers"),
]


@pytest.mark.parametrize(("words", "name"), OPTIONS)
def test_an_option_that_is_wrong_is_named(words: Sequence[str], name: str) -> None:
    result = run(*words)
    assert result.exit_code != 0
    assert name in told(result)


RUNS: dict[str, dict[str, bytes]] = {
    "empty": {},
    "no-rounds": {"rounds.jsonl": b""},
    "zero-config": {"config.toml": b""},
    "binary": {"config.toml": b"\xff", "rounds.jsonl": b"\xff\n{}\n"},
    "list": {"rounds.jsonl": b'[1]\n"a"\n'},
    "no-number": {"rounds.jsonl": b'{"round": "a"}\n{"round": 1}\n'},
    "other-summary": {"rounds.jsonl": b'{"round": 0}\n', "summary.json": b"3"},
    "binary-summary": {"rounds.jsonl": b'{"round": 0}\n', "summary.json": b"\xff"},
    "zero-summary": {"rounds.jsonl": b'{"round": 0}\n', "summary.json": b""},
}


@pytest.mark.parametrize("name", RUNS)
def test_half_a_run_is_named(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    for file, content in RUNS[name].items():
        (directory / file).write_bytes(content)
    out = str(tmp_path / "out")
    for words in (["simulate", "--resume"], ["report"], ["export", "--out", out]):
        result = run(*words, str(directory))
        assert result.exit_code == 0 or name in told(result) or "is not set" in told(result)
    assert not Path(out).exists()


DAMAGE: list[tuple[str, bytes]] = [
    ("begun_with.json", b""), ("begun_with.json", b"[]"), ("begun_with.json", b'{"rows": 3}'),
    ("begun_with.json", b"\xff"), ("rounds.jsonl", b"\xff\n"), ("rounds.jsonl", b"[1]\n"),
    ("rounds.jsonl", b'{"round": 0}\n\xff\n{"round": 1}\n'),
    ("rounds.jsonl", b'{"round": 0, "evaluation": 3}\n'), ("summary.json", b""),
    ("summary.json", b'{"warnings": 3}'), ("summary.json", b'{"final": {"accuracy": "high"}}'),
    ("summary.json", b"\xff"), ("clients.jsonl", b'{"client": "a"}\n'), ("config.toml", b""),
    ("config.toml", b"\xff"), ("config.toml", b"[run]\nrounds = []\n"), ("checkpoint", b""),
    ("checkpoint", b"\xff" * 100), ("checkpoint", NO_NOTES),
]  # fmt: skip
"""What stands in a file of a run's directory in place of what the run wrote."""


def damaged(path: Path, content: bytes) -> Iterator[str]:
    """A context's body: the file, or each checkpoint, holds this."""
    paths = [*path.glob("*.safetensors")] if path.is_dir() else [path]
    kept = [p.read_bytes() for p in paths]
    for p in paths:
        if content is NO_NOTES:
            save_file({}, p, {"tree": '{"format": 2, "tree": {"map": []}}', "line": "3"})
        else:
            p.write_bytes(content)
    yield str(path)
    for p, was in zip(paths, kept, strict=True):
        p.write_bytes(was)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["resume", "report", "export", "doctor"])
def test_a_damaged_run_is_refused_by_the_file_or_done_without_it(
    settings: Settings, tmp_path: Path, command: str
) -> None:
    changes = {"clients.count": 2, "run.rounds": 1, "train.lr-schedule": "constant"}
    ran = federate(settings(**quick("fedex", **changes))).directory
    whole = tmp_path / "whole"
    shutil.copytree(ran, whole)
    experiment = str(whole / "config.toml")
    words = {
        "resume": ["simulate", "--quiet", "--resume", str(ran)],
        "report": ["report", str(ran)],
        "export": ["export", "--out", f"{tmp_path}/out", str(ran)],
        "doctor": ["doctor", experiment, "--set", "run.resume=true", "--set", "run.rounds=2"],
    }[command]  # fmt: skip
    for name, content in DAMAGE:
        shutil.rmtree(ran)
        shutil.copytree(whole, ran)
        for path in damaged(ran / name, content):
            result = run(*words)
            said = told(result).replace("\n", "")
            assert "Traceback" not in said
            if result.exit_code:
                assert path in said or (name == "begun_with.json" and "begun with" in said), said


@pytest.mark.parametrize("name", ["a b", "it's", "$(x)", "\u00e9"])
def test_the_command_that_goes_on_can_be_pasted(settings: Settings, name: str) -> None:
    given = settings(**quick("fedex", **{"run.name": name, "run.rounds": 1, "clients.count": 2}))
    federate(given)
    with pytest.raises(FedLoraError) as caught:
        federate(given)
    command = str(caught.value).split("`")[1]
    assert shlex.split(command) == ["fedlora", "simulate", "--resume", f"{given['run.out']}/{name}"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["| head -c 0", ">&-", ">/dev/full"])
def test_an_output_that_is_closed_is_no_traceback(shell: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m fedlora.cli config quickstart {shell}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_numbers_beyond_64_bits_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"run\.seed = 2\^63 or more: must be a number of 64"):
        Config.read({"run.seed": 2**63})
