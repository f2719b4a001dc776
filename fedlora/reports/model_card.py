"""The README.md of an adapter or an export: what it is, how to load it, what was proved of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedlora.config.task_names import KINDS
from fedlora.reports import trust
from fedlora.reports.outcome import said
from fedlora.reports.run_files import RunFiles, certificates, excess
from fedlora.reports.tables import score
from fedlora.reports.units import count, tiny


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says that no file of the run does."""

    base: str
    """A hub id, a path, or "py:..."."""
    merged: bool
    labels: Sequence[str]
    load: str
    """Python that loads it, run in its own directory; it stands first, and is what was checked."""
    use: str
    checked: Sequence[str]
    """Sentences on how it was checked, and what that gave."""
    end: str = ""
    """The token that generation stops at."""
    client: int | None = None
    """Whose own model it is; None: the federation's."""


def card(run: RunFiles, facts: CardFacts) -> str:
    """The card as Markdown."""
    s = run.summary
    return "\n".join(
        [
            *_front(facts),
            f"# {s['name']}",
            "",
            *_what(run, facts),
            "",
            "## How to load it",
            "",
            "In this directory, with torch, transformers, PEFT and safetensors:"
            if not facts.merged
            else "In this directory, with torch, transformers and safetensors:",
            "",
            f"```python\n{facts.load}```",
            "",
            "and then, for example:",
            "",
            f"```python\n{facts.use}```",
            "",
            "## What was checked",
            "",
            *_bullets([*facts.checked, *_proved(run)]),
            "",
            "## Scores",
            "",
            *_bullets([*_scores(run, facts)]),
            "",
            "## Privacy",
            "",
            *_bullets([*_privacy(run)]),
            "",
            "## Data",
            "",
            *_data(run),
            "",
        ]
    )


def _front(facts: CardFacts) -> list[str]:
    """What the Hub reads. A base that is a path, or code, says nothing there."""
    hub = not facts.base.startswith(("/", "py:")) and "\\" not in facts.base
    lines = ["---", f"library_name: {'transformers' if facts.merged else 'peft'}"]
    lines += [f"base_model: {facts.base}"] if hub else []
    return [*lines, "tags: [federated-learning, lora]", "---", ""]


def _what(run: RunFiles, facts: CardFacts) -> list[str]:
    s = run.summary
    task = run.config.get("model.task", "")
    kind = "A whole model" if facts.merged else "An adapter (PEFT)"
    whose = "" if facts.client is None else f" This is client {facts.client}'s own model."
    told = [
        f"{kind}, trained by federated LoRA with fedlora: strategy {s['strategy']}, "
        f"{count(s['rounds'], 'round')}, {count(len(run.clients), 'client')}.{whose}",
        "",
        f"- base: `{facts.base}`",
        f"- task: {task}",
    ]
    if facts.labels:
        told.append(f"- labels, in the order of the logits: {', '.join(map(str, facts.labels))}")
    if task in KINDS and KINDS[task].generates:
        told.append(
            f"- a response ends with the token `{facts.end}`; generation is to stop there"
            if facts.end
            else "- responses were trained without an end mark: generation does not know its end"
        )
    if picked := s.get("chosen"):
        told.append(
            f"- the model is that of round {picked['result']}, chosen among "
            f"{count(picked.get('last_round', 0), 'round')} by validation rows"
            if picked["result"] != picked.get("last_round")
            else f"- the model is that of the last round, {picked['result']}"
        )
    if s.get("stopped"):
        told.append(f"- the run ended before its last round: {s['stopped']}")
    return told


def _proved(run: RunFiles) -> Iterator[str]:
    """The run's own proofs, of every round."""
    yield from trust.proof(run)
    found = [excess(c) for _, c in certificates(run.rounds)]
    if found:
        yield (
            f"The certificate compared what {count(len(found), 'round')} made of shared inputs "
            f"with the server's own model: at most {tiny(max(found))} of what rounding explains "
            "(above 1 would be an error)."
        )


def _scores(run: RunFiles, facts: CardFacts) -> Iterator[str]:
    if facts.client is not None:
        yield "these are of the federation's one model, not of this client's own"
    final = run.summary.get("final") or {}
    told = [f"{key} {score(key, value)}" for key, value in final.items() if key != "examples"]
    rows = final.get("examples")
    if told:
        yield f"on the central test rows{f' ({rows})' if rows else ''}: {', '.join(told)}"
    for name, value in run.baselines().items():
        yield f"{name}: {run.metric.text(value)}"
    if not told:
        yield "none: there was no central test, or its model is not this one"
    if run.summary.get("warnings"):
        yield said(run.summary["warnings"])


def _privacy(run: RunFiles) -> Iterator[str]:
    facts, by_client = trust.privacy(run)
    if not facts and not by_client.rows:
        yield (
            "trained without differential privacy: nothing bounds what the weights tell of a row"
        )
    yield from (f"{name}: {value}" for name, value in facts)
    for row in by_client.rows:
        named = zip(by_client.head, (cell.text for cell in row), strict=True)
        yield ", ".join(f"{head} {text}" for head, text in named)
    for name, what in trust.left(run):
        yield f"sent by the clients: {name.lower()}: {what}"


def _data(run: RunFiles) -> Iterator[str]:
    yield f"From `{run.summary['data']}`, split over the clients as follows."
    yield ""
    yield "| client | examples trained on | own test rows | rounds |"
    yield "|---|---|---|---|"
    for c in run.clients:
        rows = (c["client"], c.get("train_examples"), c.get("test_examples"), c.get("rounds"))
        yield f"| {' | '.join('not told' if x is None else str(x) for x in rows)} |"


def _bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]
