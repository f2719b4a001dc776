"""Lines of processes' logs, as a terminal may have them."""

import re

COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def harmless(line: str) -> str:
    """A log's line for a terminal: it may have colours, and all else that does not print is shown.

    What a log holds may be others' words.
    """
    parts = COLOUR.split(line.replace("\t", "    "))
    return "".join(
        x if COLOUR.fullmatch(x) or x.isprintable() else x.encode("unicode_escape").decode()
        for x in parts
    )
