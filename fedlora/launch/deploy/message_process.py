"""The process of one message at a node: the installed fedlora answers, never the server's bundle.

    python -P -m fedlora.launch.deploy.message_process --runtime-api-address 127.0.0.1:9094 \\
        --parent-pid 17            and the task's token on standard input

In the place of `flwr-clientapp`, which unpacks the bundle and imports its ClientApp. Here it stays
bytes in memory; `bundle.check` compares it with the installed code, and what differs is an error
reply and a line of the node's log.
"""

import argparse
import os
import sys
import time
from contextlib import suppress

from flwr.app import Context, Message

from fedlora.errors import BundleError, ConfigError
from fedlora.federation.client.dispatch import failed
from fedlora.federation.wire.codes import cleaned
from fedlora.launch.client_app import app
from fedlora.launch.deploy import flower_runtime
from fedlora.launch.deploy.bundle import check


def reply(message: Message, context: Context, bundle: bytes) -> Message:
    """The installed fedlora's reply, or an error reply that says why not. Never nothing."""
    try:
        check(bundle)
        return app(message, context)
    except Exception as e:
        if isinstance(e, BundleError):
            now = time.strftime("%Y-%m-%dT%H:%M:%S")
            said = f"{now} refused the app of run {context.run_id}: {cleaned(str(e))}"
            print(said, file=sys.stderr, flush=True)
            _put_on_record(e, message, context)
        return failed(e, message, context)


def _put_on_record(error: BundleError, message: Message, context: Context) -> None:
    """In the audit of a node with a policy, where that can be read."""
    from fedlora.config.policy import Policy
    from fedlora.federation.client import audit

    with suppress(ConfigError):
        if policy := Policy.of(context.node_config):
            kind = cleaned(message.metadata.message_type)
            audit.refusal(policy, error, kind=kind, run=str(context.run_id))


def main() -> None:
    """Answer the task whose token standard input holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime-api-address", required=True)
    parser.add_argument("--root-certificates", default="")
    parser.add_argument("--parent-pid", type=int, required=True)
    given = parser.parse_args()
    token = sys.stdin.readline().strip()
    client = flower_runtime.connected(given.runtime_api_address, given.root_certificates, token)
    try:
        with flower_runtime.alive(client, given.parent_pid):
            message, context, bundle = flower_runtime.received(client)
            flower_runtime.answered(client, reply(message, context, bundle), context)
    except KeyboardInterrupt:  # the run was stopped, or the node
        os._exit(130)
    sys.stdout.flush()
    os._exit(0)  # no library's threads are waited for


if __name__ == "__main__":
    main()
