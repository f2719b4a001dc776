"""A folder of pictures: one folder a class, with its files in it, however deep.

    birds/heron/1.jpg              a row a file, its class the first folder's name
    birds/heron/2021/2.png
    birds/train/heron/1.jpg        with data.split = "train": the folders of classes lie in it

Edge cases
    a file that is no picture      is a row as well, left out and counted when it is opened
    a folder without a file        is no class; said in the account of the rows
    a file in no class's folder    is no row; said there, too
    names that begin with "."      are passed over, and so is what a Mac puts into archives
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
            ".pgm", ".pbm", ".pnm")  # fmt: skip
SPLITS = frozenset({"train", "test", "val", "valid", "validation", "dev", "eval"})


class PictureFiles(NamedTuple):
    """The files by name of their class, in order."""

    files: list[str]
    """Their whole paths."""
    classes: list[str]
    notes: tuple[str, ...]


def has_pictures(place: Path) -> bool:
    """Does a directory hold folders with a picture in one of them, and no table beside?"""
    return any(
        file.suffix.lower() in SUFFIXES for folder in _folders(place) for file in _files(folder)
    )


def read_folder(place: Path, split: str) -> PictureFiles:
    """Every file in the folders of classes.

    Raises:
        ValueError: its folders are those of splits, and none is this one.
    """
    place = place.absolute()
    root = place / split if split and (place / split).is_dir() else place
    folders = _folders(root)
    if folders and root is place and all(f.name.lower() in SPLITS for f in folders):
        names = ", ".join(f'"{f.name}"' for f in folders)
        raise ValueError(f'no folder "{split}" in it; set data.split to one of {names}')
    by_class = {folder.name: [*_files(folder)] for folder in folders}
    notes = [f'no file in "{name}", which is no class' for name, files in by_class.items()
             if not files]  # fmt: skip
    beside = sum(p.is_file() for p in _seen(root))
    notes += [f"{beside} files in no class's folder not read"] if beside else []
    files = [(str(file), name) for name, found in by_class.items() for file in found]
    return PictureFiles([file for file, _ in files], [name for _, name in files], tuple(notes))


def _folders(place: Path) -> list[Path]:
    return [p for p in _seen(place) if p.is_dir()]


def _files(folder: Path) -> Iterator[Path]:
    """All below it, by their paths."""
    for p in _seen(folder):
        if p.is_dir():
            yield from _files(p)
        elif p.is_file() or p.is_symlink():  # a link to nothing is a row that is not there
            yield p


def _seen(place: Path) -> list[Path]:
    """What is in it, by name, without what is hidden."""
    found = (p for p in place.iterdir() if p.name[0] != "." and p.name != "__MACOSX")
    return sorted(found, key=lambda p: p.name)
