"""Which of two answers to a prompt is preferred: direct preference optimisation.

Rafailov et al., "Direct Preference Optimization", https://arxiv.org/abs/2305.18290, equation 7:

    margin     beta [ log p(y_w | x) / p_ref(y_w | x)  -  log p(y_l | x) / p_ref(y_l | x) ]
    loss       -log sigmoid(margin)
    scores     loss, accuracy (the share of rows of margin > 0) and margin (the mean)

log p of an answer is the sum over its tokens, the end mark included. p_ref is the untouched model:
the policy as it stood before round 1, whatever a strategy or an initialisation has since moved into
its base. It is computed once a row (training/references.py). Dropout is off in that pass, and in
training too, unless model.dropout or lora.dropout is set.

The first step's margin is 0 and its loss ln 2, to rounding; so the accuracy before any training is
rounding's, and says nothing.

Reads data.prompt, data.response (the chosen answer) and data.rejected; or conversations,
data.messages and data.rejected, that differ in their last turn alone, behind those of data.prompt
where that is set. A row whose two answers are one teaches nothing, and is left out.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.training.data.batches import (
    IGNORE,
    SYNTHETIC,
    Batch,
    Encoded,
    eval_batches,
    flat,
    halves,
    inputs_of,
    pad_of,
    synthetic,
)
from fedlora.training.data.chat import conversations, read
from fedlora.training.data.chat_pairs import pair_pieces, split_pairs
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.rows import Rows
from fedlora.training.data.seam import Pieces, pieces
from fedlora.training.data.tables import Table, column, prompts
from fedlora.training.devices import on_host, sent, wide_on_host
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.causal_lm import UNWRITTEN, token_sums
from fedlora.training.tasks.outputs import at_once
from fedlora.training.tasks.parts import Parts, of_margins
from fedlora.training.tasks.texts import tell


@dataclass(frozen=True)
class Preference:
    """See the top of this file."""

    name = "preference"
    auto = "AutoModelForCausalLM"
    what = "causal language model"
    peft = "CAUSAL_LM"
    hub = "text-generation"
    headed = pictured = pooled = answers = False
    generates = shifted = True

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        if data.messages:
            return _of_messages(table, where, data)
        text = prompts(table, where, data.prompt)
        chosen = column(table, where, "data.response", data.response)
        rejected = column(table, where, "data.rejected", data.rejected)
        names = (data.prompt, text), (data.response, chosen), (data.rejected, rejected)
        needed = [Needed(*x) for x in names if x[0]]
        return Columns(text, response=chosen, second=rejected, needed=needed)

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        return ()

    def names(self, rows: Rows) -> Sequence[str]:
        return ()

    def mapped(self, rows: Rows) -> Sequence[str]:
        return ()

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        if not data.messages:
            sides = {data.response: rows.response, data.rejected: rows.second}
            return {data.prompt: rows.text, **sides}
        if data.prompt:
            names = data.prompt, data.messages, data.rejected
            return dict(zip(names, (rows.text, rows.response, rows.second), strict=True))
        wholes = (map(_joined, rows.text, side) for side in (rows.response, rows.second))
        return {name: [*x] for name, x in zip((data.messages, data.rejected), wholes, strict=True)}

    def encode(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        """The chosen answers behind their prompts, with the rejected ones as `other`. An answer is
        cut at its end, but never a prompt."""
        kept: list[int] = []
        ids: tuple[list[Sequence[int]], ...] = ([], [])
        asked, left = list[int](), Counter[str]()
        for i, pair in enumerate(_pairs(rows, tokenizer, data)):
            if isinstance(pair, str) or (why := _unfit(pair, longest)):
                left[pair if isinstance(pair, str) else why] += 1
                continue
            kept.append(i)
            asked.append(len(pair[0].prompt))
            for side, x in zip(ids, pair, strict=True):
                side.append((x.prompt + x.response)[:longest])
        tell(len(rows), len(kept), left)
        lengths = torch.tensor(asked, dtype=torch.long)
        numbers = torch.tensor(kept, dtype=torch.long)
        chosen, rejected = (
            Encoded(*flat(side), numbers, pad_of(tokenizer), prompts=lengths) for side in ids
        )
        return replace(chosen, other=rejected)

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        chosen, rejected = (synthetic(tokenizer, 0, ends, s, lengths) for s in (0, 1))
        return replace(chosen, other=rejected, targets=torch.zeros(len(chosen), 2))

    def refer(self, net: Net, batch: Batch) -> Tensor:
        return on_host(torch.stack(_log_p(net, batch), 1))

    def losses(self, net: Net, batch: Batch) -> Tensor:
        return -logsigmoid(_margins(net, batch))

    def defined(self, net: Net, batch: Batch) -> Tensor:
        gaps = list[list[float]]()
        for side in halves(batch):
            logits = net.logits(inputs_of(side))
            rows = zip(wide_on_host(logits).log_softmax(-1), side["labels"], strict=True)
            gaps.append([
                sum(float(z[t - 1, y[t]]) for t in range(1, len(y)) if y[t] != IGNORE)
                for z, y in rows
            ])  # fmt: skip
        chosen, rejected = torch.tensor(gaps, dtype=torch.float64) - batch["reference"].double().T
        margins: Tensor = net.config.train.dpo_beta * (chosen - rejected)
        return (1 + (-margins).exp()).log()

    def scored(self, encoded: Encoded) -> Tensor:
        assert encoded.prompts is not None
        return (encoded.lengths - encoded.prompts.clamp(min=1)).clamp(min=0)

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        margins = _all_margins(net, rows, config)
        return {
            "loss": -logsigmoid(margins).mean().item(),
            "accuracy": (margins > 0).double().mean().item(),
            "margin": margins.mean().item(),
        }

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        return of_margins(_all_margins(net, rows, config))

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        return {}

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return {}

    def script(self, data: DataConfig, end: int | None) -> str:
        from fedlora.training.tasks.causal_lm import CausalLM

        return CausalLM().script(data, end)


def _of_messages(table: Table, where: str, data: DataConfig) -> Columns:
    """Of conversations: their last turns are the answers, and the turns before them the prompt."""
    chosen, rejected = (
        conversations(table, where, name, key)
        for name, key in ((data.messages, "data.messages"), (data.rejected, "data.rejected"))
    )
    before = [""] * len(chosen)
    if data.prompt:
        hint = "; where both conversations begin with it, leave data.prompt empty"
        before = conversations(table, where, data.prompt, "data.prompt", hint)
    asked, one, other, unfit = split_pairs(before, chosen, rejected)
    needed = [Needed(data.messages, chosen), Needed(data.rejected, rejected)]
    return Columns(asked, response=one, second=other, needed=needed, unfit=unfit)


def _joined(asked: str, answer: str) -> str:
    return json.dumps([*read(asked), *read(answer)], ensure_ascii=False)


def _pairs(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[Sequence[Pieces] | str]:
    """Of each row the ids of its two answers behind its prompt; or in words, why it has none."""
    if data.messages:
        for asked, *answers in zip(rows.text, rows.response, rows.second, strict=True):
            yield pair_pieces(asked, answers, tokenizer)
    else:
        sides = rows, replace(rows, response=rows.second)
        yield from zip(*(pieces(x, tokenizer, data.chat_template) for x in sides), strict=True)


def _unfit(pair: Sequence[Pieces], longest: int) -> str:
    """Why a row cannot be trained on; "" where it can."""
    if pair[0].response == pair[1].response:
        return "have a chosen answer that is the rejected one"
    if len(pair[0].prompt) >= longest:
        return f"have a prompt of data.max-length = {longest} tokens or more: raise it"
    return "" if all(x.response for x in pair) else UNWRITTEN


def _log_p(net: Net, batch: Batch) -> list[Tensor]:
    """log p of the chosen and of the rejected answers, each (b,), from one pass each."""
    return [-token_sums(net, inputs_of(side), side["labels"])[0] for side in halves(batch)]


def _all_margins(net: Net, rows: Encoded, config: Config) -> Tensor:
    """Each row's margin, (n,), in float64, by `eval_order`."""
    found = [_margins(net, batch) for batch in eval_batches(rows, at_once(config))]
    return wide_on_host(torch.cat(found))


def _margins(net: Net, batch: Batch) -> Tensor:
    chosen, rejected = _log_p(net, batch)
    reference = sent(batch["reference"], chosen.device)
    gap = (chosen - reference[:, 0]) - (rejected - reference[:, 1])
    return net.config.train.dpo_beta * gap
