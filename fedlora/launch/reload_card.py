"""A script, not a module to import: loads exports by their README.md, and writes their logits.

    python -P reload_card.py JOB.json

The job names the directories, and files of token batches and of the logits to write. The first
block of Python in a README.md is run as it stands there, in its directory; it defines `logits`.
This process has no fedlora: to import it is an error here. So what loads here loads anywhere that
has torch, transformers, peft and safetensors.
"""

import json
import os
import re
import sys
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main(path: str) -> None:
    """Do the job of this file."""
    sys.modules["fedlora"] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import load_file, save_file

    with open(path, encoding="utf-8") as f:
        job: dict[str, Any] = json.load(f)
    torch.set_num_threads(job["threads"])
    batches = load_file(job["batches"])
    for number, directory in enumerate(job["directories"]):
        os.chdir(directory)
        with open("README.md", encoding="utf-8") as f:
            block = BLOCK.search(f.read())
        assert block is not None
        known: dict[str, Any] = {"__name__": "__card__"}
        exec(compile(block[1], f"{directory}/README.md", "exec"), known)
        found = {}
        for i in range(job["count"]):
            mine = {k.partition(".")[2]: x for k, x in batches.items() if k.startswith(f"{i}.")}
            found[str(i)] = known["logits"](mine).float().contiguous()
        save_file(found, job["logits"].format(number))
        known.clear()


if __name__ == "__main__":
    main(sys.argv[1])
