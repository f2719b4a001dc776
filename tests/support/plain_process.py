"""One process without fedlora that reloads the exports of many tests, so that each need not start
one: the script that an export is checked by, called again and again."""

import atexit
import json
import subprocess
import sys
from pathlib import Path

from fedlora.errors import ModelError
from fedlora.launch import reload_card

SERVE = """
import json, runpy, sys, traceback
main = runpy.run_path(sys.argv[1])["main"]
said, sys.stdout = sys.stdout, sys.stderr
for job in sys.stdin:
    try:
        main(job.strip())
        error = ""
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps(error), file=said, flush=True)
"""


class PlainProcess:
    """Starts at its first job."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, job: Path) -> None:
        """In place of `fresh_process.run_script`."""
        if self.process is None:
            command = [sys.executable, "-P", "-c", SERVE, str(reload_card.__file__)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            atexit.register(self.process.kill)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{job}\n")
        self.process.stdin.flush()
        if error := json.loads(self.process.stdout.readline()):
            raise ModelError(f"the export does not load with transformers and PEFT alone: {error}")
