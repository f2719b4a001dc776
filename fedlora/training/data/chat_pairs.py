"""Two conversations that are one up to their last turn: what was asked, and two answers to it.

asked       the turns that both begin with, JSON as `chat.conversations` writes it
answers     the one turn of an assistant that each has behind them
"""

import json
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from fedlora.training.data.chat import Message, last_words, read, turned
from fedlora.training.data.seam import Pieces

UNLIKE = "whose conversations differ in more than the assistant's last turn"
NOTHING = "whose conversations begin with no turn in common"


def split_pairs(
    before: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> tuple[list[str], list[str], list[str], Mapping[str, list[int]]]:
    """What was asked and the two answers, each a JSON list of messages a row; and by their reason
    the numbers of rows that are no such pair.

    before: turns that come before both; "" for none. A row of which a text is "" is left as it is.
    """
    found, unfit = list[list[str]](), dict[str, list[int]]()
    for i, row in enumerate(zip(before, chosen, rejected, strict=True)):
        if not (row[1] and row[2]):
            found.append([*row])
            continue
        first, *sides = (read(text) if text else [] for text in row)
        one, other = ([*first, *side] for side in sides)
        same = _common(one, other)
        ends = one[same:], other[same:]
        if not same:
            unfit.setdefault(NOTHING, []).append(i)
        elif any(len(end) != 1 or end[0]["role"] != "assistant" for end in ends):
            unfit.setdefault(UNLIKE, []).append(i)
        found.append([json.dumps(x, ensure_ascii=False) for x in (one[:same], *ends)])
    asked, *answers = ([row[k] for row in found] for k in range(3))
    return asked, answers[0], answers[1], unfit


def _common(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many turns both begin with, their last ones apart."""
    most = min(len(one), len(other)) - 1
    return next((k for k in range(most) if one[k] != other[k]), max(most, 0))


def pair_pieces(
    asked: str, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Pieces] | str:
    """The ids of what was asked and of each answer, its end mark included, through the chat
    template; or in words, why the row cannot be trained on.

    Raises:
        DataError: as `chat.turned`.
    """
    found = []
    for answer in answers:
        if not last_words(answer):
            return "have an answer without a word"
        whole = turned([*read(asked), *read(answer)], tokenizer)
        if isinstance(whole, str):
            return whole
        end = len(whole.ids) - whole.trained[::-1].index(True)
        found.append(Pieces(whole.ids[: whole.asked], whole.ids[whole.asked : end], False))
    if any(x.prompt != found[0].prompt for x in found):
        return "have turns that this model's chat template writes otherwise before another answer"
    return found
