"""What a node with a policy makes of a run's config: `admit`, a function of its arguments alone.

It starts from the defaults and copies over only what allowed.py lists, each key within its range.
The node's rows, columns, ledger, memory, devices and models are the policy's, whatever the run says
of them. Anything else is refused before a file of the node is opened: the server hears which keys,
the node's own audit why.

The config that comes out agrees with the server's in every key of ALLOWED: so the digest of the
server's config, which is compared before (`job.read_config`), still says that both sides mean the
same run.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from fedlora.config.fields import flat_list
from fedlora.config.policy import Policy
from fedlora.config.reader import Config, Scalar
from fedlora.errors import PolicyError
from fedlora.federation.client.allowed import ALLOWED, IGNORED, OF_A_SHARED_CORPUS, OWN
from fedlora.federation.secure.terms import Terms
from fedlora.federation.wire.job import Job
from fedlora.strategies import STRATEGIES
from fedlora.strategies.forms import FORMS
from fedlora.training.data.row_units import by_value
from fedlora.training.user_code import is_code

Against = Iterator[tuple[str, str]]
"""(what, why) of all that a policy is against: what leaves the node, and why stays."""
LABELS, CHARACTERS = 10_000, 1000
"""Of a job: how many labels, and how long one may be."""


def admit(policy: Policy, run_config: Mapping[str, Any], job: Job) -> Config:
    """The config that this node runs.

    Raises:
        ConfigError: the run's is none that parses.
        PolicyError: the policy is against it; says against which keys.
    """
    asked = Config.read({**run_config, **job.changes})
    check([*_config(policy, asked), *_job(policy, job)])
    return Config.read({**_taken(policy, asked), **_own(policy, asked)})


def check(against: list[tuple[str, str]]) -> None:
    """Nothing, where a policy has nothing against what is asked.

    Raises:
        PolicyError: there is anything; its words are fixed, and name each thing once.
    """
    if against:
        what = ", ".join(dict.fromkeys(what for what, _ in against))
        reasons = [f"{what}: {why}" for what, why in against]
        raise PolicyError(f"this node's policy does not allow {what}; ask its operator", reasons)


def check_message(policy: Policy, kind: str, now: datetime) -> None:
    """Nothing, where the node answers messages of this kind at this time.

    Raises:
        PolicyError: it does not.
    """
    plain = kind.split("_")[0]
    if plain not in policy.limits.kinds:
        check([(f"messages of kind {plain}", "not in limits.kinds")])
    if plain != "query" and not policy.hours.open_at(now):
        check([("work at this hour", f"hours, and it is {now:%a %H:%M}")])


def check_terms(policy: Policy, terms: Terms) -> Terms:
    """The terms of a secure aggregation, where the policy is content with them.

    Raises:
        PolicyError: it is not.
    """
    s = policy.secure
    against = []
    if terms.cohort < s.fewest:
        against.append(("so few clients", f"{terms.cohort}, secure.fewest = {s.fewest}"))
    if terms.threshold < s.threshold:
        found = f"{terms.threshold}, secure.threshold = {s.threshold}"
        against.append(("secure.reconstruction-threshold", found))
    if s.members and terms.ring:
        why = "a ring holds against no server that lies, and secure.members says that this may"
        against.append(("secure.num-shares", why))
    colluding = max(s.colluding, terms.colluding)
    if reason := terms.problem(colluding):
        against.append((f"a sum with secure.colluding = {terms.colluding}", reason))
    check(against)
    return terms


def _config(policy: Policy, asked: Config) -> Against:
    for key, value in _set(asked):
        if key in OF_A_SHARED_CORPUS and not policy.data.shared:
            continue
        if key in ALLOWED:
            if why := ALLOWED[key](value, policy):
                yield key, why
        elif key not in OWN and key not in IGNORED and not _of_a_strategy(key, policy):
            yield key, "not on the list of what a server may set"
    yield from _models(policy, asked)
    yield from _limits(policy, asked)
    yield from _promises(policy, asked)


def _set(asked: Config) -> Iterator[tuple[str, Scalar]]:
    """The keys whose values are not the defaults."""
    default = Config().flat()
    for key, value in asked.flat().items():
        if key not in default or value != default[key] or type(value) is not type(default[key]):
            yield key, value


def _of_a_strategy(key: str, policy: Policy) -> bool:
    """An option of a strategy from elsewhere, which the policy lists by name?"""
    names = [n for n in policy.limits.strategies if n not in STRATEGIES]
    return any(key.startswith(f"strategy.{name}.") for name in names)


def _models(policy: Policy, asked: Config) -> Against:
    path, revision = asked.model.path, asked.model.revision
    if not path:
        yield "model.path", "it is not set"
    source = policy.model.allowed.get(path)
    if source and revision not in ("", source.revision):
        yield "model.revision", f"model.allowed has {source.revision!r}"


def _limits(policy: Policy, asked: Config) -> Against:
    """What holds for the defaults as well."""
    limits = policy.limits
    for key, value, most in (
        ("train.batch-size", asked.train.batch_size, limits.batch),
        ("evaluate.batch-size", asked.evaluate.batch_size, limits.batch),
        ("train.steps", asked.train.steps, limits.steps),
    ):
        if value > most:
            yield key, f"{value}, the limit is {most}"
    form = FORMS.get(asked.lora.form)
    if form and form.kind != "factors" and asked.clients.ranks[0] > limits.rank:  # its one size
        yield "clients.ranks", f"{asked.clients.ranks[0]}, limits.rank = {limits.rank}"
    each, steps = asked.train.gradient_accumulation_steps, asked.train.steps
    if each > 1 and steps * each > limits.steps:
        yield "train.gradient-accumulation-steps", f"{steps} of {each}, limits.steps {limits.steps}"
    if why := ALLOWED["strategy.name"](asked.strategy.name, policy):
        yield "strategy.name", why


def _promises(policy: Policy, asked: Config) -> Against:
    p, level = asked.privacy, policy.privacy.level
    if level != "none" and not (p.on and p.level == level):
        yield "privacy.level", f"the policy's level is {level}"
    if p.on and policy.privacy.max_delta and p.delta > policy.privacy.max_delta:
        yield "privacy.delta", f"privacy.max-delta = {policy.privacy.max_delta:g}"
    if policy.privacy.max_epsilon and not p.by_example:
        yield "privacy.epsilon", "privacy.max-epsilon is set, and nothing would be counted here"
    if policy.secure.require and not asked.secure.aggregation:
        yield "secure.aggregation", "secure.require = true"
    if policy.secure.refuse and asked.secure.aggregation:
        yield "secure.aggregation", "secure.refuse = true"


def _job(policy: Policy, job: Job) -> Against:
    limits, ranks = policy.limits, [*job.ranks.values()]
    if any(type(r) is not int or not 0 <= r <= limits.rank for r in ranks):
        yield "the ranks", f"limits.rank = {limits.rank}"
    if len(ranks) > limits.modules:
        yield "so many modules", f"{len(ranks)}, limits.modules = {limits.modules}"
    if len(job.labels) > LABELS or any(
        not isinstance(x, str) or len(x) > CHARACTERS for x in job.labels
    ):
        yield "the labels", f"at most {LABELS} of {CHARACTERS} characters"


def _taken(policy: Policy, asked: Config) -> dict[str, Scalar]:
    """The run's values of what it may set."""
    return {
        key: value
        for key, value in _set(asked)
        if (key in ALLOWED or _of_a_strategy(key, policy))
        and (policy.data.shared or key not in OF_A_SHARED_CORPUS)
    }


def _own(policy: Policy, asked: Config) -> dict[str, Any]:
    """The node's values of what is its own."""
    d = policy.data
    own: dict[str, Any] = {
        "data.text": d.text,
        "data.text-pair": d.text_pair,
        "data.image": d.image,
        "data.label": d.label,
        "data.label-separator": d.label_separator,
        "data.prompt": d.prompt,
        "data.response": d.response,
        "data.rejected": d.rejected,
        "data.messages": d.messages,
        "data.map": flat_list(d.map),
        "data.separator": d.separator,
        "data.encoding": d.encoding,
        "data.line-pattern": d.line_pattern,
        "data.limit": d.limit,
        "data.dedupe": d.dedupe,
        "data.client-test-fraction": d.client_test_fraction,
        "data.client-validation-fraction": d.client_validation_fraction,
        "output.client-memory": str(policy.memory),
        "data.unit-column": policy.privacy.unit,
        "data.withdrawn": flat_list([x.hex() for x in by_value(policy.privacy.withdrawn)]),
        "privacy.ledger": str(policy.ledger),
        "privacy.delta": policy.privacy.delta,
        "privacy.max-epsilon": policy.privacy.max_epsilon,
        "simulate.devices": policy.limits.devices,
        # read by a server alone; a client only has to know that there are such rows
        "lora.calibration": "the server's" if asked.lora.calibration else "",
    }
    if d.path:
        # the code that a run has rows from is named, so that both sides compare it; not called
        named = is_code(asked.data.path) and asked.data.path in policy.trust.code
        own |= {"data.node-path": d.path, "data.path": asked.data.path if named else d.path}
    if asked.model.adapter:  # which the list has: it was asked before
        own["model.adapter"] = policy.model.adapters[asked.model.adapter]
    if source := policy.model.allowed.get(asked.model.path):
        own |= {"model.path": source.path or asked.model.path, "model.revision": source.revision}
    return own
