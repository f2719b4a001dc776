"""A node's own config: what its operator says of it, and what a server cannot.

    flower-supernode --node-config 'rank=8 data-path="/data" memory="/var/lib/fedlora"'

A key that is none, or of another type, is an error before any message is answered: a limit that is
misspelt would else be no limit.
"""

import difflib
from collections.abc import Iterator, Mapping

from fedlora.config.possible import is_path_name
from fedlora.config.reader import Config
from fedlora.config.sites import COLUMNS
from fedlora.errors import ConfigError
from fedlora.federation.wire.same_machine import OWN_MACHINE, is_own_machine

NUMBER, TEXT = (int, float), (str,)
KEYS: Mapping[str, tuple[type, ...]] = {
    "partition-id": (int,),
    "num-partitions": (int,),
    "rank": (int,),
    "layers": (int,),
    "data-path": TEXT,
    **dict.fromkeys(COLUMNS, TEXT),
    "memory": TEXT,
    "devices": TEXT,
    "max-epsilon": NUMBER,
    "secure-aggregation": (bool,),
    "worker-socket": TEXT,
    "user-code": TEXT,
    "trust-remote-code": (bool,),
    OWN_MACHINE: (bool,),
}
"""Every key of a node's config, and its types."""
WHERE = "Fix this node's own config, --node-config of flower-supernode."


def check_node_config(given: Mapping[str, object]) -> None:
    """Nothing, where a node's own config has known keys of their types only.

    Raises:
        ConfigError: it has others; names them all.
    """
    if problems := [*_problems(given)]:
        raise ConfigError(problems, WHERE)


def _problems(given: Mapping[str, object]) -> Iterator[str]:
    for key, value in given.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key.replace("_", "-"), KEYS, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f": there are {', '.join(KEYS)}"
            yield f"node config, {key[:80]}: no such key{hint}"
        elif type(value) not in KEYS[key]:
            must = " or ".join(t.__name__ for t in KEYS[key])
            yield f"node config, {key} = {str(value)[:80]!r}: must be {must}"
        elif isinstance(value, int | float) and not 0 <= value < 2**63:
            yield f"node config, {key} = {value}: must be 0 or more"


def check_from_server(config: Config, given: Mapping[str, object]) -> None:
    """Nothing, where what a server's config asks may be done here. On the user's own machine, all.

    Raises:
        ConfigError: it is for this node's operator to allow, or leaves the node's directories.
    """
    if is_own_machine(given):
        return
    problems = []
    if config.model.trust_remote_code and not given.get("trust-remote-code"):
        problems.append(
            "model.trust-remote-code = true: this node runs no code that comes with a model; its "
            "operator may allow it, trust-remote-code=true in its own node config"
        )
    if not is_path_name(config.run.name):
        problems.append(
            "run.name: must be letters, digits, -, _ and . (128 at most, the first no dot) where "
            "nodes are other machines"
        )
    if problems:
        raise ConfigError.public(problems)
