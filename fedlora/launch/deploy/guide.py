"""The README of a deployment's directory."""

from fedlora.launch.deploy.keys import expiry
from fedlora.launch.deploy.plan import Plan

TEXT = """\
# A fedlora deployment: one server, {clients} nodes

{until}
`fedlora` must be installed, in one version, on every machine.

## All on this host

    fedlora deploy up {directory}        # start everything, restart what dies
    fedlora deploy status {directory}    # who is there
    fedlora deploy run {directory}       # run the experiment, follow its rounds
    fedlora deploy logs {directory} node-0
    fedlora deploy down {directory}

Results are in `server/runs/`. Change the experiment in `app/pyproject.toml` or with `--set`.

## In containers on this host

    pip wheel --no-deps -w image PATH-OF-A-CHECKOUT     # a wheel of fedlora beside the recipe
    docker build -t localhost/fedlora --build-arg BASE=python:3.11-slim image
    docker compose up -d
    docker compose run --rm operator flwr run {directory}/app fedlora --stream

## On real machines

Make the directory with the server's name or address: `fedlora deploy init DIR --clients 2 --host
server.example.org`. Then copy `server/` to the server as /opt/fedlora/server, and each
`nodes/node-<i>/` to its machine as /opt/fedlora/node-<i>. `ca/` and `operator/` stay with you.

{keys}

On the server (the authority's key is not needed there):

    sh /opt/fedlora/server/superlink.sh
    sh /opt/fedlora/server/superexec.sh
    sh /opt/fedlora/server/gate.sh         # open this port only; or, in its place,
    nginx -p /opt/fedlora/server -c nginx.conf

From your machine, over `ssh -L {port}:127.0.0.1:{port} server`, since Control is on the
server's loopback and nowhere else:

    export FLWR_HOME={directory}/operator
    flwr supernode register node.pub fedlora --name node-0    # once a node, the one it sent you
    flwr run {directory}/app fedlora --stream
    flwr list fedlora --format json        # the run's status; `flwr run` exits 0 either way

On node 0's machine:

    sh /opt/fedlora/node-0/worker.sh       # keeps the model in memory between messages
    sh /opt/fedlora/node-0/node.sh

Or as services, which run as a user `fedlora` that owns these directories, with the programs of
/opt/fedlora/venv: copy the `.service` file of each directory to /etc/systemd/system and
`systemctl enable --now` it. The units restart what ends; a node waits 65 s, since the server
counts a killed node as connected for 60.

Put the node's own rows in its `data/`: `train.jsonl`, and `test.jsonl` for its own evaluation. Its
`node.toml` says what it allows, whatever the server asks, and is its operator's to change;
`fedlora node check node.toml run.toml` says what of a run it would refuse, `fedlora node audit
node.toml` what was asked and what left; `fedlora node rotate node.toml` makes it a new key.

## Who can do what

- A node that has no registered key is refused, and so is a server the node's `ca.crt` did not sign.
- The SuperLink serves Fleet (nodes) and Control (you) on one port, and open-source Flower has no
  user accounts: whoever reaches Control can run code on the server, and ask every node to train.
  That is why it listens on loopback, and why the gate lets only /v1/fleet/* pass.
- A node runs the fedlora that its operator installed, and never the app that the server sends: it
  refuses an app whose code is another. Code of your own goes into `app/` for the server, and the
  same file into each node's directory by its operator; `trust.code` in `node.toml` names what of
  it a run may use.
"""


HERE = """\
**The keys of all nodes were made here, with --one-host-trial**, and you could be each of them:
secure aggregation then holds against an honest but curious operator alone."""
THERE = """\
Each node makes its keys itself, and only the public halves leave it. On node 0's machine:

    fedlora node init /opt/fedlora/node-0/node.toml       # node.key, member.key; sends nothing
    fedlora node members add /opt/fedlora/node-0/node.toml 1 node-1-member.pub    # its own as 0

`node.pub` goes to you, who register it. `member.pub` goes to the operators of the other nodes, by a
way that the server has no hand in: a node believes no signature in a secure aggregation but of the
keys on its list."""


def readme(plan: Plan) -> str:
    """The text, with this deployment's paths and ports."""
    until = "**Plaintext, since it was made with --insecure: for trials on one host only.**\n"
    if plan.secure:
        day = f"{expiry(plan.server / 'server.pem'):%Y-%m-%d}"
        until = (
            f"The server's certificate ends on {day}; `fedlora deploy renew DIR` makes another.\n"
        )
    made = {"directory": plan.quoted, "port": plan.port, "keys": HERE if plan.keys_here else THERE}
    return TEXT.format(clients=plan.clients, until=until, **made)
