"""docs/extend/literature.md against what there is: no row without a place or a reason."""

import re
from typing import Any, get_args

import pytest

from fedlora.config.reader import Config
from fedlora.config.sections import TrainConfig
from fedlora.lora.forms import OWN
from fedlora.strategies import STRATEGIES
from fedlora.strategies.forms import FORMS, INITS
from tests.support.tiny_federation import ROOT

NAMES = [
    "LoRA",
    "rsLoRA",
    "DoRA",
    "VeRA",
    "RandLoRA",
    "GraLoRA",
    "FourierFT",
    "C3A",
    "SHiRA",
    "Bone",
    "MiSS",
    "aLoRA",
    "HiRA",
    "LoRA-XS",
    "LoRA-FA",
    "SingLoRA",
    "MoSLoRA",
    "MELoRA",
    "LoRA-Mini",
    "DenseLoRA",
    "LoLDU",
    "EDoRA",
    "BoRA",
    "NoRA",
    "LoTR",
    "Hydra",
    "ResLoRA",
    "Block-LoRA",
    "SURM",
    "PaCA",
    "SMT",
    "LoSiA",
    "PMSS",
    "LoRS",
    "X-LoRA",
    "MoLA",
    "MixLoRA",
    "HydraLoRA",
    "PiSSA",
    "OLoRA",
    "EVA",
    "CorDA",
    "LoRA-GA",
    "LoftQ",
    "orthogonal",
    "LoRA-SB",
    "LoRA-One",
    "NLoRA",
    "LoRA+",
    "LoRA-Pro",
    "LoFT",
    "RiemannLoRA",
    "ALLoRA",
    "CoTo",
    "BiLoRA",
    "Flora (compressor)",
    "DyLoRA",
    "ElaLoRA",
    "ARD-LoRA",
    "GoRA",
    "ALoRA",
    "IncreLoRA",
    "PRILoRA",
    "SoRA",
    "DiffoRA",
    "Flexora",
    "RankAdaptor",
    "AdaLoRA",
    "LoRA^2",
    "MSPLoRA",
    "PLoP",
    "COLA",
    "PeriodicLoRA",
    "RILQ",
    "LoRAPrune",
    "LoRAShear",
    "LoRAM",
]
"""The methods that belong to the project beside the federated ones."""
RULES = get_args(TrainConfig.model_fields["rule"].annotation)
KNOWN: dict[str, Any] = {
    "lora.form": FORMS,
    "lora.init": INITS,
    "strategy.name": STRATEGIES,
    "train.rule": RULES,
    "ranks.policy": ("legend", "adaptive"),
    "strategy.fedsb.init-from": ("update-approx", "svd-w0", "orthogonal"),
}


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "extend" / "literature.md").read_text(encoding="utf-8")
    found = [[c.strip() for c in line.strip("|").split("|")]
             for line in text.splitlines() if line.startswith("|")]  # fmt: skip
    return [[*row, ""][:4] for row in found[2:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1])
def test_a_row_has_a_place_that_there_is_or_a_reason(row: list[str]) -> None:
    _, _, here, reason = row
    assert bool(here) != bool(reason)
    assert here or len(reason.split()) > 8
    flat = Config().flat()
    for setting in re.findall(r"`([a-z]+(?:\.[a-z-]+){1,2}(?: = [^`]+)?)`", here + reason):
        key, _, value = setting.partition(" = ")
        assert key in flat
        if key in KNOWN:
            assert value.strip('"') in KNOWN[key]


def test_every_method_of_the_list_has_a_row_and_every_own_one_is_in_it() -> None:
    named = {name.strip() for _, names, *_ in rows() for name in names.split(",")}
    assert not [name for name in NAMES if name not in named]
    settings = " ".join(row[2] for row in rows())
    for form in OWN:
        assert f'lora.form = "{form}"' in settings
    for rule in set(RULES) - {"plain"}:
        assert f'train.rule = "{rule}"' in settings
    for init in set(INITS) - {"default", "gaussian"}:
        assert f'lora.init = "{init}"' in settings
