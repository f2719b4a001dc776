"""Notes what a process executes, imports and opens: a line each, in a file of $AUDITED.

Python imports this at its start where its directory is on PYTHONPATH.
"""

import os
import sys


def note(directory: str) -> None:
    log = os.open(f"{directory}/{os.getpid()}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(log, f"argv {' '.join(sys.orig_argv)}\n".encode())
    seen = set()

    def hook(event: str, arguments: tuple) -> None:
        match event:
            case "exec":
                what = arguments[0].co_filename
            case "import":
                what = arguments[1]  # of a native module alone
            case "open" | "ctypes.dlopen" | "os.mkdir" | "subprocess.Popen":
                what = arguments[0]
            case _:
                return
        line = f"{event} {what}\n"
        if what is not None and line not in seen:
            seen.add(line)
            os.write(log, line.encode(errors="replace"))

    sys.addaudithook(hook)


if directory := os.environ.get("AUDITED"):
    note(directory)
