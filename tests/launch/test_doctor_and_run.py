"""The doctor passes a config exactly when a run of it starts."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora.errors import FedLoraError
from fedlora.launch.doctor import examine
from fedlora.launch.simulate.run import local
from fedlora.training import cache
from tests.support.tiny_federation import directory_of, quick

Settings = Callable[..., dict[str, object]]
Changes = Mapping[str, object]

DP = {"privacy.epsilon": 3.0, "strategy.name": "fedavg", "clients.ranks": "3"}
CENTRAL = {"privacy.level": "client", "privacy.noise-multiplier": 1.0, "strategy.name": "fedavg",
           "clients.ranks": "3"}  # fmt: skip
SECURE = {"secure.aggregation": True, "clients.count": 5, "strategy.name": "fedavg",
          "clients.ranks": "3"}  # fmt: skip

CASES: dict[str, tuple[str, Changes]] = {
    "as it is": ("bert", {}),
    "a language model": ("gpt2", {}),
    "llama": ("llama", {}),
    "all-linear": ("bert", {"lora.target-modules": "all-linear"}),
    "auto": ("gpt2", {"lora.target-modules": "auto"}),
    "no such module": ("bert", {"lora.target-modules": "nothing"}),
    "no such layer": ("bert", {"lora.layers": "7"}),
    "whole classifier": ("bert", {"lora.modules-to-save": "classifier"}),
    "no such whole module": ("bert", {"lora.modules-to-save": "nothing"}),
    "rank above the layer": ("bert", {"clients.ranks": "500"}),
    "rank 0": ("bert", {"clients.ranks": "0"}),
    "rank pattern of nothing": ("bert", {"lora.rank-pattern": "nothing=2"}),
    "rank pattern": ("bert", {"lora.rank-pattern": "value=2"}),
    "pissa": ("bert", {"lora.init": "pissa"}),
    "orthogonal odd": ("bert", {"lora.init": "orthogonal", "clients.ranks": "3"}),
    "eva without rows": ("bert", {"lora.init": "eva"}),
    "eva of no file": ("bert", {"lora.init": "eva", "lora.calibration": "none.jsonl"}),
    "quantized": ("bert", {"model.quantization": "4bit"}),
    "bfloat16": ("bert", {"model.dtype": "bfloat16"}),
    "mean pooling": ("bert", {"model.pooling": "mean"}),
    "flash attention": ("bert", {"model.attention": "eager"}),
    "revision": ("bert", {"model.revision": "main"}),
    "no model": ("bert", {"model.path": "/nowhere"}),
    "hub model": ("bert", {"model.path": "nobody/nothing"}),
    "file as model": ("bert", {"model.path": "{rows}"}),
    "code that is none": ("bert", {"model.path": "py:nowhere:model"}),
    "tokenizer that is none": ("bert", {"model.tokenizer": "py:nowhere:make"}),
    "other task": ("bert", {"model.task": "causal-lm"}),
    "classifier of a decoder": ("gpt2", {"model.task": "classification"}),
    "chat without template": ("llama", {"data.chat-template": True}),
    "no such column": ("bert", {"data.text": "words"}),
    "no such label": ("bert", {"data.label": "text"}),
    "no such response": ("llama", {"data.response": "answer"}),
    "prompt of no column": ("llama", {"data.prompt": "{nothing}"}),
    "prompt with a brace": ("llama", {"data.prompt": "{"}),
    "no data": ("bert", {"data.path": "none.jsonl"}),
    "no test file": ("bert", {"data.test-path": "none.jsonl"}),
    "labels too few": ("bert", {"data.labels": "colour,animal"}),
    "labels and one more": ("bert", {"data.labels": "colour,animal,number,none"}),
    "map of nothing": ("bert", {"data.map": "Colour=colour"}),
    "all test": ("bert", {"data.test-size": 5000}),
    "no test": ("bert", {"data.test-size": 0}),
    "limit 1": ("bert", {"data.limit": 1}),
    "limit 40": ("bert", {"data.limit": 40}),
    "too many clients": ("bert", {"clients.count": 400}),
    "a row a client": ("bert", {"clients.count": 9, "data.limit": 39,
                                "data.client-test-fraction": 0.0}),
    "dirichlet, tiny alpha": ("bert", {"data.partition": "dirichlet", "data.alpha": 1e-6}),
    "natural": ("bert", {"data.partition": "natural", "data.natural-column": "label"}),
    "natural of no column": ("bert", {"data.partition": "natural"}),
    "labels a client": ("bert", {"data.partition": "pathological", "data.classes-per-client": 9}),
    "length 1": ("bert", {"data.max-length": 1}),
    "length 1 of a prompt": ("llama", {"data.max-length": 1}),
    "length beyond the positions": ("bert", {"data.max-length": 4000}),
    "windows": ("llama", {"data.long-texts": "windows", "data.prompt": "", "data.max-length": 8}),
    "windows of labels": ("bert", {"data.long-texts": "windows"}),
    "encoding": ("bert", {"data.encoding": "nothing"}),
    "sites": ("bert", {"data.path": "", "data.clients": "sites/*.jsonl"}),
    "per-round above count": ("bert", {"clients.per-round": 9}),
    "more replies than clients": ("bert", {"round.min-replies": 9}),
    "buffer": ("bert", {"round.buffer": 2, "strategy.name": "fedavg"}),
    "buffer of fedex": ("bert", {"round.buffer": 2}),
    "max-examples below": ("bert", {"round.max-examples": 3}),
    "max-examples above": ("bert", {"round.max-examples": 36}),
    "dp": ("bert", DP),
    "dp of batch": ("bert", {**DP, "train.batch-size": 3000}),
    "dp, tiny epsilon": ("bert", {**DP, "privacy.epsilon": 1e-3}),
    "dp, delta": ("bert", {**DP, "privacy.delta": 0.5}),
    "central": ("bert", CENTRAL),
    "central of fedex": ("bert", {**CENTRAL, "strategy.name": "fedex"}),
    "secure": ("bert", SECURE),
    "secure of two": ("bert", {**SECURE, "clients.count": 2}),
    "secure of fedex": ("bert", {**SECURE, "strategy.name": "fedex"}),
    "median": ("bert", {"robust.method": "median", "strategy.name": "fedavg"}),
    "krum of few": ("bert", {"robust.method": "krum", "robust.byzantine": 1}),
    "tracker": ("bert", {"output.tracker": "wandb"}),
    "port": ("bert", {"output.metrics-port": 1}),
    "own loss": ("bert", {"train.loss": "py:nowhere:loss"}),
    "own metrics": ("bert", {"evaluate.metrics": "py:nowhere:score"}),
    "learning rate": ("bert", {"train.lr": 1e30}),
    "out is a file": ("bert", {"run.out": "{rows}"}),
    "name with a slash": ("bert", {"run.name": "a/b"}),
    "name of dots": ("bert", {"run.name": ".."}),
    "memory is a file": ("bert", {"output.client-memory": "{rows}", "strategy.name": "fedsa"}),
    "ledger is a file": ("bert", {**DP, "privacy.ledger": "{rows}"}),
    "personalize": ("bert", {"personalize.epochs": 1, "evaluate.clients": True}),
    "legend": ("bert", {"ranks.policy": "legend"}),
    "share": ("bert", {"ranks.policy": "share", "ranks.shares": "2:0.5,3:0.6"}),
    "devices": ("bert", {"devices.classes": "fast:1:100"}),
    "devices of nothing": ("bert", {"devices.classes": "fast"}),
    "form dora": ("bert", {"lora.form": "dora", "strategy.name": "fedavg", "clients.ranks": "3"}),
    "form vera": ("bert", {"lora.form": "vera", "strategy.name": "fedavg", "clients.ranks": "3"}),
    "form of nothing": ("bert", {"lora.form": "nothing"}),
}  # fmt: skip
FAST = (
    "as it is",
    "no such module",
    "no such column",
    "labels and one more",
    "length 1 of a prompt",
)


def starts(given: Mapping[str, object], file: Path) -> tuple[bool, str]:
    """Whether its first round ended, and else what was said."""
    try:
        local(file, {}, quiet=True)
    except FedLoraError as e:
        return False, str(e)
    rounds = (directory_of(given) / "rounds.jsonl").read_text().splitlines()
    return any(json.loads(line)["round"] for line in rounds), "no round"


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in FAST else [pytest.mark.slow]) for x in CASES]
)
def test_the_doctor_passes_what_starts_and_nothing_else(
    settings: Settings,
    tiny: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "sites").mkdir()
    lines = Path(tiny["rows"]).read_text().splitlines(keepends=True)
    for i in range(3):
        (tmp_path / "sites" / f"{i}.jsonl").write_text("".join(lines[i::3]))
    shutil.copy(tiny["rows"], tmp_path / "rows.jsonl")
    kind, changes = CASES[name]
    own: dict[str, Any] = {
        key: str(tmp_path / "rows.jsonl") if value == "{rows}" else value
        for key, value in changes.items()
    }
    given = {**settings(kind, **quick("fedex")), "run.rounds": 1, **own}
    (file := tmp_path / "x.toml").write_text(tomli_w.dumps(given))
    passed = examine(file, {}) == 0
    told = capsys.readouterr().out
    problems = [line for line in told.splitlines() if line.startswith("problem")]
    cache.forget_data()
    began, said = starts(given, file)
    assert passed == began, (problems, said)
