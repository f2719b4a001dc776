"""The node.toml that `fedlora deploy init` writes: what the experiment needs, and no more."""

from typing import Any

import tomli_w

from fedlora.config.policy import LimitsPolicy
from fedlora.config.reader import Config
from fedlora.launch.deploy.plan import Plan
from fedlora.strategies import STRATEGIES

NAME = "node.toml"
MEMBERS = "members.toml"
HEAD = """\
# What this node allows, whatever its server asks: docs/deploy/node-policy.md has every key.
# It is yours; it is never sent, and it is read anew for every message.
#   fedlora node check node.toml run.toml     what of a run would be refused, and why
#   fedlora node audit node.toml              what was asked, refused and sent

"""
LIMIT = """\
# privacy.level has a run add noise, and says nothing of how much. Set privacy.max-epsilon to what
# all runs together may spend on these rows.

"""


def policy_text(plan: Plan, i: int, config: Config) -> str:
    """Node i's policy for this experiment."""
    needs, d, limits = config.build_strategy().needs(), config.data, LimitsPolicy()
    kinds = [*limits.kinds]
    kinds += ["gradient"] if needs.first_gradient or config.lora.by_gradient else []
    kinds += ["collect"] if needs.collect_at_end else []
    kinds += ["secagg"] if config.secure.aggregation else []
    columns: dict[str, Any] = {
        "text": d.text, "text-pair": d.text_pair, "image": d.image, "label": d.label,
        "label-separator": d.label_separator, "prompt": d.prompt, "response": d.response,
        "rejected": d.rejected, "messages": d.messages,
        "map": [*d.map], "separator": d.separator, "encoding": d.encoding,
        "line-pattern": d.line_pattern, "limit": d.limit, "dedupe": d.dedupe,
        "client-test-fraction": d.client_test_fraction,
        "client-validation-fraction": d.client_validation_fraction,
    }  # fmt: skip
    default = type(d)()
    columns = {k: v for k, v in columns.items() if v not in (_value(default, k), [])}
    shared = {"data.path": d.path, "data.test-path": d.test_path}
    shared["data.validation-path"] = d.validation_path
    shared["data.clients"] = str(config.flat()["data.clients"])
    source: dict[str, Any] = {"path": "data"}
    if not plan.own_data:
        source = {"shared": [x for x in shared.values() if x]}
    revision = {"revision": config.model.revision} if config.model.revision else {}
    tree: dict[str, Any] = {
        "trust": {"code": [*plan.code], "remote-code": plan.trust_remote_code},
        "model": {"rank": plan.rank(i), "allowed": {config.model.path: revision}},
        "data": {**source, **columns},
        "privacy": _privacy(config),
        "limits": {
            "rank": max(limits.rank, plan.rank(i), *config.clients.ranks, *_patterned(config)),
            "kinds": kinds,
        },
    }
    if config.secure.aggregation:
        tree["secure"] = {"require": True, "colluding": config.secure.colluding}
        if plan.secure:
            tree["secure"]["members"] = MEMBERS
    if config.lora.modules_to_save:
        tree["limits"]["whole-modules"] = [*config.lora.modules_to_save]
    if config.strategy.name not in STRATEGIES:
        tree["limits"]["strategies"] = [config.strategy.name]
    return (HEAD + LIMIT if config.privacy.by_example else HEAD) + tomli_w.dumps(tree)


def _privacy(config: Config) -> dict[str, Any]:
    p = config.privacy
    if not p.on:
        return {"level": "none"}
    metrics = {"metrics": "always"} if p.release_metrics else {}
    unit = {"unit": config.data.unit_column} if config.data.unit_column else {}
    return {"level": p.level, "delta": p.delta, "max-delta": p.delta, **unit, **metrics}


def _patterned(config: Config) -> list[int]:
    return [int(x.rpartition("=")[2]) for x in config.lora.rank_pattern]


def _value(section: Any, key: str) -> Any:
    return getattr(section, key.replace("-", "_"))
