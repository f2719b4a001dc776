"""The digest of a line of JSON, in the line itself: a flipped bit anywhere in it is seen.

    seal(text)      the line with SHA-256 of its text as its last key
    sealed(line)    has it one?
    whole(line)     is it what it was sealed as?

It says that nothing was damaged, and nothing against somebody who can compute one, too.
"""

import hashlib
import re

KEY = "digest"
_PLACE = re.compile(rb', "digest": "([^"]*)"\}\s*$')


def seal(text: str) -> str:
    """A JSON object's text, of one key at least, with its digest."""
    return f'{text[:-1]}, "{KEY}": "{_digest(text.encode())}"}}'


def sealed(line: bytes) -> bool:
    return _PLACE.search(line) is not None


def whole(line: bytes) -> bool:
    """False where it has no digest."""
    found = _PLACE.search(line)
    return found is not None and _digest(line[: found.start()] + b"}") == found[1].decode("latin-1")


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
