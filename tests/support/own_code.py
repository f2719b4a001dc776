"""A user's own model, tokenizer, data, loss and metrics, in a module of their own."""

import random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.conftest import CUES, LABELS, WORDS


class Bag(nn.Module):
    """No transformer: words, two layers that may be adapted, the mean over words, a head."""

    def __init__(self, labels: tuple[str, ...], width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(32, width)
        self.inner = nn.Linear(width, 40)
        self.outer = nn.Linear(40, width)
        self.score = nn.Linear(width, len(labels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        x = self.words(input_ids)
        x = x + self.outer(torch.tanh(self.inner(x)))
        mask = attention_mask[..., None].to(x.dtype)
        return self.score((x * mask).sum(1) / mask.sum(1).clamp(min=1))


def make_model(labels: tuple[str, ...]) -> nn.Module:
    return Bag(labels)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def rows(client: int | None) -> Dataset:
    """40 rows a client, of None 60 that nobody trains on."""
    chance = random.Random(99 if client is None else client)
    made = []
    for n in range(60 if client is None else 40):
        label = LABELS[n % 3]
        words = [chance.choice(WORDS) for _ in range(chance.randint(2, 6))]
        words.insert(chance.randint(0, len(words)), chance.choice(CUES[label]))
        made.append({"text": " ".join(words), "label": label})
    return Dataset.from_list(made)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy with smoothed labels, of each example."""
    return cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mistake to make: one number for the whole batch."""
    return cross_entropy(logits, labels)


def top_two(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of rows whose label is among the two likeliest."""
    hits = (logits.topk(2).indices == labels[:, None]).any(1)
    return {"top_two": hits.float().mean().item()}
