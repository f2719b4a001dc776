"""What a node reads of the bundle that a server sends: digests, to compare with its own code.

A bundle (Flower's FAB, a zip) holds the two apps, the run's config, perhaps fedlora itself. A node
unpacks nothing of it and imports nothing of it: the installed fedlora answers. It only looks, in
memory, so that a run between two sides of different code is refused with the reason:

    fedlora/**.py, client_app/**.py   must be the code that is installed here, file by file
    fedlora.json                      the same, of a bundle without the code: the server's digests
    another .py                       must be the file of that name in the node's own directory
    pyproject.toml                    data: its config is the run's; its ClientApp must be OURS
    server_app/**.py, texts           the server's own affair; not looked at
    anything else                     refused: native code, .pth files, links, paths that climb
"""

import hashlib
import json
import re
import stat
import tomllib
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

from fedlora.errors import BundleError
from fedlora.launch.shim import app_files
from fedlora.version import __version__

OURS = "client_app.app:app"
MANIFEST = "fedlora.json"
TEXTS = (".md", ".toml", ".json", ".jsonl", ".yaml", ".yml")
MOST = 64 << 20
"""Bytes of a bundle once unpacked; Flower's own limit is 10 MiB packed."""
SHORT = 12
"""Hexadecimal digits of a digest that is shown."""


@dataclass(frozen=True)
class Release:
    """A version of fedlora, and the SHA-256 of each of its files by its name in a bundle."""

    version: str
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One digest of all of them."""
        return hashlib.sha256(repr(sorted(self.files.items())).encode()).hexdigest()[:SHORT]

    def __str__(self) -> str:
        return f"fedlora {self.version} (digest {self.digest})"


def installed() -> Release:
    """The fedlora that this process runs."""
    root = Path(__file__).parents[2]
    paths = (p for p in root.rglob("*.py") if p.relative_to(root).parts[0] != "simulations")
    files = {f"fedlora/{p.relative_to(root).as_posix()}": _digest(p.read_bytes()) for p in paths}
    return Release(__version__, files)


def manifest() -> str:
    """The text of a bundle's fedlora.json: what the server has installed."""
    mine = installed()
    return json.dumps({"version": mine.version, "files": mine.files}, indent=1, sort_keys=True)


def check(content: bytes) -> None:
    """Compare a bundle with what is installed here. Nothing of it is written, imported or run.

    content: the zip as it came; its files are read up to MOST bytes in all.

    Raises:
        BundleError: it differs, or holds what a node does not take. Says what, with both versions
            and digests.
    """
    files = _read(content)
    _check_component(files.get("pyproject.toml", b""))
    mine = installed()
    code = {n: _digest(data) for n, data in files.items() if n.startswith("fedlora/")}
    if code:
        _compare(mine, Release(_version(files.get("fedlora/version.py", b"")), code))
    if MANIFEST in files:
        _compare(mine, _declared(files[MANIFEST]))
    for name, data in files.items():
        if name.startswith("client_app/"):
            _check_client_app(name, data)
        elif name.endswith(".py") and not name.startswith("fedlora/"):
            _check_own(name, data)


def _read(content: bytes) -> dict[str, bytes]:
    """Name to bytes of what is looked at.

    Raises:
        BundleError: it is no archive, or holds what a node does not take.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            _check_names(entries)
            return {e.filename: archive.read(e) for e in entries if _is_read(e.filename)}
    except BundleError:
        raise
    except Exception as e:  # zipfile and zlib raise a dozen kinds for bytes that are no archive
        raise BundleError(f"it is no archive that can be read: {type(e).__name__}") from None


def _check_names(entries: list[zipfile.ZipInfo]) -> None:
    counts = Counter(e.filename for e in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise BundleError(f"it holds {_few(twice)} more than once")
    if (size := sum(e.file_size for e in entries)) > MOST:
        raise BundleError(f"it unpacks to {size} bytes, must be at most {MOST}")
    strange = [e.filename for e in entries if _is_strange(e)]
    if strange:
        raise BundleError(
            f"it holds {_few(strange)}: a node takes Python files of fedlora and texts alone"
        )


def _is_strange(entry: zipfile.ZipInfo) -> bool:
    """A link, a path that climbs, or a file that is neither Python nor a text?"""
    name = entry.filename
    if stat.S_ISLNK(entry.external_attr >> 16) or "\\" in name or ":" in name:
        return True
    if any(part in ("", ".", "..") for part in name.split("/")):
        return True
    known = (".info/CONTENT", "LICENSE")
    return name not in known and PurePosixPath(name).suffix not in (".py", *TEXTS)


def _is_read(name: str) -> bool:
    code = name.endswith(".py") and not name.startswith("server_app/")
    return code or name in ("pyproject.toml", MANIFEST)


def _check_component(text: bytes) -> None:
    try:
        named = tomllib.loads(text.decode())["tool"]["flwr"]["app"]["components"].get("clientapp")
    except (ValueError, KeyError, TypeError, AttributeError):
        named = None
    if named != OURS:
        raise BundleError(f"its pyproject.toml names the ClientApp {named!r}, must be {OURS!r}")


def _compare(mine: Release, theirs: Release) -> None:
    names = sorted(mine.files.keys() | theirs.files.keys())
    if differ := [n for n in names if mine.files.get(n) != theirs.files.get(n)]:
        first = differ[0]
        here, there = (r.files.get(first, "absent")[:SHORT] for r in (mine, theirs))
        more = f" and {len(differ) - 1} more files" if len(differ) > 1 else ""
        raise BundleError(
            f"this node runs its own {mine} and no code of a server; the server's is {theirs}: "
            f"{first} is {here} here and {there} there{more}. Install one version on both sides; "
            "`fedlora deploy run` writes the server's digests anew"
        )


def _declared(text: bytes) -> Release:
    try:
        tree = json.loads(text)
        files = {str(k): str(v) for k, v in tree["files"].items()}
        return Release(str(tree["version"])[:30], files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(f"its {MANIFEST} is no list of digests") from None


def _version(text: bytes) -> str:
    """The version that a bundle's version.py states; it is not run."""
    found = re.search(rb'^__version__ = "([\w.+-]{1,30})"$', text, re.MULTILINE)
    return found[1].decode() if found else "of no stated version"


def _check_client_app(name: str, data: bytes) -> None:
    """Raises BundleError unless it is the app that fedlora's installed code stands for."""
    if name == "client_app/__init__.py" and not data.strip():
        return
    mine = app_files("client").get(name)
    if mine is None or data != mine.encode():
        here = "absent" if mine is None else _digest(mine.encode())[:SHORT]
        raise BundleError(
            f"this node runs its own fedlora {__version__} and no code of a server; the bundle's "
            f"{name} is {_digest(data)[:SHORT]}, must be {here}. A node's own config says which "
            "code of its own a run may use (user-code), not the app"
        )


def _check_own(name: str, data: bytes) -> None:
    path = Path.cwd() / name
    if not path.is_file() or path.read_bytes() != data:
        raise BundleError(
            f"the bundle's {name} is not in this node's directory, or is another file there. A "
            "node runs no code of a server: its operator puts the same file beside node.sh"
        )


def _few(names: list[str]) -> str:
    shown = ", ".join(ascii(n[:60]) for n in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
