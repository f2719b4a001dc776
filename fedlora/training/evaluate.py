"""How good the loaded model is on some rows: accuracy and F1, or perplexity and exact match."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.training import metrics
from fedlora.training.data.batches import IGNORE, Batch, Encoded, eval_batches, prompt_batches
from fedlora.training.data.seam import end_mark
from fedlora.training.devices import moved, on_host, sent
from fedlora.training.model.model import Model
from fedlora.training.precision import autocast
from fedlora.training.train import own_losses, token_losses
from fedlora.training.user_code import find


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
    with autocast(config.train.precision, model.device):
        if config.model.task == "classification":
            return _classification(model, rows, config)
        scores = _language(model, rows, config)
        if generate and config.data.prompt and config.evaluate.generate_tokens:
            answers, responses = _answered(model, rows, config)
            scores["exact_match"] = metrics.exact_match(answers, responses)
            scores |= _own(config, answers, responses)
        return scores


def at_once(config: Config) -> int:
    """Examples of an evaluation that are in memory at once: four for one of training where that is
    limited, since none of their activations is kept."""
    most = 4 * config.train.microbatch or config.evaluate.batch_size
    return min(config.evaluate.batch_size, most)


def _classification(model: Model, rows: Encoded, config: Config) -> dict[str, float]:
    logits, labels = [], []
    for batch in eval_batches(rows, at_once(config)):
        labels.append(batch.pop("labels"))
        logits.append(model.logits(batch))
    found, wanted = on_host(torch.cat(logits)), torch.cat(labels)
    scores = metrics.classification(found, wanted, len(model.labels))
    if config.train.loss:
        losses = own_losses(config.train.loss, found, wanted)
        scores["loss"] = losses.double().mean().item()
    return scores | _own(config, found, wanted)


def _own(config: Config, predicted: Any, wanted: Any) -> dict[str, float]:
    """The scores of the user's own function; none where there is none.

    Raises:
        ModelError: it gives something else than numbers by name.
    """
    if not (name := config.evaluate.metrics):
        return {}
    found = find("evaluate.metrics", name)(predicted, wanted)
    try:
        return {str(key): float(value) for key, value in found.items()}
    except (AttributeError, TypeError, ValueError) as e:
        raise ModelError(
            f"evaluate.metrics = {name!r}: it gives {found!r:.80}, must be numbers by name"
        ) from e


def _language(model: Model, rows: Encoded, config: Config) -> dict[str, float]:
    losses, tokens = [], []
    for batch in eval_batches(rows, at_once(config)):
        labels = batch.pop("labels")
        losses.append(_losses(model, batch, labels))
        tokens.append((labels[:, 1:] != IGNORE).sum(1))
    return metrics.language(on_host(torch.cat(losses)), torch.cat(tokens))


def _losses(model: Model, batch: Batch, labels: Tensor) -> Tensor:
    """Each example's loss, as it is trained."""
    if own := model.config.train.loss:
        return own_losses(own, model.logits(batch), sent(labels, model.device))
    return token_losses(model, batch, labels)


def _answered(model: Model, rows: Encoded, config: Config) -> tuple[list[str], list[str]]:
    """What the model answers each prompt, greedily, and what it should."""
    responses, how = _responses(model, rows), greedy(model.tokenizer, config)
    answers: dict[int, str] = {}
    model.peft.get_base_model().generation_config = model.peft.generation_config = how
    for numbers, batch in prompt_batches(rows, at_once(config)):
        width = batch["input_ids"].shape[1]
        out: Tensor = on_host(model.peft.generate(**moved(batch, model.device)))
        texts = model.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        answers |= dict(zip(numbers.tolist(), texts, strict=True))
    return [answers[n] for n in range(len(rows))], responses


def greedy(tokenizer: PreTrainedTokenizerBase, config: Config) -> GenerationConfig:
    """How answers are generated, whatever the base's own files ask for: the most likely token each
    time, up to the end mark that was trained, evaluate.generate-tokens at most."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=config.evaluate.generate_tokens,
        eos_token_id=end_mark(tokenizer, config.data.chat_template),
        pad_token_id=tokenizer.pad_token_id,
    )


def generation(tokenizer: PreTrainedTokenizerBase, config: Config) -> dict[str, Any] | None:
    """The settings of `greedy`, for the record; None where nothing is generated."""
    if config.model.task != "causal-lm" or not config.evaluate.generate_tokens:
        return None
    mark = end_mark(tokenizer, config.data.chat_template)
    stop = None if mark is None else str(tokenizer.convert_ids_to_tokens(mark))
    return {"greedy": True, "tokens": config.evaluate.generate_tokens, "stops_at": stop}


def _responses(model: Model, rows: Encoded) -> list[str]:
    """What each example should be answered, from its own tokens after the prompt."""
    assert rows.prompts is not None
    starts, ends = rows.starts[:-1] + rows.prompts, rows.starts[1:]
    ids = [rows.ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    texts: list[str] = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts
