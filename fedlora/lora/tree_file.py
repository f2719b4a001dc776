"""A tree of dataclasses and tensors in one file, which appears whole or not at all.

    save(path, tree)       temporary file, fsync, rename, fsync of the directory
    load(path, *types)     refuses by name what is damaged, to the bit, or of another kind

The file is safetensors; the tree's skeleton is JSON in its metadata. Nothing is pickled. The names
of classes and fields in it are a format with a number: fedlora/lora/tree_format.py.
"""

import dataclasses
import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save_file
from torch import Tensor

from fedlora.errors import CheckpointError, FormatError
from fedlora.lora.adapter import Factors, Pair, Stack
from fedlora.lora.tree_digest import seal, sealed
from fedlora.lora.tree_format import FORMAT, Names, Older, make, numbered, parted, renamed

KNOWN = (Factors, Pair, Stack)
UNSEALED = 2
"""The last format whose files have no digest."""


def save(path: Path, tree: Any, notes: Mapping[str, str] | None = None) -> None:
    """Write the tree; after it returns, a crash of the machine does not lose it.

    Raises:
        OSError: the disk is full, say. What stood at path still does.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(tree, tensors)
    metadata = {"tree": json.dumps(numbered(skeleton)), **(notes or {})}
    write_tensors(path, tensors, metadata, seal)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    finish: Callable[[Path], None] = lambda _: None,
) -> None:
    """A safetensors file at path, old or new and never a part; `finish` gets it before it appears.

    The tensors go from where they lie to the disk: the file is never whole in memory.

    Raises:
        OSError: the disk is full, say. What stood at path still does.
    """
    alone, seen = {}, set[int]()
    for name, x in tensors.items():  # safetensors wants no two names for one storage
        if x.untyped_storage().data_ptr() in seen or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)
        alone[name] = x.detach()
        seen.add(x.untyped_storage().data_ptr())
    with appearing(path) as new:
        try:
            save_file(alone, new, metadata=metadata)
            finish(new)
        except SafetensorError as e:
            raise OSError(errno.EIO, str(e), str(path)) from e


def kinds(tree: Any) -> set[str]:
    """The names of the dataclasses in a tree: those that `load` must be given the types of."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        inner = [getattr(tree, f.name) for f in dataclasses.fields(tree)]
        return {type(tree).__name__}.union(*map(kinds, inner))
    inner = list(tree.values()) if isinstance(tree, Mapping) else tree
    return set().union(*map(kinds, inner)) if isinstance(inner, tuple | list) else set()


def load(path: Path, *types: type, older: Older | None = None) -> Any:
    """The tree that was saved: see `load_with_notes`."""
    return load_with_notes(path, *types, older=older)[0]


def load_with_notes(
    path: Path, *types: type, older: Older | None = None
) -> tuple[Any, dict[str, str]]:
    """The tree that was saved, and the strings that were saved beside it, of one read of the file.

    `types` are the dataclasses in it beyond Factors, Pair and Stack.

    older: what older formats call those types and their fields, where they differ.

    Raises:
        FormatError: the file is whole, and a newer fedlora wrote it, or it holds a class or a field
            that is not expected.
        CheckpointError: it is not there, or is damaged.
    """
    try:
        data = path.read_bytes()  # one read: a writer may put another file here meanwhile
        notes = _metadata(data)
        number, skeleton = _parts(notes.pop("tree"), data, path)
        tensors = from_bytes(data)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e
    steps = tuple((older or {}).get(n, Names()) for n in range(number, FORMAT))
    known = {t.__name__: t for t in (*KNOWN, *types)}
    try:
        return _Reader(path, tensors, known, steps).build(skeleton), notes
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged, or of another version of fedlora: {e}") from e


def _parts(tree: str, data: bytes, path: Path) -> tuple[int, Any]:
    """The format number and the skeleton in a file of these bytes.

    Raises:
        ValueError: a byte is not what it was.
        FormatError: a newer fedlora wrote the file.
    """
    whole = sealed(data)
    if whole is False:
        raise ValueError("its digest is not that of its bytes")
    number, skeleton = parted(json.loads(tree), path)
    if number > UNSEALED and whole is None:
        raise ValueError("it has no digest")
    return number, skeleton


def _metadata(data: bytes) -> dict[str, str]:
    """The strings in a safetensors file's head."""
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return found


def is_sealed(path: Path) -> bool:
    """Has the file a digest, as every fedlora since format 3 writes one?"""
    return sealed(path.read_bytes()) is not None


def notes(path: Path) -> dict[str, str]:
    """The strings that were saved beside the tree.

    Raises:
        FormatError: a newer fedlora wrote the file.
        CheckpointError: it is not there or is damaged.
    """
    try:
        data = path.read_bytes()
        metadata = _metadata(data)
        _parts(metadata.pop("tree"), data, path)
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e
    return metadata


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` where the block ends without an error.

    A reader sees the old file or the new one, never a part. Only its owner may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as directory:
        new = Path(directory, path.name)
        new.touch(0o600)
        yield new
        with new.open("rb+") as f:
            os.fsync(f.fileno())
        os.replace(new, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Have the names in a directory survive a crash. Windows opens none, and keeps them itself."""
    try:
        directory = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_atomically(path: Path, data: bytes) -> None:
    """Put data at path: a reader sees the old file or the new one, never a part."""
    with appearing(path) as new:
        new.write_bytes(data)


SCALARS = (bool, int, float, str, type(None))


def _flatten(x: Any, tensors: dict[str, Tensor]) -> Any:
    if type(x) in SCALARS:  # first: a run of many clients has a hundred of them a client
        return x
    if isinstance(x, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = x.detach()
        return {"tensor": name}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        values = {f.name: _flatten(getattr(x, f.name), tensors) for f in dataclasses.fields(x)}
        return {"type": type(x).__name__, "fields": values}
    if isinstance(x, Mapping):
        return {"map": [[key, _flatten(value, tensors)] for key, value in x.items()]}
    if isinstance(x, tuple | list):
        return {"tuple": [_flatten(value, tensors) for value in x]}
    if isinstance(x, frozenset):
        return {"set": sorted(x)}
    if isinstance(x, SCALARS):
        return x
    raise TypeError(f"a {type(x).__name__} cannot be kept in a checkpoint")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Builds the tree of one file."""

    path: Path
    tensors: Mapping[str, Tensor]
    types: Mapping[str, type]
    steps: tuple[Names, ...]
    """From the file's names to today's."""

    def build(self, x: Any) -> Any:
        if not isinstance(x, dict | list):
            return x
        match x:
            case {"tensor": name}:
                return self.tensors[name]
            case {"type": name, "fields": values}:
                return self._object(name, values)
            case {"map": items}:
                return {key: self.build(value) for key, value in items}
            case {"tuple": items}:
                return tuple(self.build(value) for value in items)
            case {"set": items}:
                return frozenset(items)
        raise CheckpointError(f"{self.path} is damaged: {x!r} is no part of a tree")

    def _object(self, name: str, values: Mapping[str, Any]) -> Any:
        name, values = renamed(name, values, self.steps)
        if name not in self.types:
            raise FormatError(
                f"{self.path} holds a {name}, which this run has no use for: read it with the "
                "strategy and the fedlora that wrote it"
            )
        built = {key: self.build(value) for key, value in values.items()}
        return make(self.types[name], built, str(self.path))
