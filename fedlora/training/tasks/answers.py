"""Answers that a model writes greedily, and what they should be: how long, how read, how scored.

An answer may have as many tokens as the longest response has, where evaluate.generate-tokens is -1.
A response that is longer than a number set there, or that was cut at data.max-length, can match no
answer; the log says how many there are.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.training import metrics
from fedlora.training.data.seam import end_mark
from fedlora.training.tasks.base import Net, Scores
from fedlora.training.tasks.outputs import own_scores

log = logging.getLogger(__name__)

Ids = Sequence[Sequence[int]]


def most_tokens(responses: Ids, mark: int | None, config: Config) -> int:
    """Tokens that an answer may have, its end mark among them.

    responses: the ids of what should be answered, with the mark unless they were cut.
    """
    asked = config.evaluate.generate_tokens
    most = max(map(len, responses), default=1) if asked < 0 else asked
    if lost := sum(unmatched(ids, mark, asked) for ids in responses):
        _tell(
            f"{lost} of {len(responses)} responses are longer than evaluate.generate-tokens or "
            "data.max-length let an answer be: none can match them, and they count as not matched"
        )
    return most


def unmatched(ids: Sequence[int], mark: int | None, asked: int) -> bool:
    """Is this response too long for any answer to match it? asked: evaluate.generate-tokens."""
    ended = mark is None or mark in ids
    return not ended or 0 <= asked < len(ids) - (mark is not None)


@functools.lru_cache(maxsize=256)
def _tell(text: str) -> None:
    """Once in a process: a run scores the same rows every round."""
    log.warning(text)


def greedy(
    tokenizer: PreTrainedTokenizerBase, config: Config, most: int, **more: Any
) -> GenerationConfig:
    """How answers are generated, whatever the base's own files ask for: the most likely token each
    time, up to the end mark that was trained, `most` tokens at most."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        eos_token_id=end_mark(tokenizer, config.data.chats),
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def texts(net: Net, ids: Any) -> list[str]:
    """What these tokens say, without special ones."""
    found: list[str] = net.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


def judged(answers: Sequence[str], responses: Sequence[str], config: Config) -> Scores:
    """Exact match, and the scores of evaluate.metrics."""
    return {
        "exact_match": metrics.exact_match(answers, responses),
        **own_scores(config, answers, responses),
    }
