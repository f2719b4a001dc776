"""A deployment's container files, for real: `make containers`.

    python tests/support/containers.py
                   make a Debian base, a wheel and the image; start superlink, superexec and gate,
                   have the nodes registered, start two nodes with their workers, and run two rounds
                   to the bytes of LocalGrid: each container read-only, as another user, without
                   any capability
    --base IMAGE   another base that the storage has: any with Python and venv
    --volume A:B   mounted while the image is made, such as a package registry's settings
    --storage DIR  where images are kept; default: a directory that is removed at the end

Needs root, buildah, podman, runc, and debootstrap where no base is given. On the host's network:
bridges and limits of control groups are not tried.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fedlora.launch.deploy.containers import IMAGE, STRANGER  # noqa: E402
from fedlora.launch.deploy.plan import Plan  # noqa: E402

BASE = "localhost/fedlora-base"
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(*words: str, **options: Any) -> str:
    """What a command prints; its errors too where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{shlex.join(words)[:300]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


class Engine:
    """buildah and podman on one storage."""

    def __init__(self, storage: Path, volumes: Sequence[str]) -> None:
        self.where = ["--root", str(storage / "images"), "--runroot", str(storage / "run")]
        self.where += ["--storage-driver", "vfs"]
        self.volumes = [word for volume in volumes for word in ("-v", volume)]

    def make_base(self, place: Path) -> None:
        """Debian's smallest, with Python."""
        tree = place / "debian"
        include = "--include=python3,python3-venv,ca-certificates"
        run("debootstrap", "--variant=minbase", include, "bookworm", str(tree))
        found = run("buildah", *self.where, "from", "scratch").strip()
        run("buildah", *self.where, "copy", "-q", found, str(tree), "/")
        run("buildah", *self.where, "commit", "-q", "--rm", "--format", "docker", found, BASE)
        shutil.rmtree(tree)

    def build(self, image: Path, base: str) -> None:
        how = ["--isolation", "chroot", "--format", "docker", "--build-arg", f"BASE={base}"]
        run("buildah", *self.where, "bud", *how, *self.volumes, "-t", IMAGE, str(image))

    def start(self, directory: Path, name: str, service: Mapping[str, Any], *command: str) -> str:
        """A service of the compose file; in the background, but where a command is given."""
        words = ["podman", *self.where, "--runtime", "runc", "run", "--name", name, "--replace"]
        words += ["--network", "host", *LIMITS, "--user", service["user"]]
        words += ["--read-only"] if service["read_only"] else []
        words += [f"--cap-drop={c}" for c in service["cap_drop"]]
        words += [w for o in service["security_opt"] for w in ("--security-opt", o)]
        words += [w for t in service["tmpfs"] for w in ("--tmpfs", t)]
        for volume in service["volumes"]:
            source, _, rest = volume.partition(":")
            at = str((directory / source).resolve()) if source.startswith(".") else source
            words += ["-v", f"{at}:{rest}"]
        here = {**service["environment"]}
        if "FEDLORA_SUPERLINK" in here:  # on the host's network there are no names of services
            here["FEDLORA_SUPERLINK"] = f"127.0.0.1:{here['FEDLORA_SUPERLINK'].split(':')[1]}"
        words += [w for key, value in here.items() for w in ("-e", f"{key}={value}")]
        words += ["-w", service["working_dir"], *([] if command else ["-d"]), IMAGE]
        return run(*words, *(command or service["command"]))

    def logs(self, name: str) -> str:
        found = subprocess.run(
            ["podman", *self.where, "logs", "--tail", "30", name],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return found.stdout + found.stderr

    def stop(self, names: Sequence[str]) -> None:
        subprocess.run(
            ["podman", *self.where, "--runtime", "runc", "rm", "-f", "-t", "2", *names],
            capture_output=True, check=False,
        )  # fmt: skip


def deployment(place: Path) -> Plan:
    """Two nodes with a tiny model and rows of their own, owned by another user."""
    from tests.conftest import tiny_settings, write_tiny
    from tests.support.deployment import prepared

    tiny = place / "tiny"
    tiny.mkdir()
    changes = {"run.rounds": 2, "evaluate.clients": False}
    given = tiny_settings(write_tiny(tiny), place, "float32", "bert", **changes)
    plan = prepared(place / "dep", given, 2)
    for path in (place, *place.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    return plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="")
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--storage", type=Path)
    asked = parser.parse_args()
    needed = ["buildah", "podman", "runc", *([] if asked.base else ["debootstrap"])]
    if lacking := [name for name in needed if not shutil.which(name)]:
        sys.exit(f"not installed: {', '.join(lacking)}")
    if os.getuid():
        sys.exit("must be root: it makes files of another user")
    with tempfile.TemporaryDirectory(prefix="fedlora-containers-") as temporary:
        place = Path(temporary)
        place.chmod(0o755)
        engine = Engine(asked.storage or place / "storage", asked.volume)
        base = asked.base or BASE
        if not asked.base:
            say("a Debian base")
            engine.make_base(place)
        (place / "all").mkdir()
        plan = deployment(place / "all")
        say("a wheel, and the image of it")
        image = plan.directory / "image"
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(image), str(ROOT))
        engine.build(image, base)
        return tried(engine, plan, place)


def tried(engine: Engine, plan: Plan, place: Path) -> int:
    """Two rounds in containers, beside LocalGrid's."""
    from tests.support.deployment import adapter, rounds, simulated

    text = (plan.directory / "compose.yaml").read_text()
    services = json.loads(text[text.index("{\n") :])["services"]
    first = ["superlink", "superexec", "gate"]
    others = [name for name in services if name.startswith(("node-", "worker-"))]
    names = {name: f"fedlora-{os.getpid()}-{name}" for name in services}
    try:
        for name in first:
            engine.start(plan.directory, names[name], services[name])
            say(f"{name} is started")
        registering = services["register"]
        said = engine.start(plan.directory, names["register"], registering, *registering["command"])
        say(said.strip())
        for name in others:
            engine.start(plan.directory, names[name], services[name])
        say(f"{', '.join(others)} are started")
        command = ["flwr", "run", str(plan.app), "fedlora", "--format", "json"]
        engine.start(plan.directory, names["operator"], services["operator"], *command)
        results = plan.server / "runs"
        until = time.monotonic() + 600
        while not list(results.glob("*/summary.json")):
            if time.monotonic() > until:
                for name in names.values():
                    print(f"-- {name}\n{engine.logs(name)}")
                return 1
            time.sleep(2)
        done = next(results.glob("*/summary.json")).parent
        say(f"{len(rounds(done))} rounds are on record")
        same = adapter(done) == adapter(simulated(plan, place / "local"))
        say(f"the adapter is {'' if same else 'NOT '}LocalGrid's to the byte")
        return 0 if same else 1
    finally:
        engine.stop(list(names.values())[::-1])


if __name__ == "__main__":
    sys.exit(main())
