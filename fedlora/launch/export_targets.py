"""What can be handed to which program, by that program's own rules, and how it is served there.

    peft        all of it: transformers and PEFT, which is what fedlora itself trains with
    vllm        LoRA on linear modules of a language model, one rank of at most 512
    llama.cpp   LoRA on linear modules of a language model, one alpha over each tensor's own rank
    merged      whole weights: transformers, vLLM, llama.cpp's converter

Sources: docs/use/hand-over.md. Neither vLLM nor llama.cpp was run.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.training.merged_model import merged_problem
from fedlora.training.model.load_script import base_of
from fedlora.training.model.model import Model
from fedlora.training.user_code import is_code

TARGETS = ("peft", "vllm", "llama.cpp", "merged")
ONE_RANK = ("vllm", "llama.cpp")
"""They read one alpha, and no rank_pattern: all modules get one rank, and alpha = r."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

AT_ONCE = 8
"""Adapters of one batch that the command for vLLM makes room for."""


def check_target(target: str) -> None:
    """
    Raises:
        ModelError: there is no such target.
    """
    if target not in TARGETS:
        raise ModelError(f"target = {target!r}: must be one of {', '.join(TARGETS)}")


def problems(target: str, model: Model, rank: int) -> Iterator[str]:
    """Why the target cannot load this model, a sentence each, with what can."""
    config = model.config
    merging = merged_problem(model)
    if target == "merged" and merging:
        yield merging
    if target not in ONE_RANK:
        return
    instead = "--for peft writes it for PEFT"
    instead += "" if merging else ", --for merged writes whole weights"
    if not model.task.generates:
        yield f"{target} serves adapters of language models, and this is a classifier; {instead}"
    elif not model.task.shifted:
        yield f"{target} serves adapters of decoders, and this is an encoder-decoder; {instead}"
    elif is_code(config.model.path):
        yield f"{target} does not know a model of your own code; {instead}"
    elif config.lora.form != "lora" and not model.form.own:  # own ones are written as LoRA
        yield f"{target} loads plain LoRA, and lora.form = {config.lora.form!r}; {instead}"
    elif model.heads:
        yield (
            f"{target} loads no modules that were trained whole ({', '.join(model.heads)}: "
            f"lora.modules-to-save); {instead}"
        )
    elif model.stacks:
        yield (
            f"{target} does not read adapters of experts as PEFT stacks them "
            f"(lora.target-parameters); {instead}"
        )
    elif any(shape.fan_in_fan_out for shape in model.shapes.values()):
        yield f"{target} cannot load an adapter of GPT-2's transposed weights; {instead}"
    if target == "vllm" and rank > VLLM_RANKS[-1]:
        yield f"--rank {rank}: vLLM takes {VLLM_RANKS[-1]} at most"


def most(target: str, rank: int) -> int:
    """The rank to cut to: the wanted one, or the most that the target takes; 0 is any."""
    return rank or (VLLM_RANKS[-1] if target == "vllm" else 0)


def serve_commands(
    target: str, config: Config, adapters: Sequence[tuple[str, Path]], rank: int
) -> list[str]:
    """Lines for a shell that serve these (name, directory), of at most this rank. May be none."""
    base = base_of(config)
    if target == "vllm":
        return [_vllm(config, base, adapters, rank)]
    if target == "llama.cpp":
        return [*_llama_cpp(base, adapters)]
    return []


def served_as(name: str) -> str:
    """A run's or client's name as a server may be asked for it."""
    return re.sub(r"[^\w.-]+", "-", name)


def _vllm(config: Config, base: str, adapters: Sequence[tuple[str, Path]], rank: int) -> str:
    room = next(r for r in VLLM_RANKS if r >= rank)
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(room)]
    if len(adapters) > 1:
        words += ["--max-loras", str(min(len(adapters), AT_ONCE))]
        words += ["--max-cpu-loras", str(len(adapters))]
    if config.model.revision:
        words += ["--revision", config.model.revision]
    if config.model.trust_remote_code:
        words += ["--trust-remote-code"]
    words += ["--dtype", config.model.dtype, "--lora-modules"]
    words += [f"{served_as(name)}={directory.resolve()}" for name, directory in adapters]
    return shlex.join(words)


def _llama_cpp(base: str, adapters: Sequence[tuple[str, Path]]) -> Iterator[str]:
    """In a directory with llama.cpp's source and programs."""
    local = base if os.path.isdir(base) else f"models/{base.replace('/', '--')}"
    if local != base:
        yield shlex.join(["hf", "download", base, "--local-dir", local])
    yield shlex.join(["python", "convert_hf_to_gguf.py", local, "--outfile", "base.gguf"])
    files = []
    for name, directory in adapters:
        files.append(f"{served_as(name)}.gguf")
        words = ["python", "convert_lora_to_gguf.py", str(directory.resolve()), "--base", local]
        yield shlex.join([*words, "--outfile", files[-1]])
    loads = [word for file in files for word in ("--lora", file)]
    apart = ["--lora-init-without-apply"] if len(files) > 1 else []
    yield shlex.join(["llama-server", "-m", "base.gguf", *loads, *apart])
