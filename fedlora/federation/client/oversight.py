"""A message under the node's own policy: what is checked and put on record around its handler.

    with overseen(kind, message, context) as leave:
        content = handler(message, context)
        leave(content)

Where a node names no policy, as in a simulation, nothing happens here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict

from fedlora.config.policy import Policy
from fedlora.errors import PolicyError, WireError
from fedlora.federation.client import audit
from fedlora.federation.client.admit import check_message
from fedlora.federation.client.limits import check_upload, watched
from fedlora.federation.wire.job import job_of
from fedlora.federation.wire.messages import count_bytes
from fedlora.federation.wire.replies import REPLIES

Leave = Callable[[RecordDict], None]


@contextmanager
def overseen(kind: str, message: Message, context: Context) -> Iterator[Leave]:
    """A context for the work on a message; what it is given has to be asked to leave.

    Raises:
        PolicyError: the policy is against it, before its work, within it or at its end.
    """
    node = context.node_config
    policy = Policy.of(node)
    if policy is None:
        yield lambda _: None
        return
    about = {"kind": kind, "run": str(context.run_id), **_round(message)}
    try:
        found = audit.digest(Path(str(node["policy"])))
        audit.put(policy, "asked", **about, policy=found)
        check_message(policy, kind, datetime.now())
        with watched(policy.limits):
            yield lambda content: _leave(policy, about, content)
    except Exception as e:
        audit.refusal(policy, e, **about)
        raise


def _leave(policy: Policy, about: Mapping[str, Any], content: RecordDict) -> None:
    """Put on record what is to leave.

    Raises:
        PolicyError: it is too large, or of a kind that no reply to such a message has.
        OSError: it cannot be put on record; then it does not leave.
    """
    names = [*content]
    if strange := [name for name in names if name not in REPLIES[about["kind"]]]:
        raise PolicyError(f"the reply has records that such a reply has not: {len(strange)}")
    size = count_bytes(content)
    check_upload(policy.limits, size)
    metrics = content.get("metrics")
    told = dict(metrics) if isinstance(metrics, MetricRecord) else {}
    spent = {"epsilon": told["privacy.epsilon"]} if "privacy.epsilon" in told else {}
    numbers = {"metrics": sorted(told)} if told else {}
    audit.put(policy, "left", **about, bytes=size, records=names, **numbers, **spent)


def _round(message: Message) -> dict[str, int]:
    if not message.has_content() or "job" not in message.content:
        return {}
    try:
        job = job_of(message.content)
    except WireError:
        return {}
    return {"round": job.round, "client": job.client}
