"""A SuperNode that ends when it is lost, so that its supervisor starts it again.

    python -m fedlora.launch.deploy.node ...        the arguments of flower-supernode

Flower retries whatever the network does, but takes a TLS handshake that is cut off for a wrong
certificate: it gives up, signs off, and its main thread returns; the thread that serves its
ClientApps keeps the process alive, connected to nothing, for ever. A SuperLink that dies in
mid-handshake does that, or a load balancer whose backend is gone.
"""

import os
import sys
import traceback
from importlib.metadata import entry_points

LOST = 74
"""Exit status of a node that gave up on its server."""


def main() -> None:
    """Run flower-supernode; end the process where it returns, or fails."""
    (found,) = entry_points(group="console_scripts", name="flower-supernode")
    try:
        found.load()()
    except SystemExit:  # Flower has seen to its threads
        raise
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(LOST)


if __name__ == "__main__":
    main()
