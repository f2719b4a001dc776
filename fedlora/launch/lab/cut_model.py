"""A GPT-2 of two layers with random weights, for smoke tests of what attacks language models.

No weights are fetched. Its tokens are the words of the experiment's own rows.
"""

from collections import Counter
from pathlib import Path

import torch

from fedlora.config.reader import Config
from fedlora.training import cache

WORDS = 2000


def cut_gpt2(directory: Path, config: Config) -> Path:
    """The directory, with the model in it; made where it is not there yet."""
    if (directory / "tokenizer.json").is_file():
        return directory
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    labels = cache.corpus(config).labels
    counts: Counter[str] = Counter()
    for i in range(config.clients.count):
        for text in cache.client_rows(i, config, labels).train.text:
            counts.update(w for w, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text))
    words = ["[PAD]", "[UNK]", "[EOS]", *(w for w, _ in counts.most_common(WORDS))]
    vocabulary = {w: i for i, w in enumerate(words)}
    made = GPT2Config(
        vocab_size=len(words), n_positions=128, n_embd=64, n_layer=2, n_head=2,
        bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(made).save_pretrained(str(directory))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(str(directory))
    return directory
