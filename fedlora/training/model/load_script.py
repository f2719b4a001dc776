"""The few lines of Python that load an export with transformers, PEFT and safetensors alone.

They stand in every export's README.md, and the check of an export runs them as they stand there.
"""

import os
from collections.abc import Sequence

from fedlora.config.reader import Config
from fedlora.training.data.locate import locate
from fedlora.training.model.gguf import converted
from fedlora.training.model.processor import BACKEND
from fedlora.training.model.quantized import in_python
from fedlora.training.tasks import task_of
from fedlora.training.user_code import PREFIX, is_code, is_live

MEAN = """

def logits(batch):
    \"\"\"(texts, labels): the linear head on the mean of the encoder's token states.\"\"\"
    with torch.no_grad():
        hidden = model(**batch)[0]
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    mean = ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).float()
    return mean @ head["classifier.weight"].float().T + head["classifier.bias"].float()
"""
DIRECT = """

def logits(batch):
    \"\"\"(texts, labels), or (texts, tokens, vocabulary) of a language model.\"\"\"
    with torch.no_grad():
        found = model(**batch)
    return getattr(found, "logits", found)
"""


PICTURES = """

def logits(batch):
    \"\"\"(pictures, labels).\"\"\"
    with torch.no_grad():
        return model(pixel_values=batch["pixel_values"].to(model.dtype)).logits
"""


def base_of(config: Config) -> str:
    """Where the base is: a directory by its whole path, a hub id, or "py:..." as it is."""
    path = config.model.path
    if is_code(path):
        return path
    found = locate(path)
    if found.endswith(".gguf"):
        found = converted(os.path.dirname(found), os.path.basename(found))
    return os.path.abspath(found) if os.path.exists(found) else found


def load_script(
    config: Config, labels: Sequence[str], merged: bool, end: int | None = None
) -> tuple[str, str]:
    """Python that defines `tokenizer`, `model`, `logits` and, of a classifier, `LABELS`.

    Of a model of pictures `processor` stands in the tokenizer's place.

    And a second piece, to go behind the first, that uses them. The first is run in the export's
    own directory. end: the token that a language model was trained to end with.
    """
    task = task_of(config.model.task)
    mean = task.pooled and config.model.pooling == "mean"
    auto = "AutoModel" if mean else task.auto
    code = is_code(config.model.path)
    lines = ["import torch"]
    lines += ["from peft import PeftModel"] if not merged else []
    lines += ["from safetensors.torch import load_file"] if mean else []
    reader = "AutoImageProcessor" if task.pictured else "AutoTokenizer"
    lines += [f"from transformers import {'' if code else f'{auto}, '}{reader}"]
    lines += in_python(config.model.quantization)[1]
    lines += ["", 'HERE = "."  # the directory of this file']
    lines += [f"LABELS = {list(labels)!r}"] if labels else []
    how = f', backend="{BACKEND}"' if task.pictured else ""
    what = "processor" if task.pictured else "tokenizer"
    lines += [f"{what} = {reader}.from_pretrained(HERE{how})"]
    lines += _own(config, labels, merged) if code else _model(config, labels, merged, auto)
    lines += [] if merged else ["model = PeftModel.from_pretrained(model, HERE)"]
    lines += ['head = load_file(f"{HERE}/classifier.safetensors")'] if mean else []
    lines += ["model.eval()", ""]
    logits = PICTURES if task.pictured else MEAN if mean else DIRECT
    return "\n".join(lines) + logits, task.script(config.data, end).lstrip()


def _model(config: Config, labels: Sequence[str], merged: bool, auto: str) -> list[str]:
    where = "HERE" if merged else repr(base_of(config))
    options = [where, f"dtype=torch.{config.model.dtype}"]
    told = {} if auto == "AutoModel" else task_of(config.model.task).options(labels)
    if "num_labels" in told:
        options += [f"num_labels={told['num_labels']}"]
    if config.model.revision and not merged:
        options += [f"revision={config.model.revision!r}"]
    options += ["trust_remote_code=True"] if config.model.trust_remote_code else []
    stored = in_python(config.model.quantization)[0]
    options += [f"quantization_config={stored}"] if stored else []
    made = [f"model = {auto}.from_pretrained(", *(f"    {x}," for x in options), ")"]
    if task_of(config.model.task).pictured:
        return made
    why = "the base may have none, and its padding would be read" if labels else "as in training"
    return [*made, f"model.config.pad_token_id = tokenizer.pad_token_id  # {why}"]


def _own(config: Config, labels: Sequence[str], merged: bool) -> list[str]:
    module, _, name = config.model.path.removeprefix(PREFIX).partition(":")
    if is_live(config.model.path):
        return ["model = ...  # your own model, as you gave it to the run"]
    loads = ['model.load_state_dict(load_file(f"{HERE}/model.safetensors"))'] if merged else []
    first = ["from safetensors.torch import load_file"] if merged else []
    made = f"model = {name.partition('.')[0]}({tuple(labels)!r})"
    return [*first, f"from {module} import {name.partition('.')[0]}  # your own code", made, *loads]
