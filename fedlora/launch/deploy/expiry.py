"""Certificates that end soon: said from 30 days before, with the command that renews.

A node looks at its server's certificate as the connection shows it, once a day; it trusts the
authority alone, so a renewed one needs nothing of it.
"""

import ssl
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from fedlora.launch.deploy.plan import Plan

SOON = timedelta(days=30)
ANEW = "nodes trust no other, so a new deployment is due: `fedlora deploy init`"
DAY = 86_400.0
"""Seconds between two looks of a node."""


def warnings(plan: Plan) -> Iterator[str]:
    """A sentence for each certificate of this deployment that ends within SOON, or has ended."""
    if not plan.secure:
        return
    again = f"`fedlora deploy renew {plan.quoted}` makes another, which the SuperLink takes when "
    again += f"it starts: `fedlora deploy down {plan.quoted}`, then `up`, between runs"
    if (pem := plan.server / "server.pem").exists():
        yield from ends_soon("the server's certificate", pem.read_bytes(), again)
    if (ca := plan.server / "ca.crt").exists():
        yield from ends_soon("the authority's certificate", ca.read_bytes(), ANEW)


def ends_soon(what: str, pem: bytes, remedy: str) -> Iterator[str]:
    """One sentence, or none where it is valid for longer than SOON."""
    end = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    left = end - datetime.now(UTC)
    if left < SOON:
        when = f"ends in {left.days} days" if left > timedelta() else "has ended"
        yield f"warning: {what} {when}, on {end:%Y-%m-%d}: {remedy}"


def of_server(address: str, authority: Path) -> Iterator[str]:
    """What a node has to say of the certificate that its server shows, and of its authority's.

    Nothing of a server that is not reached: the SuperNode says that itself.
    """
    yield from ends_soon(f"{authority}, the authority's,", authority.read_bytes(), ANEW)
    ask = "its operator renews it with `fedlora deploy renew`; nothing is to be done here"
    host, _, port = address.rpartition(":")
    try:
        shown = ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=10.0)
    except (OSError, ValueError):
        return
    yield from ends_soon(f"the certificate of {address}", shown.encode(), ask)


def keep_warning(address: str, authority: Path) -> threading.Event:
    """Have a thread of its own say `of_server` now and every day, until the event is set."""
    over = threading.Event()

    def look() -> None:
        while True:
            for line in of_server(address, authority):
                print(line, file=sys.stderr, flush=True)
            if over.wait(DAY):
                return

    threading.Thread(target=look, name="fedlora-expiry", daemon=True).start()
    return over
