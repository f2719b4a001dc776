"""A command starts in whatever state its caller left: closed streams, a removed directory."""

import io
import os
import sys
from pathlib import Path

import pytest
import typer

from fedlora.launch.guard import guarded
from tests.support.tiny_federation import python

CLOSED = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
from fedlora.launch.guard import guarded
with guarded():
    print("said to nobody")
    open(sys.argv[1], "w").write("a file")
    os.write(1, b"not into the file")
"""


def test_streams_that_were_closed_are_empty_and_no_file_takes_their_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert python(CLOSED, str(path)).returncode == 0
    assert path.read_text() == "a file"


def test_a_current_directory_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit), guarded():
        typer.echo("not reached")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("FedLoraError: the current directory is no more")


def test_no_backend_of_the_caller_s_stops_a_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPLBACKEND", "nosuch")
    with guarded():
        done = python("import matplotlib", environment=os.environ)
    assert done.returncode == 0, done.stderr
    assert sys.stdout is not None


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_an_output_s_encoding_lacks_is_printed_as_an_escape(
    monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="cp1252") as out:
        monkeypatch.setattr(sys, stream, out)
        with guarded():
            print("caf\u00e9 \u4f60", file=getattr(sys, stream), flush=True)
        assert written.getvalue() == b"caf\xe9 \\u4f60" + os.linesep.encode()
