"""How good the loaded model is on some rows: accuracy and F1, or perplexity and exact match."""

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.training import metrics
from fedlora.training.data.batches import IGNORE, Encoded, eval_batches, prompt_batches
from fedlora.training.model.model import Model
from fedlora.training.precision import autocast
from fedlora.training.train import token_losses


@torch.no_grad()
def evaluate(
    model: Model, rows: Encoded, config: Config, generate: bool = False
) -> dict[str, float] | None:
    """The task's metrics; None where there are no rows.

    classification: loss, accuracy, macro_f1. causal-lm: loss (nats a token), perplexity, and with
    `generate` also exact_match of greedy answers of evaluate.generate-tokens tokens.
    """
    if not len(rows):
        return None
    model.peft.eval()
    with autocast(config.train.precision):
        if config.model.task == "classification":
            return _classification(model, rows, config)
        scores = _language(model, rows, config)
        prompted = rows.prompts is not None and bool(rows.prompts.min() > 0)
        if generate and prompted and config.evaluate.generate_tokens:
            scores["exact_match"] = _exact_match(model, rows, config)
        return scores


def _classification(model: Model, rows: Encoded, config: Config) -> dict[str, float]:
    logits, labels = [], []
    for batch in eval_batches(rows, config.evaluate.batch_size):
        labels.append(batch.pop("labels"))
        logits.append(model.logits(batch))
    return metrics.classification(torch.cat(logits), torch.cat(labels), len(model.labels))


def _language(model: Model, rows: Encoded, config: Config) -> dict[str, float]:
    losses, tokens = [], []
    for batch in eval_batches(rows, config.evaluate.batch_size):
        labels = batch.pop("labels")
        losses.append(token_losses(model.logits(batch), labels))
        tokens.append((labels[:, 1:] != IGNORE).sum(1))
    return metrics.language(torch.cat(losses), torch.cat(tokens))


def _exact_match(model: Model, rows: Encoded, config: Config) -> float:
    responses = _responses(model, rows)
    answers: dict[int, str] = {}
    for numbers, batch in prompt_batches(rows, config.evaluate.batch_size):
        width = batch["input_ids"].shape[1]
        out: Tensor = model.peft.generate(
            **batch,
            max_new_tokens=config.evaluate.generate_tokens,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id,
        )
        texts = model.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        answers |= dict(zip(numbers.tolist(), texts, strict=True))
    return metrics.exact_match([answers[n] for n in range(len(rows))], responses)


def _responses(model: Model, rows: Encoded) -> list[str]:
    """What each example should be answered, from its own tokens after the prompt."""
    assert rows.prompts is not None
    starts, ends = rows.starts[:-1] + rows.prompts, rows.starts[1:]
    ids = [rows.ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    texts: list[str] = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts
