"""Settings that conflict with the user's own model, data, loss or metrics: training/user_code.py"""

from collections.abc import Iterator

from fedlora.config.metric_names import OWN
from fedlora.config.reader import Config
from fedlora.config.task_names import kind_of
from fedlora.training import user_code


def problems(config: Config) -> Iterator[str]:
    """Each combination that cannot run, and what to do instead. Imports none of the code."""
    yield from _live(config)
    if user_code.is_code(config.model.path):
        yield from _model(config)
    answers = config.evaluate.generate_tokens or not kind_of(config.model.task).generates
    further = [x for x in config.evaluate.metrics if x not in OWN["answers"]]
    if further and not answers:
        yield (
            f"evaluate.metrics: for {config.model.task} it compares generated answers, and "
            "evaluate.generate-tokens = 0; set that to the tokens of an answer"
        )


def _live(config: Config) -> Iterator[str]:
    """Objects without a name are this process's alone."""
    for key, value in user_code.named(config):
        if not user_code.is_live(value):
            continue
        if config.simulate.workers != 1:
            yield (
                f"{key} is an object of this process, fit for simulate.workers = 1 alone; set "
                f"that, or {user_code.INSTEAD}"
            )
        elif config.run.resume:
            yield (
                f"{key} is an object of this process, and no other can tell whether it is the one "
                f"that the run began with; {user_code.INSTEAD}"
            )


def _model(config: Config) -> Iterator[str]:
    """A model that the user's function makes has no directory to read anything else from."""
    m = config.model
    if not m.tokenizer:
        yield (
            f"model.path = {m.path!r} has no tokenizer beside it; set model.tokenizer to a "
            'function that returns one, "py:package.module:function"'
        )
    if m.quantization != "none":
        yield f"model.quantization = {m.quantization!r}: {m.path} makes the model as it is to be"
    if m.pooling == "mean":
        yield (
            "model.pooling = 'mean': a model of your own has its head already; leave it at 'auto'"
        )
