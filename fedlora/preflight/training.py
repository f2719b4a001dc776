"""How steps are taken, where that does not go with the task or with privacy."""

from collections.abc import Iterator

from fedlora.config.reader import Config
from fedlora.config.task_names import kind_of

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
    if train.label_smoothing and name not in SMOOTHED:
        yield (
            f"train.label-smoothing with model.task = {name!r}: it deals a label's weight out over "
            f"the other classes, and is of {', '.join(SMOOTHED)} alone; set it to 0"
        )
    elif train.label_smoothing and train.loss:
        yield "train.label-smoothing with train.loss: the loss is your own; smooth in it, or set 0"
