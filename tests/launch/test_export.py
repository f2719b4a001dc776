"""Exports: models that plain PEFT and transformers load, and that compute what was trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM
from typer.main import get_command

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, FedLoraError
from fedlora.federation.server.choice import COLLECTED
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.run import load
from fedlora.launch.export import export_run
from fedlora.strategies import STRATEGIES
from fedlora.training import cache
from tests.federation.test_federation import dense_adapter
from tests.support.long import few
from tests.support.tiny_federation import Ran, federate, python, quick

Settings = Callable[..., dict[str, object]]
IDS = [[3, 4, 5, 6, 7], [9, 8, 7, 20, 3]]

PLAIN = """
import json, sys, torch
torch.set_num_threads(1)
import transformers
from peft import PeftModel
assert "fedlora" not in sys.modules
ids = torch.tensor(json.loads(sys.argv[2]))
for form, kind, base, directory in json.loads(sys.argv[1]):
    Auto = (transformers.AutoModelForSequenceClassification if kind == "bert"
            else transformers.AutoModelForCausalLM)
    if form == "merged":
        model = Auto.from_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(directory)
    else:
        options = {"num_labels": 3} if kind == "bert" else {}
        model = PeftModel.from_pretrained(Auto.from_pretrained(base, **options), directory)
        if form == "peft, merged by PEFT":
            model = model.merge_and_unload()
    model.eval()
    with torch.no_grad():
        print(json.dumps(model(input_ids=ids).logits.double().tolist()))
"""
Job = tuple[str, str, str, str]


def played(settings: Settings, kind: str, name: str, **changes: object) -> tuple[Ran, Any]:
    """A run, and the logits of the model that its server holds at the end."""
    seen: list[FederatedLora] = []
    more = {"train.steps": 3, "clients.count": 3, **changes}
    ran = federate(settings(kind, **quick(name, **more)), before=seen.append)
    (server,) = seen
    load(server.setting, server.session, server.run, server.run.state)
    server.setting.model.peft.eval()
    with torch.no_grad():
        logits = server.setting.model.peft(input_ids=torch.tensor(IDS)).logits.double().numpy()
    return ran, logits


def reloaded(jobs: list[Job]) -> list[Any]:
    """Logits of (form, kind, base, directory), each loaded by plain libraries elsewhere."""
    done = python(PLAIN, json.dumps(jobs), json.dumps(IDS), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [np.array(json.loads(line)) for line in done.stdout.splitlines()]


def test_an_export_computes_the_federated_model_in_a_fresh_process(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    jobs: list[Job] = []
    wanted = []
    for kind, name in (("bert", "fedex"), ("gpt2", "flora"), ("llama", "fedsb")):
        ran, want = played(settings, kind, name, **{"run.name": kind, "lora.use-rslora": True})
        out = tmp_path / f"{kind}-out"
        export_run(ran.directory, out / "peft")
        export_run(ran.directory, out / "merged", merged=True)
        jobs += [
            ("peft", kind, tiny[kind], str(out / "peft")),
            ("merged", kind, tiny[kind], str(out / "merged")),
            ("peft, merged by PEFT", kind, tiny[kind], str(out / "peft")),
            ("peft", kind, tiny[kind], str(ran.directory / "adapter")),
        ]
        wanted += [want] * 4
    for job, got, want in zip(jobs, reloaded(jobs), wanted, strict=True):
        assert np.abs(got - want).max() / np.abs(want).max() < 1e-5, job


def test_a_mean_pooled_classifier_exports_too(settings: Settings, tmp_path: Path) -> None:
    ran = federate(settings(**quick("fedex", **{"model.pooling": "mean"})))
    for form in ("peft", "merged"):
        assert export_run(ran.directory, tmp_path / form, merged=form == "merged").deviation < 1e-4


def test_training_changed_the_logits_that_are_compared(
    settings: Settings, tiny: dict[str, str]
) -> None:
    """Or every export would agree."""
    _, want = played(settings, "gpt2", "flora")
    plain = AutoModelForCausalLM.from_pretrained(tiny["gpt2"])
    with torch.no_grad():
        before = plain(input_ids=torch.tensor(IDS)).logits.double().numpy()
    assert np.abs(before - want).max() / np.abs(want).max() > 1e-3


@pytest.mark.parametrize("name", few(STRATEGIES, "fedavg", "fedex", "flora", "fedsb"))
def test_every_strategy_exports_and_the_export_checks_itself(
    settings: Settings, tmp_path: Path, name: str
) -> None:
    ran = federate(settings("gpt2", **quick(name)))
    for form in ("peft", "merged"):
        done = export_run(ran.directory, tmp_path / form, merged=form == "merged")
        assert done.deviation < 1e-4
        assert done.truncation == 0
        assert any((tmp_path / form).glob("*.safetensors"))
    mine, exported = dense_adapter(ran.directory / "adapter"), dense_adapter(tmp_path / "peft")
    assert mine.keys() == exported.keys()
    for m, x in mine.items():
        assert np.abs(exported[m] - x).max() <= 1e-5 * np.abs(x).max(), m


def test_what_is_written_says_where_it_belongs(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    for kind, task in (("bert", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")):
        ran, _ = played(settings, kind, "fedex", **{"run.name": kind})
        out = tmp_path / f"{kind}-out"
        export_run(ran.directory, out)
        written = json.loads((out / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == tiny[kind]
        assert written["task_type"] == task
        assert written["fan_in_fan_out"] == (kind == "gpt2")
        assert written["inference_mode"]
        assert not list(out.glob("*.bin"))  # a pickle
        if kind == "bert":
            assert json.loads((out / "labels.json").read_text()) == sorted(
                ["animal", "colour", "number"]
            )


def test_a_truncated_export_says_what_it_cost(settings: Settings, tmp_path: Path) -> None:
    ran, _ = played(settings, "llama", "flora")
    whole = dense_adapter(ran.directory / "adapter")
    done = export_run(ran.directory, tmp_path / "out", rank=2)
    cut = dense_adapter(tmp_path / "out")
    lost = sum(np.linalg.norm(whole[m] - cut[m]) ** 2 for m in whole)
    best = sum((np.linalg.svd(whole[m])[1][2:] ** 2).sum() for m in whole)
    size = sum(np.linalg.norm(whole[m]) ** 2 for m in whole)
    assert done.truncation == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert lost == pytest.approx(best, rel=1e-3)  # no adapter of rank 2 is nearer
    assert all(np.linalg.matrix_rank(x, tol=1e-6) <= 2 for x in cut.values())
    assert done.truncation > 1e-3


def test_the_command_prints_the_deviation_and_the_truncation(
    settings: Settings, tmp_path: Path
) -> None:
    ran = federate(settings("gpt2", **quick("flora", **{"train.steps": 3})))
    command = ["export", str(ran.directory), "--out", str(tmp_path / "out"), "--rank", "2"]
    done = CliRunner().invoke(get_command(app), command)
    assert done.exit_code == 0, done.output
    assert "logits equal those of the truncated model to" in done.output
    assert "truncating to rank 2 changed the update by" in done.output


def test_a_clients_own_model_is_exported_from_its_memory(
    settings: Settings, tmp_path: Path
) -> None:
    ran = federate(settings("gpt2", **quick("fedsa", **{"train.steps": 3})))
    own = []
    for client in (0, 1):
        export_run(ran.directory, tmp_path / str(client), client=client)
        own.append(dense_adapter(tmp_path / str(client)))
    shared = dense_adapter(ran.directory / "adapter")
    m = next(iter(shared))
    assert np.linalg.norm(own[0][m] - own[1][m]) > 1e-3 * np.linalg.norm(own[0][m])
    assert np.linalg.norm(own[0][m] - shared[m]) > 1e-3 * np.linalg.norm(own[0][m])


def test_what_was_collected_at_a_runs_end_is_exported_and_no_other_end_of_it(
    settings: Settings, tmp_path: Path
) -> None:
    """The last checkpoint is of the state before; resuming begins there."""
    ran = federate(settings("gpt2", **quick("fedsa", **{"train.steps": 3})))
    want = dense_adapter(ran.directory / "adapter")

    def off(name: str) -> float:
        export_run(ran.directory, tmp_path / name)
        found = dense_adapter(tmp_path / name)
        return max(float(np.abs(found[m] - x).max() / np.abs(x).max()) for m, x in want.items())

    assert off("collected") < 1e-6
    newest = max((ran.directory / "checkpoint").glob("round-*.safetensors"))
    newest.unlink()  # an earlier round, the last on record: not what was collected later
    lines = (ran.directory / "rounds.jsonl").read_text().splitlines(keepends=True)
    (ran.directory / "rounds.jsonl").write_text("".join(lines[:-1]))
    assert off("before") > 1e-3


def test_what_is_lost_of_a_runs_end_is_said_and_nothing_older_exported(
    settings: Settings, tmp_path: Path
) -> None:
    """The checkpoint before would be a whole model too, and another; a resume makes it again."""
    given = settings("gpt2", **quick("fedsa", **{"train.steps": 3}))
    ran = federate(given)
    place, want = ran.directory / "checkpoint", ran.adapter
    kept = {path: path.read_bytes() for path in place.iterdir()}
    newest = max(place.glob("round-*.safetensors"))
    for harm, said in (
        (lambda: newest.write_bytes(kept[newest][:-1] + b"x"), "damaged.* of round 1: resume"),
        (newest.unlink, "it is gone.* of round 1: resume the run"),
        ((place / COLLECTED).unlink, "is gone, which is what the run ended with: resume"),
    ):
        harm()
        with pytest.raises(CheckpointError, match=said):
            export_run(ran.directory, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        if said.endswith("with: resume"):
            break
        for path, data in kept.items():
            path.write_bytes(data)
    assert federate({**given, "run.resume": True}).adapter == want
    export_run(ran.directory, tmp_path / "out")


def test_an_export_that_is_wrong_is_not_handed_over(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.training.model import peft_directory

    ran, _ = played(settings, "gpt2", "flora")
    real = peft_directory.total
    monkeypatch.setattr(peft_directory, "total", lambda e: dict(list(real(e).items())[1:]))
    with pytest.raises(FedLoraError, match=r"out: .* is not the federated model's"):
        export_run(ran.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_run_is_named(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedLoraError, match="empty"):
        export_run(tmp_path / "empty", tmp_path / "out")
    config = Config.read(settings(**quick("fedex")))
    (tmp_path / "empty" / "config.toml").write_text(config.toml())
    with pytest.raises(CheckpointError, match=r"empty has no checkpoint"):
        export_run(tmp_path / "empty", tmp_path / "out")
    assert cache.corpus(config).labels
