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

Reads data.prompt, data.response (the chosen answer) and data.rejected. A row whose two answers are
one teaches nothing, and is left out.
"""

from collections.abc import Callable, Mapping, Sequence
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
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.rows import Rows
from fedlora.training.data.seam import pieces
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
        return {data.prompt: rows.text, data.response: rows.response, data.rejected: rows.second}

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
        sides = rows, replace(rows, response=rows.second)
        pairs = zip(*(pieces(x, tokenizer, data.chat_template) for x in sides), strict=True)
        kept: list[int] = []
        ids: tuple[list[Sequence[int]], ...] = ([], [])
        asked, alike, long, unwritten = list[int](), 0, 0, 0
        for i, pair in enumerate(pairs):
            size = len(pair[0].prompt)
            if pair[0].response == pair[1].response:
                alike += 1
            elif size >= longest:
                long += 1
            elif not all(x.response for x in pair):
                unwritten += 1
            else:
                kept.append(i)
                asked.append(size)
                for side, x in zip(ids, pair, strict=True):
                    side.append((x.prompt + x.response)[:longest])
        full = f"have a prompt of data.max-length = {longest} tokens or more: raise it"
        same = "have a chosen answer that is the rejected one"
        tell(len(rows), len(kept), {same: alike, full: long, UNWRITTEN: unwritten})
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

    def script(self, end: int | None) -> str:
        from fedlora.training.tasks.causal_lm import CausalLM

        return CausalLM().script(end)


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
