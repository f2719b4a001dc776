"""Prompt and response of a causal-lm row as token ids, such that training sees what serving sees.

    prompt    the ids that the serving side sends: the tokenizer's of the prompt alone, begun with
              its bos if it has one, never ended; or the chat template's with its generation prompt
    response  what follows those in the ids of the whole text, and the end mark

Where a token of the whole would straddle the seam ("2+" and "+3" where "++" is one token), the
response is tokenised as a continuation instead: ids that decode, behind the prompt's, to the whole
text. Generation never sees the straddling token, since the prompt is all that it is given.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedlora.errors import DataError
from fedlora.training.data.corpus import Rows

ANCHORS = ("\n", " ", *string.punctuation, *string.ascii_letters, *string.digits)
"""Texts that a continuation is tokenised behind, until one does not merge with it."""

ANSWER = "uvwxyz"
"""Words of an assistant's, that no template writes itself: not in an end mark's name either."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A row's ids in two."""

    prompt: list[int]
    response: list[int]
    """With its end mark. Empty where the tokenizer cannot write it behind this prompt."""
    straddled: bool
    """A token of the whole text would lie on both sides of the seam."""


def pieces(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False
) -> Iterator[Pieces]:
    """The rows' ids, one after the other.

    Raises:
        DataError: there is no chat template, or it refuses a row, or prompt and response cannot be
            told apart in what it writes.
    """
    if not len(rows):
        return
    texts = _chat(rows, tokenizer) if chat_template else _plain(rows)
    mark, marks = _mark(tokenizer, chat_template)
    prompts, wholes = zip(*texts, strict=True)
    options = {"add_special_tokens": not chat_template, "verbose": False}
    asked = tokenizer(list(prompts), **options)["input_ids"]
    said = tokenizer(list(wholes), **options)["input_ids"]
    added = 0 if chat_template else len(_ending(tokenizer))
    for (prompt, whole), before, ids in zip(texts, asked, said, strict=True):
        before, ids = before[: len(before) - added], ids[: len(ids) - added]
        straddled = ids[: len(before)] != before
        response = ids[len(before) :]
        if straddled:
            response = _continuation(tokenizer, before, ids, whole.removeprefix(prompt))
        lost = straddled and not response
        yield Pieces(before, [] if lost else _ended(response, mark, marks), straddled)


def end_mark(tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> int | None:
    """The token id that ends every response, where generation is to stop; None: there is none.

    It is the first special token that the chat template puts behind the assistant's words; else,
    and without a template, the tokenizer's eos.

    Raises:
        DataError: there is no chat template.
    """
    return _mark(tokenizer, chat_template)[0]


def _mark(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> tuple[int | None, int]:
    """The end mark, and how often the template itself writes it behind a response."""
    if chat_template:
        _check_template(tokenizer)
        _, whole = _turns(tokenizer, "a", ANSWER)
        tail = tokenizer(whole.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
        special = special_ids(tokenizer)
        if found := [i for i in tail if i in special]:
            return found[0], found.count(found[0])
    return tokenizer.eos_token_id, 0


def _ended(response: list[int], mark: int | None, marks: int) -> list[int]:
    """The response up to its end mark, which is put there where nothing else did."""
    if mark is None:
        return response
    if not marks and response[-1:] == [mark]:
        return response
    at = [i for i, token in enumerate(response) if token == mark]
    return response[: at[-marks] + 1] if marks and len(at) >= marks else [*response, mark]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of special tokens that a text names. What stands for a text that the tokenizer cannot
    write, a line's end say, is none, unless it is the end mark as well."""
    named = {*tokenizer.all_special_ids}
    named |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return named - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})


def put_behind(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts behind every text."""
    whole: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ends = range(len(whole), len(bare) - 1, -1)
    end = next((n for n in ends if whole[n - len(bare) : n] == bare), len(whole))
    return whole[end:]


def _ending(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The same, of a tokenizer that ends every text with an end mark; of others none."""
    behind = put_behind(tokenizer)
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return behind if ends.intersection(behind) else []


def _continuation(
    tokenizer: PreTrainedTokenizerBase, before: list[int], whole: list[int], text: str
) -> list[int]:
    """Ids of `text` that decode behind `before` to what `whole` does; none where none are found."""

    def read(ids: list[int]) -> str:  # behind some token: of the first, marks of a space are lost
        ids = [*before[-1:], *ids]
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def ids_of(text: str) -> list[int]:
        return [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    want = read(whole)
    for anchor in ("", *ANCHORS):
        start, ids = ids_of(anchor), ids_of(anchor + text)
        found = ids[len(start) :]
        if found and ids[: len(start)] == start and read(before + found) == want:
            return found
    return []


def _plain(rows: Rows) -> list[tuple[str, str]]:
    """Prompt, and prompt with response: one space between them, unless there is one already."""

    def whole(prompt: str, response: str) -> str:
        spaced = not prompt or prompt[-1].isspace() or response[:1].isspace()
        return prompt + response if spaced else f"{prompt} {response}"

    return [(p, whole(p, r)) for p, r in zip(rows.text, rows.response, strict=True)]


def _chat(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    _check_template(tokenizer)
    if not all(rows.text):
        raise DataError("data.chat-template = true needs data.prompt: the user's turn")
    return [_turns(tokenizer, p, r) for p, r in zip(rows.text, rows.response, strict=True)]


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError("data.chat-template = true, but this model's tokenizer has none")


def _turns(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[str, str]:
    user = [{"role": "user", "content": prompt}]
    both: Sequence[dict[str, str]] = [*user, {"role": "assistant", "content": response}]
    try:
        asked = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(both, tokenize=False)
    except TemplateError as e:
        raise DataError(
            f"data.chat-template = true: this model's template refuses a user's turn and an "
            f"assistant's ({e}); use data.prompt alone"
        ) from e
    if not whole.startswith(asked):
        raise DataError(
            "data.chat-template = true: this model's template does not continue its own "
            "generation prompt, so prompt and response cannot be told apart; use data.prompt alone"
        )
    return asked, whole
