"""Tiny random models of the common architectures, as directories that users would name."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.conftest import WORDS, write_tokenizer

ENCODER = {
    "vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DECODER = {
    "vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
GPT2 = {"vocab_size": 32, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 2,
        "bos_token_id": 2, "eos_token_id": 2}  # fmt: skip
BART = {
    "vocab_size": 32, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": 32, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2,
      "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
SMALL_DISTIL = {"vocab_size": 32, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 40,
                "max_position_embeddings": 64}  # fmt: skip
FALCON = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "bos_token_id": 2, "eos_token_id": 2}  # fmt: skip
MODERN = {**ENCODER, "global_attn_every_n_layers": 1, "eos_token_id": 2, "bos_token_id": 2,
          "cls_token_id": 2, "sep_token_id": 2}  # fmt: skip

XLNET = {"vocab_size": 32, "d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 40,
         "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}  # fmt: skip
OPT = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
       "ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 24, "bos_token_id": 2,
       "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
EXPERTS = {**DECODER, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}  # fmt: skip

FIXED_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-j": ("GPTJ", {**GPT2, "rotary_dim": 4}),
    "codegen": ("CodeGen", {**GPT2, "n_head": 4, "rotary_dim": 4}),
    "ctrl": ("CTRL", {**GPT2, "dff": 40}),
    "mpt": (
        "Mpt",
        {"vocab_size": 32, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    ),
}
"""Their positions are computed, and end all the same."""

ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "canine": ("Canine", {**ENCODER, "num_hash_buckets": 32, "downsampling_rate": 2}),
    "ibert": ("IBert", ENCODER),
    "nystromformer": (
        "Nystromformer",
        {**ENCODER, "num_landmarks": 4, "segment_means_seq_len": 64},
    ),
}
"""Hashes of characters for embeddings; linear maps of their own; one length of text alone."""

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", ENCODER),
    "roberta": ("Roberta", ENCODER),
    "xlm-roberta": ("XLMRoberta", ENCODER),
    "distilbert": ("DistilBert", SMALL_DISTIL),
    "deberta": ("Deberta", ENCODER),
    "deberta-v2": ("DebertaV2", ENCODER),
    "electra": ("Electra", {**ENCODER, "embedding_size": 24}),
    "albert": ("Albert", {**ENCODER, "embedding_size": 16}),
    "modernbert": ("ModernBert", MODERN),
    "xlnet": ("XLNet", XLNET),
    "bart": ("Bart", BART),
    "t5": ("T5", T5),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", DECODER),
    "qwen2": ("Qwen2", {**DECODER, "vocab_size": 320}),
    "qwen2-moe": ("Qwen2Moe", EXPERTS),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 8}),
    "gpt-oss": (
        "GptOss",
        {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    ),
    "opt": ("OPT", OPT),
    "bloom": ("Bloom", {**GPT2, "hidden_size": 24}),
    "phi": ("Phi", {**DECODER, "hidden_size": 32, "num_key_value_heads": 4}),
    "stablelm": ("StableLm", DECODER),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 8}),
    "mistral": ("Mistral", DECODER),
    "gemma2": ("Gemma2", {**DECODER, "head_dim": 8}),
    "gemma3": ("Gemma3Text", {**DECODER, "head_dim": 8}),
    "phi3": ("Phi3", DECODER),
    "mixtral": ("Mixtral", {**DECODER, "num_local_experts": 2}),
    "gpt-neox": ("GPTNeoX", {**ENCODER, "bos_token_id": 2, "eos_token_id": 2}),
    "falcon": ("Falcon", FALCON),
}
SAVED_AS = {"gpt2": "GPT2LMHeadModel", "gemma3": "Gemma3ForCausalLM", "bart": "BartModel",
            "t5": "T5Model", "ctrl": "CTRLLMHeadModel"}  # fmt: skip


def write(name: str, directory: Path, saved_as: str = "", **changes: Any) -> Path:
    """A checkpoint of the architecture without a classifier's head, and its tokenizer.

    saved_as: transformers' class of it, where that is another.
    """
    kind, given = {**ENCODERS, **DECODERS, **FIXED_LENGTH, **ODD}[name]
    causal = saved_as or SAVED_AS.get(
        name, f"{kind}Model" if name in {**ENCODERS, **ODD} else f"{kind}ForCausalLM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = getattr(transformers, f"{kind}Config")(**{**given, **changes})
        getattr(transformers, causal)(config).save_pretrained(str(directory))
    write_tokenizer(directory)
    if name == "qwen2":  # transformers reads its tokenizer as byte-level BPE, whatever it is
        write_bytes_tokenizer(directory)
    if name in ("bart", "t5"):  # theirs end a text with the end mark
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", 2)]
        )
        tokenizer.save_pretrained(str(directory))
    return directory


def write_bytes_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 300 tokens in place of the one that is there."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["[PAD]", "[UNK]", "[EOS]"]
    made.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(str(directory))
