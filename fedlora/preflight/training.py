"""How steps are taken, where that does not go with the task or with privacy."""

from collections.abc import Iterator

from fedlora.config.reader import Config
from fedlora.config.task_names import kind_of
from fedlora.strategies.forms import FORMS

SMOOTHED = (
    "classification", "token-classification", "causal-lm", "seq2seq", "image-classification",
)  # fmt: skip
"""The tasks whose loss knows train.label-smoothing: those of one class, or token, out of many."""


def problems(config: Config) -> Iterator[str]:
    """Each combination that cannot run, and what to do instead."""
    train, name = config.train, config.model.task
    if train.warmup_steps and train.lr_per == "round":
        yield (
            f"train.warmup-steps = {train.warmup_steps:g} with train.lr-per = 'round': all steps "
            "of a round have one rate; set train.lr-per = 'step'"
        )
    if train.gradient_accumulation_steps > 1 and config.privacy.by_example:
        yield (
            f"train.gradient-accumulation-steps = {train.gradient_accumulation_steps} with "
            "privacy.level = 'example': a private step is one random sample, which goes through "
            "the model in parts anyway; set privacy.sample-rate for its size, privacy.microbatch "
            "for the parts"
        )
    if train.neftune_noise_alpha and kind_of(name).pictured:
        yield (
            f"train.neftune-noise-alpha with model.task = {name!r}: it is noise on embeddings of "
            "tokens, and pictures have none; set it to 0"
        )
    if train.neftune_noise_alpha and train.prefix_cache:
        yield (
            "train.neftune-noise-alpha with train.prefix-cache: what is remembered of the first "
            "layers would have the same noise in every step; set one of them to 0"
        )
    if config.evaluate.steps:
        yield from _held_aside(config)
    if train.packing:
        yield from _packing(config)
    if train.label_smoothing and name not in SMOOTHED:
        yield (
            f"train.label-smoothing with model.task = {name!r}: it deals a label's weight out over "
            f"the other classes, and is of {', '.join(SMOOTHED)} alone; set it to 0"
        )
    elif train.label_smoothing and train.loss:
        yield "train.label-smoothing with train.loss: the loss is your own; smooth in it, or set 0"


def _held_aside(config: Config) -> Iterator[str]:
    """Where there are no rows to score, or their scores may not leave: training/held_aside.py."""
    privacy, what = config.privacy, f"evaluate.steps = {config.evaluate.steps:g}"
    if not config.data.client_validation_fraction:
        yield f"{what}: clients hold no rows aside; set data.client-validation-fraction, or 0"
    if config.secure.aggregation:
        yield f"{what} with secure.aggregation: clients' scores stay with them; set it to 0"
    if privacy.by_example or (privacy.on and not privacy.release_metrics):
        yield (
            f"{what} with privacy: no noise covers what clients say of their validation rows; set "
            "it to 0"
        )


def _packing(config: Config) -> Iterator[str]:
    """What has a meaning for a row of one example alone: training/data/packing.py."""
    train, what = config.train, "train.packing"
    if config.model.task != "causal-lm":
        yield (
            f"{what} with model.task = {config.model.task!r}: it is of causal-lm alone, whose "
            "attention looks back; set it to false"
        )
    if config.privacy.by_example:
        yield (
            f"{what} with privacy.level = 'example': gradients are told apart by row, and a row of "
            "several examples would be one unit; set it to false, or privacy.level = 'client'"
        )
    if train.loss:
        yield f"{what} with train.loss: your own loss reads one row an example; set it to false"
    if train.prefix_cache:
        yield (
            f"{what} with train.prefix-cache: what is remembered is an example's in a row of its "
            "own; set one of them to 0 or false"
        )
    if FORMS[config.lora.form].after:
        yield (
            f"{what} with lora.form = {config.lora.form!r}: the adapter begins at one place in a "
            "row; set it to false"
        )
    if train.compile:
        yield f"{what} with train.compile: steps differ in their number of rows; set one to false"
