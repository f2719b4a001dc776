"""What this platform can do beside one process: start workers, serve on a Unix socket.

Linux is what fedlora is tested on. Elsewhere a simulation runs in one process unless more are asked
for; what a platform lacks is refused in a line, never found out in the middle of a run.
"""

import multiprocessing
import os
import socket
import sys
import threading

from fedlora.errors import ConfigError


def can_fork() -> bool:
    """Whether a process can be copied: not on Windows."""
    return hasattr(os, "fork")


def workers(asked: int) -> int:
    """Worker processes: as many as asked, or for 0 one a core on Linux, and one elsewhere.

    Raises:
        ConfigError: several, where there is no fork.
    """
    several = (os.cpu_count() or 1) if can_fork() and sys.platform == "linux" else 1
    if asked > 1 and not can_fork():
        what = f"{sys.platform} cannot fork worker processes; set it to 1"
        raise ConfigError([f"simulate.workers = {asked}: {what}"])
    return asked or several


def deployable() -> bool:
    """Whether `fedlora deploy` runs here: it supervises processes and serves on Unix sockets."""
    return can_fork() and hasattr(os, "posix_spawn") and hasattr(socket, "AF_UNIX")


def end_with_parent() -> None:
    """From here on this process of multiprocessing ends at once when its parent has, however that
    ended: a parent that is killed tells its children nothing."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
