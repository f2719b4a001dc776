"""What a strategy brings where a config says nothing: its rate, its start, its scale.

A strategy declares them as a class attribute,

    defaults: ClassVar[Defaults] = Defaults(rates={"classification": 2e-2})

and one without takes the task family's own. The rates are of AdamW, without example-level privacy;
fedlora/config/defaults.py says what there is elsewhere. A rate was searched for a task family with
plain LoRA, "classification", or for a form within it, "classification/vera"; and each form's with
fedavg, for all strategies that have none of their own for it. What was not searched follows a named
rule: see `rate`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

FAMILIES: Mapping[str, float] = {"classification": 2e-3, "causal-lm": 2e-3}
"""Of each family of tasks, those that read a text and those that write one, the rate of a strategy
that declares none."""
SEARCHED_IN = "classification"
"""The family whose search the others follow."""
FEW_MODULES = 12
"""The more modules are adapted, the lower the rate must be. With at most so many it may be higher
than one that stands all linear modules: see `Defaults.few`."""

OF_FORMS: Mapping[str, float] = {
    "vera": 0.2, "randlora": 1e-2, "gralora": 1e-2, "loha": 2e-2, "lokr": 5e-2, "hira": 0.1,
    "fourierft": 5e-2, "waveft": 2e-3, "c3a": 2e-2, "shira": 2e-2, "miss": 2e-3, "bat": 2e-3,
    "ia3": 0.1, "beft": 2e-2, "supertuning": 5e-2, "oft": 1e-2, "hra": 2e-2, "road": 5e-2,
    "vblora": 2e-2, "tinylora": 2e-2, "psoft": 1e-2, "lora-xs": 2e-2, "pmss": 5e-2, "paca": 2e-2,
    "loldu": 1e-2, "losia": 2e-2, "smt": 2e-2, "melora": 1e-2, "moslora": 5e-3, "lora-mini": 1e-2,
    "nora": 1e-2, "lotr": 2e-2, "msplora": 1e-2,
}  # fmt: skip
"""Of each adapter form whose search found one, in SEARCHED_IN, the rate with fedavg. None of
"dora", which is of LoRA's factors and goes with strategies that need other rates than fedavg; nor
of "delora", of which no rate stands all linear modules: docs/extend/forms.md."""

Rule = Literal[
    "searched", "few modules", "of the form", "as with lora", "as in its family", "of the task"
]
RULES: Mapping[Rule, str] = {
    "searched": "found by search",
    "few modules": f"found by search with at most {FEW_MODULES} modules",
    "of the form": f"found by search for this form, with fedavg and {SEARCHED_IN}",
    "as with lora": "found by search with lora, not with this form",
    "as in its family": f"not searched for this task: found by search for {SEARCHED_IN}",
    "of the task": "not searched with this strategy: the task's rate",
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a strategy trains with where the config leaves a key out."""

    rates: Mapping[str, float] = field(default_factory=dict)
    """train.lr by "task" or "task/form". What is not in it follows: see `rate`."""
    init: str = "default"
    """lora.init."""
    alpha: float = 16.0
    """lora.alpha."""
    few: Mapping[str, float] = field(default_factory=dict)
    """As `rates`, where at most FEW_MODULES modules are adapted."""

    def problems(self) -> list[str]:
        """What is wrong with them, a sentence each."""
        tables = {"rates": self.rates, "few": self.few}
        found = [f"{x}: must be a mapping" for x, t in tables.items() if not isinstance(t, Mapping)]
        if found:
            return found
        declared = [(f"{x}[{key!r}]", key, lr) for x, t in tables.items() for key, lr in t.items()]
        for where, key, lr in declared:
            if not (isinstance(key, str) and key.partition("/")[0]):
                found.append(f"{where}: must be a task, or a task and a form, 'task/form'")
            if not (isinstance(lr, float) and 0 < lr <= 1e6):
                found.append(f"{where} = {lr!r}: must be a float above 0, at most 1e6")
        if not (isinstance(self.alpha, float) and 0 < self.alpha < float("inf")):
            found.append(f"alpha = {self.alpha!r}: must be a float above 0")
        if not (isinstance(self.init, str) and self.init not in ("", "auto")):
            found.append(f"init = {self.init!r}: must be a name that lora.init takes")
        return found


@runtime_checkable
class BringsDefaults(Protocol):
    """What a strategy may have beside the protocol: `defaults`, as a class attribute."""

    defaults: Defaults


def defaults_of(cls: Any) -> Defaults:
    """What a strategy's class declares, or else that it declares nothing of its own."""
    found = cls.defaults if isinstance(cls, BringsDefaults) else None
    return found if isinstance(found, Defaults) else Defaults()


def rate(
    defaults: Defaults, task: str, form: str, family: str, few: bool = False
) -> tuple[float, Rule]:
    """AdamW's rate for a task of a family with an adapter form, and the rule that it follows; few:
    at most FEW_MODULES modules are adapted.

    The first that there is: the strategy's own for the form; the form's, where the task is of the
    family that was searched; that of lora in this task; of the family that was searched, where the
    task is of it; the family's own. So what was found for tasks that read a text says nothing of
    those that write one.

    >>> rate(Defaults({"classification": 2e-2}), "regression", "lora", "classification")
    (0.02, 'as in its family')
    >>> rate(Defaults({"classification": 2e-2}), "seq2seq", "lora", "causal-lm")
    (0.002, 'of the task')
    """
    searched = family == SEARCHED_IN
    rates = {**defaults.rates, **defaults.few} if few else defaults.rates
    if form != "lora":
        if (of_form := f"{task}/{form}") in rates:
            return rates[of_form], "searched"
        if searched and form in OF_FORMS:
            return OF_FORMS[form], "of the form"
    if task in rates:
        own: Rule = "few modules" if few and task in defaults.few else "searched"
        return rates[task], own if form == "lora" else "as with lora"
    if searched and family in rates:
        return rates[family], "as in its family"
    return FAMILIES[family], "of the task"
