"""A node's own config: what its operator says of it, and what a server cannot.

    flower-supernode --node-config 'partition-id=0 policy="/etc/fedlora/node.toml"'
    flower-supernode --node-config 'rank=8 data-path="/data" memory="/var/lib/fedlora"'

With a policy (fedlora/config/policy.py) all but a few keys are said there, and there alone. Without
one these keys are all that a node holds against a server's config: enough for a trial.

A key that is none, or of another type, is an error before any message is answered: a limit that is
misspelt would else be no limit.
"""

import difflib
from collections.abc import Iterator, Mapping

from fedlora.config.possible import is_path_name
from fedlora.config.privacy_sections import PrivacyConfig
from fedlora.config.reader import Config
from fedlora.config.sites import COLUMNS
from fedlora.errors import ConfigError, NodeFileError
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
    "adapter": TEXT,
    "devices": TEXT,
    "max-epsilon": NUMBER,
    "delta": NUMBER,
    "secure-aggregation": (bool,),
    "worker-socket": TEXT,
    "policy": TEXT,
    "user-code": TEXT,
    "trust-remote-code": (bool,),
    OWN_MACHINE: (bool,),
}
"""Every key of a node's config, and its types."""
BESIDE = ("partition-id", "num-partitions", "worker-socket", "policy", OWN_MACHINE)
"""What a node with a policy says beside it."""
WHERE = "Fix this node's own config, --node-config of flower-supernode."


def check_node_config(given: Mapping[str, object]) -> None:
    """Nothing, where a node's own config has known keys of their types only.

    Raises:
        NodeFileError: it has others; names them all.
    """
    if problems := [*_problems(given)]:
        raise NodeFileError(problems, WHERE)


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
        elif given.get("policy") and key not in BESIDE:
            yield f"node config, {key}: say it in the policy, {given['policy']}, and there alone"
    if given.get("policy") and given.get(OWN_MACHINE):
        yield f"node config, {OWN_MACHINE} = true: a node with a policy is no run's user's machine"


def own_delta(given: Mapping[str, object]) -> float | None:
    """At which a node without a policy counts epsilon; on the user's own machine as the run says.

    Never a server's: with a delta near 1 any number of rounds would cost nothing.
    """
    if said := given.get("delta"):
        return float(said)  # type: ignore[arg-type]
    return None if is_own_machine(given) else PrivacyConfig().delta


def check_from_server(config: Config, given: Mapping[str, object]) -> None:
    """Nothing, where what a server's config asks may be done here. On the user's own machine, all.

    For a node without a policy: what can be refused without knowing what its operator wants.

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
    if config.model.adapter and not given.get("adapter"):
        problems.append(
            "model.adapter: is a directory of the server's; this node's operator names its own "
            "copy, adapter in its own node config, or model.adapters in its policy"
        )
    for key, value in (
        ("privacy.ledger", config.privacy.ledger),
        ("data.node-path", config.data.node_path),
    ):
        if value:
            problems.append(
                f"{key}: is set for all nodes at once; it is for each node's operator to say, in "
                "its own node config or policy"
            )
    if config.output.client_memory and not given.get("memory"):
        problems.append("output.client-memory: a node's own config names its memory, not a run")
    if config.privacy.by_example and not given.get("memory"):
        problems.append(
            "privacy.level: this node's own config names no memory, in which its privacy ledger "
            "would outlive a run's name; its operator sets memory there, or writes a policy"
        )
    if not is_path_name(config.run.name):
        problems.append(
            "run.name: must be letters, digits, -, _ and . (128 at most, the first no dot) where "
            "nodes are other machines"
        )
    if problems:
        raise ConfigError.public(problems)
