"""What became of every row that the run would read, and how long the texts are."""

from collections.abc import Iterator

from fedlora.config.reader import Config
from fedlora.launch.doctor.finding import Finding
from fedlora.training import cache
from fedlora.training.data.corpus import Corpus
from fedlora.training.model.model import Model


def rows_read(config: Config, corpus: Corpus) -> Iterator[Finding]:
    """What there is; and clients of a simulation with nothing to train on, which would end it."""
    rows = sum(len(c.train) for c in corpus.clients)
    yield Finding(
        "ok",
        f"data: {rows} training rows on {len(corpus.clients)} clients, "
        f"{len(corpus.test)} central test rows"
        + (f", {len(corpus.labels)} labels" if corpus.labels else ""),
    )
    yield from (Finding("ok", f"rows: {line}") for line in corpus.account.lines())
    yield from (Finding("note", warning) for warning in corpus.account.warnings())
    if config.data.node_path or not any(len(c.train) for c in corpus.clients):
        return
    bare = [str(i) for i, c in enumerate(corpus.clients) if not len(c.train)]
    if bare:
        yield Finding(
            "problem",
            f"clients {', '.join(bare[:5])}{' and more' if len(bare) > 5 else ''} have no rows to "
            "train on",
            "lower clients.count or data.client-test-fraction, or raise data.alpha",
        )


def lengths(config: Config, corpus: Corpus, model: Model) -> Iterator[Finding]:
    """Which texts are cut, and which rows have too long a prompt: of all rows that are here."""
    longest = model.longest(config.data.max_length)
    parts = [("central", -1, len(corpus.test))] if len(corpus.test) else []
    for i, client in enumerate(corpus.clients):
        parts += [("train", i, len(client.train)), ("test", i, len(client.test))]
    full = left = rows = 0
    for part, i, size in parts:
        found = cache.encoded(part, i, config, corpus.labels)
        full += int((found.lengths >= longest).sum())
        left += size - len(found)
        rows += size
    if full:
        text = (
            f"{full} of {rows} rows fill data.max-length = {longest} tokens: what is longer is cut"
        )
        yield Finding("note", text, "raise data.max-length, or split long texts into rows")
    if left:
        text = f"{left} of {rows} rows have a prompt of {longest} tokens or more and are left out"
        yield Finding("note", text, "raise data.max-length")
