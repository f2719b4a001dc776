"""A command that is printed can be pasted into a shell."""

import ast
import re
from pathlib import Path

FEDLORA = Path(__file__).parents[2] / "fedlora"
COMMAND = re.compile(r"\b(fedlora|flwr|vllm) [a-z][a-z -]*$")
"""A text that ends where a command's next word is put in."""
QUOTED = re.compile(r"shlex\.|\.quoted$|^name$|^i$")


def unquoted(source: str) -> list[str]:
    """Values that a text puts into a command as they are."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        before = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                before = str(part.value)
            elif isinstance(part, ast.FormattedValue):
                value = ast.unparse(part.value)
                if COMMAND.search(before) and not QUOTED.search(value):
                    found.append(value)
                before = ""
    return found


def test_paths_in_commands_are_quoted() -> None:
    found = {path: unquoted(path.read_text("utf-8")) for path in sorted(FEDLORA.rglob("*.py"))}
    assert not {path: values for path, values in found.items() if values}


def test_an_unquoted_path_is_found() -> None:
    assert unquoted("f'go on: fedlora simulate --resume {x}'") == ["x"]
    assert not unquoted("f'go on: fedlora simulate --resume {shlex.quote(x)}'")
