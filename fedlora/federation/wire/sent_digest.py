"""A digest of what a client is sent for one round, so that others can be told what it was.

Of the download (factors, what of them trains, what is folded into the base, base changes) and of
what the job beside it says of the model: its base, its labels, its ranks. All that decides what a
client trains from, but for what it kept itself (`MemberTable.own`).
"""

import hashlib
import json
from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

Sent = tuple[str, str]
"""(form, content) in hexadecimal digits: of names, types and shapes, and of all of it."""
OF_THE_MODEL = ("base-number", "code", "cuts", "fingerprint", "labels", "modules", "ranks")
"""What of a job decides what is trained from."""
NOT_SENT = ("job", "secagg")
"""Records of a message that are no part of the download."""


def digest_of(content: RecordDict) -> Sent:
    """Of a message to a client, what it is sent."""
    form, whole = hashlib.sha256(), hashlib.sha256()
    for name, data in sorted(_pieces(content)):
        form.update(name)
        whole.update(len(name).to_bytes(8, "big") + name + hashlib.sha256(data).digest())
    return form.hexdigest(), whole.hexdigest()


def _pieces(content: RecordDict) -> Iterator[tuple[bytes, bytes]]:
    """(name and form, bytes) of each array and setting."""
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            for key, x in record.items():
                form = json.dumps([name, key, x.dtype, [*x.shape], x.stype])
                yield form.encode(), x.data
        elif isinstance(record, ConfigRecord):
            for key, value in record.items():
                if name not in NOT_SENT or (name == "job" and key in OF_THE_MODEL):
                    head = json.dumps([name, key])
                    yield head.encode(), json.dumps(value, default=_hex).encode()


def _hex(x: object) -> str:
    assert isinstance(x, bytes)
    return x.hex()
