"""Which modules of a model are adapted, their sizes, and PEFT's config for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import peft
from peft import LoraConfig, LoraGAConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedlora.config.reader import Config, parse_overrides
from fedlora.errors import ConfigError, ModelError
from fedlora.lora.adapter import Delta, Factors, Pair
from fedlora.lora.forms.base import OwnForm
from fedlora.strategies.base import Layer
from fedlora.strategies.forms import FORMS, Form, moves_base
from fedlora.training.model import loftq
from fedlora.training.model.alora import invocation
from fedlora.training.model.heads import head_names, within
from fedlora.training.model.own_tuner import OwnFormConfig
from fedlora.training.model.shape import Shape
from fedlora.training.model.stacks import ranks_of_stacks
from fedlora.training.model.targets import stacks_named, targeted


def find_layers(base: nn.Module, config: Config) -> dict[str, Shape]:
    """What lora.target-modules, lora.target-parameters and lora.layers name, with the sizes.

    Modules first, then experts, each of them a layer.

    Raises:
        ModelError: a target matches nothing (the names that would are listed), or a layer index.
    """
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, Shape] = {}
    for name, m in base.named_modules():
        if isinstance(m, Conv1D):
            k, d = m.weight.shape
            linear[name] = Shape(d, k, True)
        elif isinstance(m, nn.Linear):
            linear[name] = Shape(m.out_features, m.in_features, False)
    heads = head_names(base, config)
    linear = {n: s for n, s in linear.items() if not within(n, heads)}
    names = targeted(base, linear, config.lora.target_modules)
    stacks = [s for s in stacks_named(base, config.lora.target_parameters) if not within(s, heads)]
    experts = {n: shape for s in stacks for n, shape in _experts(base, s)}
    return _in_layers({n: linear[n] for n in names} | experts, config.lora.layers)


def _experts(base: nn.Module, stack: str) -> Iterator[tuple[str, Shape]]:
    """The layers of one stack; it says itself whether its weights lie (k, d)."""
    turned = bool(getattr(base.get_submodule(stack.rpartition(".")[0]), "is_transposed", False))
    E, *sizes = base.get_parameter(stack).shape
    d, k = reversed(sizes) if turned else sizes
    for e in range(E):
        yield f"{stack}.{e}", Shape(d, k, turned, stack)


def depth_of(name: str) -> int | None:
    """The transformer layer a module belongs to: the first number in its path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _in_layers(found: dict[str, Shape], layers: Sequence[str]) -> dict[str, Shape]:
    if not layers:
        return found
    depths = [d for n in found if (d := depth_of(n)) is not None]
    total = max(depths, default=-1) + 1
    try:
        wanted = {int(i) % total if -total <= int(i) < total else -1 for i in layers}
    except (ValueError, ZeroDivisionError):
        wanted = {-1}
    if -1 in wanted:
        raise ModelError(
            f"lora.layers = {','.join(layers)}: must be indices from {-total} to {total - 1}"
        )
    return {n: s for n, s in found.items() if depth_of(n) in wanted}


def adapter_config(
    config: Config, shapes: Mapping[str, Shape], ranks: Mapping[str, int], heads: Sequence[str]
) -> Any:
    """PEFT's config for these ranks; each module named in full, so that nothing else matches.

    heads: the modules that are trained whole.

    Raises:
        ModelError: experts of one parameter differ in rank.
    """
    lora, form = config.lora, FORMS[config.lora.form]
    stacks = ranks_of_stacks(ranks, shapes)
    top = max(stacks.values() or ranks.values())  # PEFT warns of a pattern for experts
    if form.kind != "factors":
        return form_config(config, form, shapes, ranks, top, heads)
    modules = {m: r for m, r in ranks.items() if not shapes[m].stack}
    return LoraConfig(
        alora_invocation_tokens=invocation(config.model, lora.invocation) if form.after else None,
        task_type="CAUSAL_LM" if form.after else None,  # PEFT looks for the invocation there only
        r=top,
        lora_alpha=lora.alpha,
        rank_pattern={f"^{m}$": r for m, r in {**modules, **stacks}.items() if r != top},
        target_modules=list(modules),
        target_parameters=list(stacks) or None,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.form == "dora",
        fan_in_fan_out=any(shapes[m].fan_in_fan_out for m in modules),
        modules_to_save=[*heads] or None,
    )  # lora.init is done once, by `initial`: attaching never touches W0


def check_targets(shapes: Mapping[str, Shape], base: nn.Module) -> None:
    """Nothing, where PEFT has adapted all modules of its base that it was told to.

    Raises:
        ModelError: in a mixture it has taken some for experts, by names that transformers 4 gave.
    """
    wanted = [m for m, shape in shapes.items() if not shape.stack]
    if taken := [m for m in wanted if not isinstance(base.get_submodule(m), BaseTunerLayer)]:
        names = ", ".join(sorted({m.rpartition(".")[2] for m in taken}))
        raise ModelError(
            f"lora.target-modules: PEFT takes {names} for this model's experts, which had such "
            "names once; name other modules, such as the attention's ('auto'), and experts in "
            "lora.target-parameters"
        )


OWN_SETTINGS = {
    "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}
"""What PEFT asks for beside the init's name: its own defaults."""


def initial(
    W: Tensor, rank: int, scale: float, init: str, found: Mapping[str, Any] | None = None
) -> Pair:
    """A (rank, k) and B (d, rank) as PEFT's lora.init makes them from W0 (d, k), which stays.

    `found` is what PEFT wants to find on the layer: see `calibration`. Draws from the global
    generator, as PEFT does: seed it.
    """
    d, k = W.shape
    scratch = nn.Linear(k, d, bias=False, device=W.device)
    scratch.weight.data = W.detach().float().clone()
    for name, value in (found or {}).items():
        setattr(scratch, name, value)
    settings = LoraConfig(init_lora_weights=init, **OWN_SETTINGS.get(init, {}))
    try:
        made = LoraLinear(scratch, "x", config=settings, r=rank, lora_alpha=scale * rank)
    except ValueError as e:
        raise ModelError(f"lora.init = {init!r}: {e}; change clients.ranks") from e
    A, B = made.lora_A["x"].weight.detach(), made.lora_B["x"].weight.detach()
    return Pair(A.contiguous(), B.contiguous(), scale)


def first_pairs(
    config: Config, layers: Mapping[str, Layer], W: Mapping[str, Tensor]
) -> dict[str, Pair]:
    """The pairs that lora.init makes from the weights W (d, k) alone, by module."""
    if config.lora.init == "loftq":
        return loftq.pairs(W, config.model, layers, config.run.seed)
    return {m: initial(W[m], x.rank, x.scale, config.lora.init) for m, x in layers.items()}


def taken_out(config: Config, factors: Factors, W: Mapping[str, Tensor]) -> Mapping[str, Delta]:
    """What lora.init takes out of the base, -s B A of the first factors; of most inits nothing.

    With it W0 + taken out + s B A = W0, so training starts from W0; from near it under LoftQ, which
    takes out what rounding W0 (d, k) loses.
    """
    if not moves_base(config.lora.init, config.model.quantization):
        return {}
    if config.lora.init == "loftq":
        return {m: loftq.nf4(W[m]) - W[m].float() for m in factors.A}
    return {m: replace(pair, scale=-pair.scale) for m, pair in factors.adapter().items()}


RESERVED = {"target_modules", "modules_to_save", "peft_type", "task_type", "inference_mode"}
ALPHAS = ("alpha", "randlora_alpha", "psoft_alpha")
SEEDS = ("projection_prng_key", "projection_seed", "random_loc_seed", "random_seed")
"""What PEFT calls alpha, and the seed of what a form freezes."""


def form_config(
    config: Config,
    form: Form,
    shapes: Mapping[str, Shape],
    modules: Mapping[str, int],
    size: int,
    heads: Sequence[str],
) -> Any:
    """PEFT's config of a form that is not LoRA: all that it draws is drawn from run.seed.

    Raises:
        ConfigError: lora.options names what the form has not.
    """
    if form.own:
        return own_config(config, form.own, modules, size, heads)
    lora, cls = config.lora, getattr(peft, form.config)
    known = {f.name for f in fields(cls)}
    wanted: dict[str, Any] = dict.fromkeys(ALPHAS, lora.alpha)
    wanted |= dict.fromkeys(SEEDS, config.run.seed)
    wanted["fan_in_fan_out"] = any(shapes[m].fan_in_fan_out for m in modules)
    settings = {name: value for name, value in wanted.items() if name in known} | dict(form.given)
    if form.size:
        settings[form.size] = size
    if lora.dropout:
        name = next((n for n in known if n in ("module_dropout", f"{lora.form}_dropout")), "")
        if not name:
            raise ConfigError([f"lora.dropout: {lora.form} has none; set it to 0"])
        settings[name] = lora.dropout
    options = parse_overrides([*lora.options])
    if unknown := [key for key in options if key not in known - RESERVED - {form.size}]:
        raise ConfigError(
            [f"lora.options: {lora.form} has no {unknown[0]!r}; "
             f"it has {', '.join(sorted(known - RESERVED - {form.size}))}"]
        )  # fmt: skip
    try:
        return cls(
            target_modules=list(modules), modules_to_save=[*heads] or None, **settings, **options
        )
    except (TypeError, ValueError) as e:
        raise ConfigError([f"lora.form = {lora.form!r}: {e}"]) from e


def places_of(config: Config) -> dict[str, list[str]]:
    """lora.places by module."""
    return {m: text.split() for m, _, text in (x.partition("=") for x in config.lora.places)}


def own_config(
    config: Config, own: type[OwnForm], modules: Mapping[str, int], size: int, heads: Sequence[str]
) -> OwnFormConfig:
    """The same of a form of this library's own, whose options are its fields.

    Raises:
        ConfigError: lora.options names what it has not, or a value that it cannot have.
    """
    lora, options = config.lora, parse_overrides([*config.lora.options])
    known: Any = own  # a dataclass
    names = [f.name for f in fields(known)]
    for key, value in options.items():
        if key not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise ConfigError([f"lora.options: {lora.form} has no {key!r}; {has}"])
        default = getattr(own(), key)
        words = get_args(get_type_hints(own)[key])  # of a Literal
        if type(value) is not type(default) or (words and value not in words):
            must = " or ".join(words) or type(default).__name__
            raise ConfigError([f"lora.options: {lora.form}'s {key} = {value!r}: must be {must}"])
    return OwnFormConfig(
        form=lora.form,
        r=size,
        alpha=lora.alpha,
        seed=config.run.seed,
        form_dropout=lora.dropout,
        options=options,
        places=places_of(config),
        target_modules=list(modules),
        modules_to_save=[*heads] or None,
    )
