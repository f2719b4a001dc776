"""Conversations of several turns: which of their tokens are the assistant's, and are trained.

    messages    [{"role": "user", "content": "..."}, ...], or ShareGPT's "from" and "value", or a
                transcript as HH-RLHF's
    ids         the tokenizer's of the whole conversation, through its own chat template
    trained     the assistant's words, each turn's end mark included; nothing of the others

Where the assistant's words are, in this order:

    1. the template's own {% generation %} marks, where it has them
    2. what a turn adds: the render up to it, with the generation prompt, is the beginning of the
       render with it, and that the beginning of the whole. Then training sees the very text that
       serving would send
    3. by contents: a template that rewrites earlier turns breaks 2. The conversation is rendered
       with marks in place of the assistant's words, and those are put back; if that is the whole,
       the words are where the marks were

A conversation of which none holds (a template that drops an earlier turn's reasoning, say) is
refused, and counted: which of its words are whose cannot be told. A token that lies on both sides
of a seam is not trained. A turn without a word is read, and not trained, its end mark neither: it
would teach to say nothing.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedlora.errors import DataError
from fedlora.training.data.seam import special_ids
from fedlora.training.data.tables import Table, column
from fedlora.training.data.written import shown

log = logging.getLogger(__name__)

Message = dict[str, str]
Span = tuple[int, int]

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "assistant"), "assistant"),
    "system": "system",
}
"""What roles are called, by the names that files have for them in any case; any other is itself."""
READ = ("role", "from", "content", "value")
"""The keys of a message that are read."""
TURN = re.compile(r"\n\n(Human|Assistant):")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation's ids, and which are the assistant's."""

    ids: list[int]
    trained: list[bool]
    asked: int
    """Tokens before the last of the assistant's turns."""


def conversations(
    table: Table, where: str, name: str, key: str = "data.messages", hint: str = ""
) -> list[str]:
    """The column that the key names, each cell a JSON list of {"role", "content"}; "" where it is
    empty. What else a message has is not read, and counted in the log.

    hint: what to do where a cell is none, behind the message.

    Raises:
        DataError: there is no such column, or a cell is no list of messages; says which.
    """
    if name not in table.names:
        column(table, where, key, name)  # says so, with what there is
    unread = Counter[str]()
    found = [
        _written(cell, f'{key} = "{name}": {where}, {table.unit} {line}', unread, hint)
        for cell, line in zip(table.cells[name][:], table.lines, strict=True)
    ]
    if unread:
        told = ", ".join(f'"{shown(k)}" of {n}' for k, n in unread.most_common(5))
        text = '%s = "%s": %s: of a message its role and content are read, and not %s messages'
        log.warning(text, key, name, where, told)
    return found


def read(text: str) -> list[Message]:
    """The messages of one such cell."""
    found: list[Message] = json.loads(text)
    return found


def _written(cell: Any, where: str, unread: Counter[str], hint: str) -> str:
    if isinstance(cell, str) and (told := _transcript(cell)):
        cell = told
    if isinstance(cell, str):
        try:
            cell = json.loads(cell) if cell.strip() else []
        except (ValueError, RecursionError):
            raise DataError(
                f"{where}: must be a list of messages, is {cell[:40]!r}{hint}"
            ) from None
    if isinstance(cell, Mapping):  # a list of structs, as a struct of lists
        columns = [list(x or ()) for x in cell.values()]
        cell = [dict(zip(cell, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(cell, list | type(None)):
        raise DataError(f"{where}: must be a list of messages, is {cell!r:.40}{hint}")
    messages = [_message(x, where, unread) for x in cell or ()]
    return json.dumps(messages, ensure_ascii=False) if messages else ""


def _transcript(text: str) -> list[Message]:
    """The turns of a text that begins with "Human:" or "Assistant:", each behind an empty line, as
    HH-RLHF has them; none of any other text."""
    before, *parts = TURN.split(f"\n\n{text.strip()}")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [] if before else [{"role": role, "content": said.strip()} for role, said in turns]


def _message(x: Any, where: str, unread: Counter[str]) -> Message:
    given = x if isinstance(x, Mapping) else {}
    role, content = (given.get(a) or given.get(b) for a, b in (("role", "from"),
                                                               ("content", "value")))  # fmt: skip
    if not isinstance(role, str) or not isinstance(content or "", str):
        raise DataError(
            f'{where}: a message must have a "role" and a "content" that are texts (or ShareGPT\'s '
            f'"from" and "value"), is {x!r:.60}'
        )
    unread.update(key for key, value in given.items() if key not in READ and value)
    return {"role": ROLES.get(role.lower(), role), "content": content or ""}


def turned(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Conversation | str:
    """A conversation's ids; or in words, why it cannot be trained on.

    Raises:
        DataError: the tokenizer has no chat template, or cannot say where its tokens lie.
    """
    template = tokenizer.chat_template
    if not template:
        raise DataError("data.messages: this model's tokenizer has no chat template")
    if not tokenizer.is_fast:
        raise DataError("data.messages: this model's tokenizer does not say where its tokens lie")
    said = [bool(m["content"].strip()) for m in messages if m["role"] == "assistant"]
    if not any(said):
        return "have an assistant that says nothing" if said else "have no turn of an assistant"
    try:
        whole = _render(tokenizer, messages)
        if GENERATION.search(str(template)):
            return _by_template(tokenizer, messages, said)
        spans = _by_turns(tokenizer, messages, whole) or _by_contents(tokenizer, messages, whole)
    except TemplateError:
        return "have turns that this model's chat template refuses"
    if spans is None:
        return "have turns that this model's chat template rewrites: whose words are whose is lost"
    return _of_spans(tokenizer, whole, [span for span, yes in zip(spans, said, strict=True) if yes])


def last_words(text: str) -> str:
    """What the assistant says last in such a cell; "" where it says nothing."""
    said = [m["content"] for m in read(text) if m["role"] == "assistant" and m["content"].strip()]
    return said[-1] if said else ""


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], asks: bool = False
) -> str:
    found = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=asks
    )
    return str(found)


def _by_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], said: Sequence[bool]
) -> Conversation | str:
    found: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [bool(x) for x in found["assistant_masks"]]
    starts = [n for n, yes in enumerate(trained) if yes and not (n and trained[n - 1])]
    if len(starts) == len(said):  # a run of tokens is a turn
        for n in (at for at, yes in zip(starts, said, strict=True) if not yes):
            end = next((k for k in range(n, len(trained)) if not trained[k]), len(trained))
            trained[n:end] = [False] * (end - n)
    if not any(trained):
        return "have no token that this model's chat template marks as generated"
    return Conversation([*found["input_ids"]], trained, last_run(trained))


def _by_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], whole: str
) -> list[Span] | None:
    """Where each of the assistant's turns lies in the whole, by what it adds; None: not so."""
    spans = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not k:
            return None  # nothing is before it, and transformers renders no empty conversation
        try:
            before = _render(tokenizer, messages[:k], asks=True)
            after = _render(tokenizer, messages[: k + 1])
        except TemplateError:  # one that takes only whole conversations
            return None
        if not (after.startswith(before) and whole.startswith(after)):
            return None
        spans.append((len(before), len(after)))
    return spans


def _by_contents(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], whole: str
) -> list[Span] | None:
    """The same by the places of marks that stand for the assistant's words, which the template may
    have trimmed; None: not so."""
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    text = "".join(m["content"] for m in messages)
    mark = next(f"\u27e6{n}\u27e7" for n in range(10**6) if f"\u27e6{n}\u27e7" not in text)
    marked = [{**m, "content": mark} if m["role"] == "assistant" else m for m in messages]
    first, *behind = _render(tokenizer, marked).split(mark)
    if len(behind) != len(said) or not whole.startswith(first):
        return None
    spans, at = list[Span](), len(first)
    for words, part in zip(said, behind, strict=True):
        forms = words, words.strip(), words.lstrip(), words.rstrip()
        own = next((x for x in forms if whole.startswith(x + part, at)), None)
        if own is None:
            return None
        spans.append((at, at + len(own)))
        at += len(own) + len(part)
    return spans if at == len(whole) else None


def _of_spans(
    tokenizer: PreTrainedTokenizerBase, whole: str, spans: Sequence[Span]
) -> Conversation | str:
    """The whole's ids; of each span the tokens that lie in it, and its end mark.

    The end mark is the last special token in the span, or the one right behind it; what a template
    writes behind that, a line's end say, is not the assistant's.
    """
    given = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = [*given["input_ids"]], given["offset_mapping"]
    special = special_ids(tokenizer)
    trained = [False] * len(ids)
    for start, end in spans:
        inside = [n for n, (a, b) in enumerate(places) if start <= a < b <= end]
        if not inside:
            continue
        behind = inside[-1] + 1
        marks = [n for n in inside if ids[n] in special]
        last = marks[-1] if marks else inside[-1]
        if not marks and behind < len(ids) and ids[behind] in special:
            last = behind
        for n in range(inside[0], last + 1):
            trained[n] = True
    if not any(trained):
        return "have an assistant that says nothing"
    return Conversation(ids, trained, last_run(trained))


def last_run(trained: Sequence[bool]) -> int:
    """Where the last run of trained tokens begins."""
    end = len(trained) - 1 - [*reversed(trained)].index(True)
    return next((n + 1 for n in range(end, -1, -1) if not trained[n]), 0)
