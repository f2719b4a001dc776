"""What a run began with, by digest: rows, labels, split, base, adapter, tokenizer.

A config names files, and files change. Whoever goes on with a run, or hands out its model,
compares: other rows under the same name would make other labels of the same columns.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora.errors import CheckpointError
from fedlora.training.data.corpus import Corpus, Rows
from fedlora.training.model.model import Model

MEANS = {
    "rows": "other rows, or another split of them (data.path, test-path, validation-path)",
    "labels": "other labels, or in another order (data.path)",
    "base": "another base (the weights at model.path)",
    "adapter": "another adapter to start from (model.adapter)",
    "tokenizer": "another tokenizer, chat template or image processor (at model.path)",
}


def begun_with(model: Model, corpus: Corpus) -> dict[str, str]:
    """The digests, by what they are of."""
    parts = [*corpus.held, *(part for c in corpus.clients for part in c.parts)]
    return {
        "rows": digest_of_rows(parts),
        "labels": _digest([json.dumps(corpus.labels)]),
        "base": model.fingerprint.partition("+")[0],
        "tokenizer": _tokenizer(model.tokenizer),
        "adapter": model.start.digest,
    }


def check_begun_with(was: Mapping[str, str], now: Mapping[str, str], run: object) -> None:
    """Nothing, where what both name is equal, as far as `was` says it: older runs cut the base's.

    Raises:
        CheckpointError: something is not; says what, and where it comes from.
    """
    other = [
        MEANS[key] for key in MEANS if key in was and was[key] != now[key][: len(was[key]) or None]
    ]
    if other:
        raise CheckpointError(
            f"{run} was begun with {'; and with '.join(other)}. Put back what it was begun with, "
            "or begin a run of another run.name"
        )


def digest_of_rows(parts: Iterable[Rows]) -> str:
    """Of every row of every part, in order."""

    def columns(part: Rows) -> list[tuple[str, ...]]:
        more = [x for x in (part.second, part.target) if x]  # older runs knew none of these
        return [part.text, part.label, part.response, part.group, *more]

    return _digest(json.dumps(columns(part)) for part in parts)


PROBES = (
    "The cat's 1st, 22nd and 333rd",
    " caf\u00e9 \u4f60\u597d \U0001f600\n\tx  y",
    "<s>[INST]</s>",
)
"""Texts whose ids stand for how a tokenizer cuts, which its vocabulary alone does not say."""


def _tokenizer(tokenizer: Any) -> str:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # an image processor
        return _digest([json.dumps(tokenizer.to_dict(), sort_keys=True, default=str)])
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    ids = json.dumps(tokenizer([*PROBES])["input_ids"])
    special = json.dumps(sorted(tokenizer.all_special_ids))
    return _digest([vocabulary, ids, special, str(tokenizer.chat_template)])


def _digest(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:16]
