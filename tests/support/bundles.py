"""Flower's bundles of apps, honest and spoilt."""

import warnings
import zipfile
from io import BytesIO
from pathlib import Path


def built(app: Path) -> bytes:
    """The bundle that `flwr run` makes of an app's directory."""
    from flwr.cli.build import build_fab_from_disk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pathspec, which Flower uses
        return build_fab_from_disk(app)


def changed(fab: bytes, **files: bytes | None) -> bytes:
    """The bundle with these files in place of its own (None: without it)."""
    with zipfile.ZipFile(BytesIO(fab)) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    found |= {name: data for name, data in files.items() if data is not None}
    return zipped({n: d for n, d in found.items() if files.get(n, b"") is not None})


def zipped(files: dict[str, bytes]) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()
