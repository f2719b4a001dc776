"""GGUF files as models that transformers can save: converted once and cached."""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def converted_to(source: Path) -> Path:
    """Where a GGUF file's conversion is cached: two files of one name and size are two models."""
    found = source.stat()
    which = f"{source.resolve()}/{found.st_size}/{found.st_mtime_ns}"
    key = hashlib.sha256(which.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedlora"
    return cache / f"{source.stem}-{key}"


def converted(directory: str, gguf: str) -> str:
    """A directory with the GGUF's model in safetensors, made once and cached.

    A model that transformers loads from GGUF cannot be saved as it is, so its weights go into a
    clean model of the same configuration.
    """
    target = converted_to(Path(directory, gguf))
    cache = target.parent
    if target.exists():
        return str(target)
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar, of a few seconds, once
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=gguf, dtype=torch.float32
        )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(key, None)
    clean_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    clean = AutoModelForCausalLM.from_config(clean_config)
    clean.load_state_dict(loaded.state_dict(), strict=True)
    clean.tie_weights()
    with tempfile.TemporaryDirectory(dir=cache) as made:
        clean.save_pretrained(made)
        with contextlib.suppress(OSError):  # another process was first: its copy is the same
            shutil.copytree(made, target.with_suffix(".tmp"), dirs_exist_ok=True)
            os.replace(target.with_suffix(".tmp"), target)
    return str(target)
