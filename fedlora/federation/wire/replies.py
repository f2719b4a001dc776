"""The records that a reply to each kind of message has: a node sends no others, and a server takes
none. What nobody asked for would cost its memory and disk, up to what the gate lets pass.
"""

from collections.abc import Mapping

TAGGED = frozenset({"reply"})
REPLIES: Mapping[str, frozenset[str]] = {
    "query": frozenset({"facts"}),
    "train": TAGGED | {"sent", "metrics", "certificate", "chosen"},
    "evaluate": TAGGED | {"metrics"},
    "gradient": TAGGED | {"sent", "metrics"},
    "collect": TAGGED | {"sent", "metrics"},
    "secagg_setup": TAGGED | {"secagg"},
    "secagg_share": TAGGED | {"secagg"},
    "secagg_collect": TAGGED | {"masked", "start"},
    "secagg_agree": TAGGED | {"secagg"},
    "secagg_unmask": TAGGED | {"secagg"},
}
"""By the kind of a message, the records that its reply may have."""
