"""The sites of data.clients: which files they are, and how each is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from fedlora.config.sections import DataConfig
from fedlora.config.sites import COLUMNS, SiteConfig
from fedlora.errors import DataError
from fedlora.training.data.directories import is_of_pictures
from fedlora.training.data.files import KINDS, kind_of
from fedlora.training.data.locate import locate


@dataclass(frozen=True, slots=True)
class ClientSite:
    """One client's own source of rows."""

    path: str
    data: DataConfig
    """The run's, with this site's columns, labels and encoding in place."""
    rank: int
    """0: as clients.ranks has it."""


def sites_of(data: DataConfig) -> list[ClientSite]:
    """The sites in their order, those of one directory or pattern by name: client i is the i-th.

    Raises:
        DataError: a directory or a pattern has no files.
    """
    return [
        ClientSite(path, _with_columns(data, site), site.rank)
        for i, site in enumerate(data.clients)
        for path in _files(f"data.clients[{i}]", site.path)
    ]


def _with_columns(data: DataConfig, site: SiteConfig) -> DataConfig:
    own = {key: getattr(site, key) for key in COLUMNS if getattr(site, key)}
    return data.model_copy(update=own)


def _files(key: str, path: str) -> list[str]:
    """The files that a site's path stands for: itself, unless it is a directory or a pattern."""
    place = Path(locate(path))
    if place.is_dir() and not _is_data_set(place) and not is_of_pictures(place):
        found = sorted(str(p) for p in place.iterdir() if p.is_file() and kind_of(p) in KINDS)
    elif has_magic(path) and not place.exists():
        found = sorted(p for p in glob(locate(path), recursive=True) if Path(p).is_file())
    else:
        return [path]
    if not found:
        raise DataError(f'{key} = "{path}": no file there, from {Path.cwd()}, one for each client')
    return found


def _is_data_set(place: Path) -> bool:
    return any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def ranks_of(data: DataConfig) -> Iterator[int]:
    """Each site's rank, 0 where it states none; none where there are no sites."""
    if any(site.rank for site in data.clients):
        yield from (site.rank for site in sites_of(data))
