"""The digest of a tree file, in the file itself: a flipped bit anywhere in it is seen.

    seal(path)       put it in, once the file is written
    sealed(data)     is the file what it was sealed as?

It is SHA-256 over every byte of the file, with zeros where its own 64 characters stand. It says
that nothing was damaged, and nothing against somebody who can compute one, too.
"""

import hashlib
import re
from pathlib import Path

EMPTY = "0" * 64
_PLACE = re.compile(rb'"tree":"\{\\"format\\": \d+, \\"digest\\": \\"([0-9a-f]{64})\\"')
"""In the head of a safetensors file, whose metadata are JSON in JSON: see tree_format.numbered."""
_PART = 1 << 20


def seal(path: Path) -> None:
    """Write the digest into a file that has EMPTY in its place. It is never whole in memory.

    Raises:
        ValueError: it has no such place.
    """
    with path.open("r+b") as f:
        head = f.read(8)
        found = _PLACE.search(head := head + f.read(int.from_bytes(head, "little")))
        if found is None or found[1] != EMPTY.encode():
            raise ValueError(f"{path} has no place for a digest")
        digest = hashlib.sha256(head)
        while part := f.read(_PART):
            digest.update(part)
        f.seek(found.start(1))
        f.write(digest.hexdigest().encode())


def sealed(data: bytes) -> bool | None:
    """Are these bytes of a file what they were sealed as? None where they have no digest."""
    size = int.from_bytes(data[:8], "little")
    found = _PLACE.search(data, 0, min(8 + size, len(data)))
    if found is None:
        return None
    view = memoryview(data)
    digest = hashlib.sha256(view[: found.start(1)])
    digest.update(EMPTY.encode())
    digest.update(view[found.end(1) :])
    return digest.hexdigest() == found[1].decode()
