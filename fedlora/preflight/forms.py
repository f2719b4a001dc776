"""Adapter forms, initialisations and quantised bases that cannot run: docs/extend/forms.md."""

import difflib
from collections.abc import Iterator
from typing import Any

from fedlora.config.reader import Config
from fedlora.federation.server.ranks import BY_MODULE
from fedlora.strategies.base import Strategy
from fedlora.strategies.forms import (
    CALIBRATED,
    FORMS,
    INITS,
    INITS_LEFT_OUT,
    LEFT_OUT,
    ON_QUANTISED,
    ONE_RANK,
    Form,
    is_init,
    moves_base,
    problem,
)


def problems(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Why the config's form, initialisation and base cannot run, and what to do instead."""
    lora = config.lora
    yield from _rule(config)
    yield from _init(lora.init, lora.form)
    yield from (*_calibration(config), *_places(config))
    if lora.form not in FORMS:
        near = difflib.get_close_matches(lora.form, [*FORMS, *LEFT_OUT], n=1)
        why = LEFT_OUT.get(lora.form) or (
            f"no such form{f'; did you mean {near[0]!r}?' if near else ''}; `fedlora forms` lists "
            "them"
        )
        yield f"lora.form = {lora.form!r}: {why}"
        return
    form = FORMS[lora.form]
    if lora.rank_pattern and (form.kind != "factors" or config.ranks.policy in BY_MODULE):
        yield (
            f"lora.rank-pattern with lora.form = {lora.form!r} and ranks.policy = "
            f"{config.ranks.policy!r}: it gives LoRA's factors their ranks, and the policy has a "
            "rule of its own; leave it empty"
        )
    if reason := problem(form, strategy):
        yield f"lora.form = {lora.form!r} with strategy.name = {config.strategy.name!r}: {reason}"
    if lora.form != "lora" and config.robust.method != "none" and form.kind != "factors":
        yield (
            f"robust.method = {config.robust.method!r}: it judges updates by their products B A, "
            f"and {lora.form} has none; use lora.form = 'lora'"
        )
    yield from _invocation(config, form)
    if any(site.rank for site in config.data.clients) and (form.kind != "factors" or form.after):
        yield (
            f"lora.form = {lora.form!r}: every client has the same tensors; leave out each site's "
            "rank in data.clients"
        )
    if config.model.adapter:
        yield from _started(config)
    if config.model.quantization != "none":
        yield from _quantised(config)
    if moves_base(lora.init) and config.wire.dtype != "float32":
        yield (
            f"lora.init = {lora.init!r} with wire.dtype = {config.wire.dtype!r}: A and B hold W0's "
            "leading part, which would be rounded on the way; use wire.dtype = 'float32'"
        )
    if form.kind == "factors":
        if lora.options:
            yield f"lora.options: PEFT's own settings of a form; {lora.form} has keys of its own"
        return
    if not form.size:
        if config.clients.ranks != type(config.clients)().ranks or config.ranks.policy != "list":
            yield (
                f"lora.form = {lora.form!r}: has one size, of which clients.ranks and ranks.policy "
                "say nothing; leave both out"
            )
    elif len(set(config.clients.ranks)) > 1 or config.ranks.policy not in ("list", "capability"):
        yield (
            f"lora.form = {lora.form!r}: every client has the same tensors; set one rank in "
            "clients.ranks, and ranks.policy = 'list'"
        )
    if lora.use_rslora:
        yield f"lora.use-rslora = true: is the scale of LoRA's factors; {lora.form} has none"


def _rule(config: Config) -> Iterator[str]:
    train, rule = config.train, config.train.rule
    if rule == "plain":
        return
    if config.lora.form != "lora" or config.lora.target_parameters:
        yield (
            f"train.rule = {rule!r}: is of LoRA's A and B of a module; use lora.form = 'lora' "
            "without lora.target-parameters, or train.rule = 'plain'"
        )
    if config.privacy.by_example:
        yield (
            f"train.rule = {rule!r} with privacy.level = 'example': its private step has a loop of "
            "its own; use train.rule = 'plain'"
        )
    if train.precision == "float16" and rule in ("coto", "dylora"):
        yield (
            f"train.rule = {rule!r} with train.precision = 'float16': a step whose gradients "
            "overflow is left out, and with it what the rule puts back; use 'bfloat16'"
        )
    if rule == "preconditioned" and (train.lr_ratio_b != 1 or train.optimizer not in PLAIN):
        yield (
            "train.rule = 'preconditioned': PEFT makes its optimiser with one rate for all; use "
            f"train.lr-ratio-b = 1 and train.optimizer = {' or '.join(PLAIN)}"
        )


PLAIN = ("auto", "adamw", "sgd")
"""torch's own optimisers."""


def _invocation(config: Config, form: Form) -> Iterator[str]:
    lora = config.lora
    if not form.after:
        if lora.invocation:
            yield f"lora.invocation: is alora's; {lora.form} acts on every token; leave it empty"
        return
    if config.model.task != "causal-lm":
        yield (
            f"lora.form = {lora.form!r} with model.task = {config.model.task!r}: what a classifier "
            "reads is no continuation; use lora"
        )
    if not lora.invocation:
        yield (
            f"lora.form = {lora.form!r}: needs lora.invocation, a text that every prompt has, such "
            "as the head of the assistant's turn in the chat template"
        )
    if len(set(config.clients.ranks)) > 1 or config.ranks.policy not in ("list", "capability"):
        yield f"lora.form = {lora.form!r}: {ONE_RANK}"


def _quantised(config: Config) -> Iterator[str]:
    model, form = config.model, config.lora.form
    if config.lora.init == "loftq" and model.quantization != "4bit":
        what = f"lora.init = 'loftq' with model.quantization = {model.quantization!r}"
        yield f"{what}: is of 4 bits; use '4bit'"
    if form not in ON_QUANTISED:
        yield (
            f"lora.form = {form!r} with model.quantization = {model.quantization!r}: this form "
            f"reads W0; use {', '.join(ON_QUANTISED)}"
        )
    if model.merge == "into-base":
        yield (
            f"model.merge = 'into-base' with model.quantization = {model.quantization!r}: "
            "quantised weights cannot take a change; use 'keep-as-adapter' or 'auto'"
        )


def _started(config: Config) -> Iterator[str]:
    """What no export could hold together with the adapter that a run starts from."""
    lora, stored = config.lora, config.model.quantization
    if lora.form != "lora":
        yield (
            f"model.adapter with lora.form = {lora.form!r}: both changes are exported as one "
            "adapter of plain LoRA; use lora.form = 'lora', or merge that adapter into a base"
        )
    if lora.init == "loftq" and stored != "none":
        yield (
            f"model.adapter with lora.init = 'loftq' and model.quantization = {stored!r}: LoftQ "
            "reads the whole base once more, without the adapter; use lora.init = 'default'"
        )


def _init(init: str, form: str) -> Iterator[str]:
    kind = FORMS[form].kind if form in FORMS else "factors"
    if kind != "factors" and init != "default":
        yield f"lora.init = {init!r}: is of LoRA's factors; {form} begins as PEFT begins it"
    elif init in INITS_LEFT_OUT:
        yield f"lora.init = {init!r}: {INITS_LEFT_OUT[init]}"
    elif not is_init(init):
        yield f"lora.init = {init!r}: must be {', '.join(INITS)} or pissa_niter_N"
    elif moves_base(init) and form == "dora":
        yield f"lora.init = {init!r}: moves the base, whose norm DoRA divides by; use 'default'"
    elif moves_base(init) and form in FORMS and FORMS[form].after:
        yield (
            f"lora.init = {init!r}: takes s B A out of the base on every token, and {form} gives "
            "it back from its invocation on only; use 'default' or 'eva'"
        )


def _places(config: Config) -> Iterator[str]:
    if config.lora.places and not config.lora.by_gradient:
        yield (
            "lora.places: written by a run whose form chooses by gradient (lora.options choice = "
            "gradient); leave it empty"
        )


def _calibration(config: Config) -> Iterator[str]:
    init, path = config.lora.init, config.lora.calibration
    if init not in CALIBRATED:
        if path:
            yield (
                f"lora.calibration = {path!r}: only lora.init = {', '.join(CALIBRATED)} read rows; "
                "set one of them, or leave it empty"
            )
        return
    if not path:
        yield (
            f"lora.init = {init!r}: looks at rows, and the clients' stay with them; name rows that "
            "are no client's, such as a public text of the same kind, in lora.calibration"
        )
    if path and path in (config.data.path, config.data.test_path, config.data.validation_path):
        yield (f"lora.calibration = {path!r}: these rows train or test the model; name other ones")
    if config.personalize.alone:
        yield (
            f"personalize.alone = true with lora.init = {init!r}: a client alone has no "
            "calibration rows to begin from; set it to false"
        )
    if init == "lora_ga" and config.model.quantization != "none":
        yield (
            f"lora.init = 'lora_ga' with model.quantization = {config.model.quantization!r}: "
            "quantised weights have no gradient; use eva or corda"
        )
