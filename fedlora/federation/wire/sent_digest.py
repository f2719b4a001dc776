"""Digests of what a client is sent for one round, so that others can be told what it was.

    model   the factors, what of them trains, and what is folded into the base for this round
    base    the base changes that the client lacks, and what its initialisation takes from the base

Of each part the digest of its form (names, types and shapes) and that of all of it: clients that
lack the same things are sent the same bytes.
"""

import hashlib
import json
from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

Parts = tuple[tuple[str, str], ...]
"""(form, content) of the model and of the base, in hexadecimal digits."""
BASE_KEYS = ("base", "snapshots")
NOT_SENT = ("job", "secagg")
"""Records of a message that are no part of the download."""


def digests_of(content: RecordDict) -> Parts:
    """Of a message to a client, its download's."""
    found = []
    for base in (False, True):
        form, whole = hashlib.sha256(), hashlib.sha256()
        for name, data in sorted(_pieces(content, base)):
            form.update(name)
            whole.update(len(name).to_bytes(8, "big") + name + hashlib.sha256(data).digest())
        found.append((form.hexdigest(), whole.hexdigest()))
    return tuple(found)


def _pieces(content: RecordDict, base: bool) -> Iterator[tuple[bytes, bytes]]:
    """(name and form, bytes) of each array and setting of one part."""
    for name, record in content.items():
        if name in NOT_SENT:
            continue
        if isinstance(record, ArrayRecord):
            if name.startswith("base-") == base:
                for key, x in record.items():
                    form = json.dumps([name, key, x.dtype, [*x.shape], x.stype])
                    yield form.encode(), x.data
        elif isinstance(record, ConfigRecord):
            for key, value in record.items():
                if (key in BASE_KEYS) == base:
                    fixed = value if base else None  # which versions it lacks is form
                    head = json.dumps([name, key, fixed], default=_hex)
                    yield head.encode(), json.dumps(value, default=_hex).encode()


def _hex(x: object) -> str:
    assert isinstance(x, bytes)
    return x.hex()
