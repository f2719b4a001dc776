"""Settings that conflict with what the task is: fedlora/training/tasks."""

from collections.abc import Iterator
from importlib.util import find_spec

from fedlora.config.metric_names import FURTHER, OWN, code_of, lacking, packages
from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.config.task_names import kind_of
from fedlora.strategies.forms import FORMS
from fedlora.training.user_code import is_code


def problems(config: Config) -> Iterator[str]:
    """Each combination that cannot run, and what to do instead."""
    name, data = config.model.task, config.data
    task = kind_of(name)
    if missing := [package for package in task.needs if not find_spec(package)]:
        yield (
            f"model.task = {name!r}: its scores are made by {' and '.join(missing)}, which is not "
            "installed; pip install 'fedlora[metrics]'"
        )
    yield from _metrics(config)
    if config.model.pooling == "mean" and not task.pooled:
        yield (
            f"model.pooling = 'mean' with model.task = {name!r}: it is of tasks with one output a "
            "text; leave it at 'auto'"
        )
    if data.text_pair and not task.pooled:
        yield (
            f"data.text-pair with model.task = {name!r}: is read by tasks with one output a text "
            "or pair; leave it out"
        )
    if data.label_separator and name != "multi-label":
        yield f"data.label-separator with model.task = {name!r}: is read by multi-label alone"
    if name == "regression" and data.map:
        yield "data.map with model.task = 'regression': it renames labels, and numbers are none"
    if name == "seq2seq":
        yield from _seq2seq(config)
    if name == "preference":
        yield from _preference(config)
    elif config.data.rejected != DataConfig().rejected:
        yield f"data.rejected with model.task = {name!r}: is read by preference alone"
    if data.messages and name not in ("causal-lm", "preference"):
        yield f"data.messages with model.task = {name!r}: is read by causal-lm and preference alone"
    elif data.messages and name == "causal-lm" and (data.prompt or data.map):
        yield (
            "data.messages with data.prompt or data.map: a conversation has its own prompts and "
            "answers; leave them out"
        )
    if task.pictured:
        yield from _pictures(config)
    elif data.image != DataConfig().image:
        yield f"data.image with model.task = {name!r}: is read by image-classification alone"
    if data.labels and not task.headed:
        yield f"data.labels with model.task = {name!r}: it chooses from no labels; leave it out"


def _metrics(config: Config) -> Iterator[str]:
    """Names of metrics that the task has not, or whose package is not here."""
    metrics, predicts = config.evaluate.metrics, kind_of(config.model.task).predicts
    for name in lacking(metrics, predicts):
        there = ", ".join([*OWN.get(predicts, ()), *FURTHER.get(predicts, ())])
        what = f"which has {there}" if there else "which has its own alone"
        yield f"evaluate.metrics: {name!r} is none of model.task = {config.model.task!r}, {what}"
    if config.data.node_path and kind_of(config.model.task).answers:
        return  # a node's rows are scored without answers
    if absent := [x for x in packages(metrics, predicts) if not find_spec(x)]:
        one = "is" if len(absent) == 1 else "are"
        yield (
            f"evaluate.metrics: they are made by {' and '.join(absent)}, which {one} not "
            "installed; pip install 'fedlora[metrics]'"
        )


def _seq2seq(config: Config) -> Iterator[str]:
    if not config.data.prompt and not any(site.prompt for site in config.data.clients):
        yield "data.prompt is empty: model.task = 'seq2seq' reads it, and writes data.response"
    if config.data.chat_template:
        yield (
            "data.chat-template with model.task = 'seq2seq': its text and its response are apart; "
            "leave it out"
        )
    if config.train.prefix_cache:
        yield (
            "train.prefix-cache with model.task = 'seq2seq': what enters a decoder's layers hangs "
            "on two texts; set it to 0"
        )


def _pictures(config: Config) -> Iterator[str]:
    what = f"model.task = {config.model.task!r}"
    if is_code(config.model.path) or config.model.tokenizer:
        yield (
            f"model.path or model.tokenizer as code with {what}: the image processor is read from "
            "the model's own files; name a directory or a hub id, and leave model.tokenizer out"
        )
    if FORMS[config.lora.form].after:
        yield f"lora.form = {config.lora.form!r} with {what}: no picture has an invocation"
    if config.devices.classes:
        yield f"devices.classes with {what}: its clock counts tokens; leave it out"


def _preference(config: Config) -> Iterator[str]:
    data = config.data
    if not (data.prompt or data.messages or any(x.prompt or x.messages for x in data.clients)):
        yield (
            "data.prompt is empty: model.task = 'preference' compares answers to a prompt; of "
            "conversations name the chosen ones in data.messages"
        )
    if config.train.loss:
        yield "train.loss with model.task = 'preference': its loss is of two answers; leave it out"
    if code_of(config.evaluate.metrics):
        yield (
            "evaluate.metrics with model.task = 'preference': nothing is generated to compare; "
            "leave it out"
        )
    if config.data.map:
        yield "data.map with model.task = 'preference': it renames labels, and there are none"
