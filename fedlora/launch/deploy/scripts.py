"""The start script of every process, and the systemd and nginx files around them.

A script is the one place where a command stands: `up`, systemd and compose all run the scripts.
Each stands in the directory that goes to its machine and names everything relative to it.
"""

from fedlora.launch.deploy.plan import Plan
from fedlora.launch.server_record import PLACE

ENVIRONMENT = """\
# Sourced by the scripts beside it.
umask 077
export FLWR_HOME="$PWD/home"
export FLWR_TELEMETRY_ENABLED=0
export FLWR_DISABLE_UPDATE_CHECK=1
# Without it Flower resolves torch anew for every run.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2
export TOKENIZERS_PARALLELISM=false
"""


DATABASE = "state.db"
"""The SuperLink's, in the server's directory."""
SERVERAPPS = "serverapps"
"""Where ServerApps keep their records, in the server's directory: launch/server_record.py."""


def _script(about: str, command: str, before: str = "") -> str:
    head = f'#!/bin/sh\n# {about}\nset -eu\ncd "$(dirname "$0")"\n. ./env.sh\n{before}'
    return f"{head}exec {command}\n"


def superlink(plan: Plan) -> str:
    keys = "--ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key"
    trust = f"{keys} --enable-supernode-auth" if plan.secure else "--insecure"
    return _script(
        "The SuperLink. On loopback: whoever reaches its Control API can run code on this machine.",
        f"flower-superlink {trust} --host 127.0.0.1 --port {plan.port} \\\n"
        f"  --isolation process --database {DATABASE} --disable-runtime-dependency-installation",
    )


def superexec(plan: Plan) -> str:
    trust = "--root-certificates ca.crt" if plan.secure else "--insecure"
    return _script(
        "Starts the ServerApp of each run. Apart from the SuperLink, so that a run outlives it.",
        f"flower-superexec {trust} --runtime-api-address 127.0.0.1:{plan.port}",
        f'export {PLACE}="$PWD/{SERVERAPPS}"\n',
    )


def gate(plan: Plan) -> str:
    keys = " --ca ca.crt --certificate server.pem --key server.key" if plan.secure else ""
    return _script(
        "What nodes of other machines connect to: only /v1/fleet/* passes. Or use nginx.conf.",
        f"python -m fedlora.launch.deploy.gate --listen 0.0.0.0:{plan.gate_port} \\\n"
        f"  --upstream 127.0.0.1:{plan.port}{keys}",
    )


def node(plan: Plan, i: int) -> str:
    """A SuperNode with its own key and policy."""
    trust = "--insecure"
    if plan.secure:
        trust = "--root-certificates ca.crt --auth-supernode-private-key node.key"
    config = [
        f"partition-id={i} num-partitions={plan.clients}",
        'policy=\\"$PWD/node.toml\\"',
    ]
    if plan.warm:
        config.append('worker-socket=\\"worker.sock\\"')
    return _script(
        f"Node {i}. FEDLORA_SUPERLINK overrides where the server is.",
        f"python -m fedlora.launch.deploy.node {trust} \\\n"
        f'  --superlink "${{FEDLORA_SUPERLINK:-{plan.fleet_address}}}" \\\n'
        f"  --host 127.0.0.1 --port {plan.node_ports[i]} \\\n"
        f'  --node-config "{" ".join(config)}"',
    )


def worker(i: int) -> str:
    return _script(
        f"Holds node {i}'s model and data between messages. Optional: else the node is slow.\n"
        "# It takes --idle-release SECONDS (give a card's memory back) and --metrics-port PORT.",
        "python -m fedlora.launch.deploy.worker --socket worker.sock",
    )


NODES_OWN = (
    "node.key", "member.key", "node.toml", "members.toml", "ca.crt", "env.sh", "node.sh",
    "worker.sh",
)  # fmt: skip
"""What no process of a node has to write: its keys, and what its operator allows."""


WATCHDOG = """\
# It says from its own loop that it lives (deploy/notify.py); one that hangs is killed after this.
Type=notify
TimeoutStartSec=infinity
WatchdogSec=40
"""
HARDENING = """\
# An accelerator's devices and compilers stay usable: no PrivateDevices, ProtectClock (which closes
# the other devices too) or MemoryDenyWriteExecute. Models and data may lie in a home directory.
NoNewPrivileges=yes
UMask=0077
CapabilityBoundingSet=
AmbientCapabilities=
PrivateMounts=yes
PrivateTmp=yes
ProtectControlGroups=yes
ProtectHome=read-only
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
LockPersonality=yes
RemoveIPC=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
"""


def unit(
    about: str,
    directory: str,
    script: str,
    seconds: int,
    fixed: tuple[str, ...] = (),
    speaks: bool = True,
) -> str:
    """A systemd unit for a script whose directory was copied to /opt/fedlora/<directory>.

    fixed: files there that the process cannot write ("-" in the unit: where they exist).
    speaks: does it tell systemd that it lives?
    """
    own = "".join(f"ReadOnlyPaths=-/opt/fedlora/{directory}/{name}\n" for name in fixed)
    return f"""\
[Unit]
Description={about}
After=network-online.target
Wants=network-online.target

[Service]
User=fedlora
WorkingDirectory=/opt/fedlora/{directory}
Environment=PATH=/opt/fedlora/venv/bin:/usr/bin:/bin
ExecStart=/bin/sh /opt/fedlora/{directory}/{script}
{WATCHDOG if speaks else ""}Restart=always
# A killed node counts as connected for 60 s and is refused until then.
RestartSec={seconds}
KillMode=control-group
{HARDENING}ReadWritePaths=/opt/fedlora/{directory}
{own}
[Install]
WantedBy=multi-user.target
"""


def nginx(plan: Plan) -> str:
    """The gate's job done by nginx: `nginx -p DIR -c nginx.conf`, DIR the server's directory."""
    tls, scheme, verify = "", "http", ""
    if plan.secure:
        tls = (
            " ssl;\n    ssl_certificate     server.pem;\n"
            "    ssl_certificate_key server.key;\n"
            "    ssl_protocols       TLSv1.2 TLSv1.3"
        )
        scheme = "https"
        verify = (
            "      proxy_ssl_trusted_certificate ca.crt;\n"
            "      proxy_ssl_verify on;\n      proxy_ssl_name localhost;\n"
        )
    return f"""\
# Nodes get /v1/fleet/* and nothing else. Control stays on the server's loopback: open-source
# Flower has no user accounts, so whoever reaches Control can run code on the server.
# Every name below is relative to this file's directory: nginx -p "$PWD" -c nginx.conf
pid nginx.pid;
error_log nginx.log;
events {{}}
http {{
  access_log nginx-access.log;
  client_body_temp_path nginx-body;
  proxy_temp_path nginx-proxy;
  limit_req_zone $binary_remote_addr zone=fleet:10m rate=50r/s;
  limit_conn_zone $binary_remote_addr zone=held:10m;
  server {{
    listen {plan.gate_port or 9443}{tls};
    client_max_body_size 64m;       # Flower sends objects in pieces of 5 MiB
    client_header_timeout 30s;
    client_body_timeout 60s;
    send_timeout 60s;
    limit_conn held 256;            # of one address
    # A path is passed on as it came, so one that nginx would read otherwise is refused.
    if ($request_uri ~ "^[^?]*(\\.\\.|%|//)") {{ return 403; }}
    location /v1/fleet/ {{
      limit_req zone=fleet burst=200;
      proxy_pass {scheme}://127.0.0.1:{plan.port};
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_request_buffering off;
{verify}    }}
    location = /v1/fleet {{ return 403; }}
    location / {{ return 403; }}
  }}
}}
"""
