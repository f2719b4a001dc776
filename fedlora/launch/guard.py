"""Prints a command's error to the user in one paragraph, without a traceback."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fedlora.errors import FedLoraError


@contextmanager
def guarded() -> Iterator[None]:
    """An environment fit for federations; exits with 1 where a user's error stops what it holds."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in huge pages
    os.environ["MPLBACKEND"] = (
        "agg"  # figures are files; matplotlib refuses a name it does not know
    )
    _open_streams()
    try:
        _check_here()
        yield
    except FedLoraError as e:
        said = "\n".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", [])])
        typer.secho(said, fg="red", err=True)
        sys.exit(1)
    except OSError as e:
        if (line := of_system(e)) is None:
            raise
        typer.secho(line, fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _open_streams() -> None:
    """Give a process that was started with closed streams empty ones, and let all be printed.

    Else the next file that it opens would be taken for its output; and a label that the terminal's
    encoding lacks would end the command.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # what their encoding lacks is written as an escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_here() -> None:
    """
    Raises:
        FedLoraError: the current directory was removed; libraries ask for it.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FedLoraError("the current directory is no more: cd to one that is there") from None


def of_system(error: OSError) -> str | None:
    """What the system refused, as one line that names the file; None where it named none.

    A full disk is said in any case: a write that fails has no name with it.
    """
    if error.filename is None:
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return f"{shown_name(error.filename)}: {error.strerror}"


def shown_name(name: object) -> str:
    """A file's name as one line that any terminal can print."""
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    whole = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return whole if len(whole) <= 200 else f"{whole[:200]}..."
