"""Is a node the machine of the run's own user, as in a simulation?

Then its errors may be told whole, and what the run's config trusts is its user's to trust. Only the
node's own side can say so: its node config, or its environment.
"""

import os
from collections.abc import Mapping

SIMULATED = "FEDLORA_SIMULATED"
"""Set for the processes of Flower's engine: all their clients are this machine."""
OWN_MACHINE = "own-machine"
"""The key of a node config that says the same: `LocalGrid` sets it."""


def is_own_machine(node_config: Mapping[str, object]) -> bool:
    """Does the node with this config run on the machine of the run's own user?"""
    return node_config.get(OWN_MACHINE) is True or bool(os.environ.get(SIMULATED))
