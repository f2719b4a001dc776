"""A server that lies, and clients that help it: it sends real messages to the real ClientApp.

    told = Recorded.of(settings)             an honest round, and the messages that began it
    server = LyingServer(told, colluders)    another start of that server
    server.setup(); server.share(...); server.collect(...); server.agree(...); server.unmask(...)

What honest clients train is what they trained in the honest round: the rest of a reply is theirs.
Of a client that helps it, the server has the disk: it plays a stage twice by putting back what the
client kept before it.
"""

import copy
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app.app import app as client_app
from fedlora.federation.client import handlers
from fedlora.federation.secure import masking, vector
from fedlora.federation.secure.agreement import Agreement
from fedlora.federation.secure.signing import RoundKeys
from tests.support.tiny_federation import federate

Words = masking.Words
STARTS = count(1)


@dataclass
class Recorded:
    """An honest round: what began it, what each client trained, and what it would have sent."""

    root: Path
    contexts: dict[int, Context] = field(default_factory=dict)
    first: dict[tuple[str, int], RecordDict] = field(default_factory=dict)
    trained: dict[int, Any] = field(default_factory=dict)
    vectors: dict[int, Words] = field(default_factory=dict)

    @classmethod
    def of(
        cls, settings: Mapping[str, object], nodes: Mapping[int, Mapping[str, object]] | None = None
    ) -> "Recorded":
        kept = cls(Path(str(settings["run.out"])))
        train, encode, now = handlers.trained, vector.encode, [0]

        def app(message: Message, context: Context) -> Message:
            now[0] = int(context.node_config["partition-id"])
            kept.contexts[now[0]] = context
            kind = message.metadata.message_type.removeprefix("train.secagg_")
            kept.first[kind, now[0]] = copy.deepcopy(message.content)
            return client_app(message, context)

        def trained(works: Any) -> Iterator[Any]:
            for work, done in train(works):
                kept.trained[work.job.client] = done
                yield work, done

        def encoded(*args: Any) -> Words:
            kept.vectors[now[0]] = found = encode(*args)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handlers, "trained", trained)
            patch.setattr(vector, "encode", encoded)
            federate(settings, app, nodes=nodes)
        return kept

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """A context in which clients send what they trained before."""

        def trained(works: Any) -> Iterator[Any]:
            yield from ((work, self.trained[work.job.client]) for work in works)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handlers, "trained", trained)
            yield


class Refused(Exception):  # noqa: N818  no error of the test
    """A client answered with an error."""


class LyingServer:
    def __init__(
        self, told: Recorded, colluders: Collection[int] = (), since: int | None = None
    ) -> None:
        """since: when it says that it began; 0: it does not say; by default when it began."""
        self.told, self.colluders = told, set(colluders)
        self.incarnation = f"lies-{next(STARTS)}"
        first = Agreement.read(str(told.first["setup", 0].config_records["secagg"]["agreement"]))
        self.since = first.name.since if since is None else since
        start = {"incarnation": self.incarnation, "since": self.since}
        self.agreement = replace(first, name=replace(first.name, **start))
        self.ids = sorted(first.table.kinds)
        self.keys: dict[int, RoundKeys] = {}
        self.job: dict[str, Mapping[str, Any]] = {}
        """By stage, what the job of its messages says otherwise."""
        self._kept: dict[int, Path] = {}

    # -- one message ----------------------------------------------------------------------------

    def ask(self, kind: str, i: int, **asked: Any) -> RecordDict:
        """A client's reply to a stage.

        Raises:
            Refused: it is an error.
        """
        content = copy.deepcopy(self.told.first[kind, i])
        start = {"incarnation": self.incarnation, "since": self.since}
        job = {**content.config_records["job"], **start, **self.job.get(kind, {})}
        if not self.since:
            del job["since"]
        content["job"], content["secagg"] = ConfigRecord(job), ConfigRecord(asked)
        message = Message(content, 1000 + i, f"train.secagg_{kind}", ttl=60.0)
        with self.told.as_trained():
            reply = client_app(message, self.told.contexts[i])
        if reply.has_error():
            raise Refused(reply.error.reason)
        return reply.content

    def answers(self, kind: str, i: int, **asked: Any) -> Mapping[str, Any]:
        return self.ask(kind, i, **asked).config_records["secagg"]

    # -- the stages, for those who are named ------------------------------------------------------

    def setup(self, told: Mapping[int, Agreement] | None = None) -> None:
        for i in self.ids:
            agreement = (told or {}).get(i, self.agreement)
            self.keys[i] = RoundKeys(
                *self.answers("setup", i, agreement=agreement.record())["keys"]
            )

    def share(self, among: Collection[int]) -> dict[int, dict[int, bytes]]:
        """By client, the boxes that came for it."""
        js = sorted(among)
        boxes = {}
        for i in js:
            keys = [key for j in js for key in self.keys[j]]
            said = self.answers("share", i, clients=js, keys=keys)
            boxes[i] = dict(zip(said["clients"], said["boxes"], strict=True))
        return {i: {j: boxes[j][i] for j in js if j != i} for i in js}

    def collect(self, came: Mapping[int, Mapping[int, bytes]]) -> dict[int, Words]:
        found = {}
        for i, boxes in came.items():
            reply = self.ask("collect", i, clients=[*boxes], boxes=[*boxes.values()])
            data = reply.array_records["masked"]["vector"].data
            found[i] = np.frombuffer(data, dtype="<u4")
        return found

    def agree(self, who: Collection[int], survivors: Collection[int]) -> dict[int, bytes]:
        told = sorted(survivors)
        return {i: self.answers("agree", i, survivors=told)["signature"] for i in sorted(who)}

    def unmask(
        self, who: Collection[int], signatures: Mapping[int, bytes]
    ) -> dict[int, list[bytes]]:
        """By client, the shares of one of its secrets."""
        found: dict[int, list[bytes]] = {}
        for i in sorted(who):
            said = self.answers(
                "unmask", i, clients=[*signatures], signatures=[*signatures.values()]
            )
            for j, share in zip(said["clients"], said["shares"], strict=True):
                found.setdefault(j, []).append(share)
        return found

    # -- what is made of them ---------------------------------------------------------------------

    def without_masks(self, total: Words, seeds: Mapping[int, list[bytes]]) -> Words:
        """A sum without the own masks, from shares of their seeds."""
        for pieces in seeds.values():
            total = total - masking.mask(masking.joined(pieces), len(total), 32)
        return np.asarray(total)

    def without_pairs(self, masked: Words, me: int, key: bytes, others: Collection[int]) -> Words:
        """One client's vector without the masks that it shares with others, from its own key."""
        total = masked.copy()
        for j in others:
            told = self.agreement.digest()
            shared = masking.pair_mask(key, self.keys[j].masks, told, len(total), 32)
            masking.cancel(total, j, me, shared)
        return total

    # -- clients that help it -------------------------------------------------------------------

    def _disk(self, i: int) -> Path:
        (found,) = self.told.root.rglob(f"client-{i}/secure")
        return found

    def keep(self) -> None:
        """Copy what each client that helps has on its disk now."""
        for i in self.colluders:
            place = self._disk(i).with_name(f"kept-{self.incarnation}")
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self._disk(i), place)
            self._kept[i] = place

    def put_back(self) -> None:
        for i, place in self._kept.items():
            disk = self._disk(i)
            shutil.rmtree(disk)
            shutil.copytree(place, disk)
