"""What became of every row that the run would read, and how long the texts are."""

from collections import Counter
from collections.abc import Iterator

from fedlora.config.reader import Config
from fedlora.launch.doctor.finding import Finding
from fedlora.training import cache
from fedlora.training.data.account import SHOWN
from fedlora.training.data.corpus import Corpus
from fedlora.training.model.model import Model


def rows_read(config: Config, corpus: Corpus) -> Iterator[Finding]:
    """What there is; and clients of a simulation with nothing to train on, which would end it."""
    rows = sum(len(c.train) for c in corpus.clients)
    yield Finding(
        "ok",
        f"data: {rows} training rows on {len(corpus.clients)} clients, "
        f"{len(corpus.test)} central test rows"
        + (f", {len(corpus.validation)} to validate" if len(corpus.validation) else "")
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
    parts = [("central", -1, corpus.test.number)] if len(corpus.test) else []
    if len(corpus.validation):
        parts.append(("central validation", -1, corpus.validation.number))
    for i, client in enumerate(corpus.clients):
        names = ("train", "test", "validation")  # of the last only where there is any
        parts += [(name, i, p.number) for name, p in zip(names, client.parts, strict=False)]
    full = rows = several = examples = 0
    left: list[int] = []
    for part, i, numbers in parts:
        found = cache.encoded(part, i, config, corpus.labels)
        full += int((found.widths >= longest).sum())
        kept = Counter(found.rows.tolist())
        several += sum(n > 1 for n in kept.values())
        examples += len(found)
        left += [n for at, n in enumerate(numbers) if at not in kept]
        rows += len(numbers)
    if several:
        text = f"{several} of {rows} rows are longer than data.max-length = {longest} tokens: "
        yield Finding("ok", f"{text}{examples} windows are the examples (data.long-texts)")
    elif full:
        text = (
            f"{full} of {rows} rows fill data.max-length = {longest} tokens: what is longer is cut"
        )
        yield Finding("note", text, "raise data.max-length, or split long texts into rows")
    if left:
        places = ", ".join(corpus.book.place(n) for n in sorted(left)[:SHOWN])
        text = (
            f"{len(left)} of {rows} rows make no example, for the reasons that the log counts: "
            f"{places}{', ...' * (len(left) > SHOWN)}"
        )
        yield Finding("note", text, "raise data.max-length, or mend these rows")


def unanswerable(config: Config, corpus: Corpus, model: Model) -> Iterator[Finding]:
    """Central test rows whose response is longer than evaluate.generate-tokens lets an answer be.

    Of conversations the last turn alone is answered: those are told as they are scored.
    """
    asked, task = config.evaluate.generate_tokens, model.task
    if not task.answers or asked < 1 or not config.data.prompt or not len(corpus.test):
        return
    found = task.scored(cache.encoded("central", -1, config, corpus.labels))
    if over := int((found > asked + 1).sum()):  # the end mark need not be written
        text = f"{over} of {len(found)} responses are longer than evaluate.generate-tokens = "
        hint = "set it to -1: as many tokens as the longest response has"
        yield Finding("note", f"{text}{asked}: no answer can match them", hint)


def claims(config: Config, corpus: Corpus) -> Iterator[Finding]:
    """Clients whose updates would be refused, since they train on more examples than any may."""
    here = [i for i, client in enumerate(corpus.clients) if len(client.train)]
    if config.data.node_path or config.privacy.by_client or config.secure.aggregation or not here:
        return
    most = config.round.max_examples
    sizes = {i: len(cache.encoded("train", i, config, corpus.labels)) for i in here}
    if over := [i for i in here if sizes[i] > most]:
        text = (
            f"{len(over)} of {len(here)} clients, such as {over[0]} with {sizes[over[0]]}, train "
            f"on more examples than round.max-examples = {most}: their updates are refused"
        )
        yield Finding("problem" if len(over) == len(here) else "note", text, "raise it")
