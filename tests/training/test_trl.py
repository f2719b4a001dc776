"""DPO by TRL is the oracle of `preference`: same rows, same weights, its own code."""

import copy
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.training import cache
from fedlora.training.data.batches import Encoded
from fedlora.training.evaluate import evaluate
from tests.support import trl_margins
from tests.support.private_setting import Setting
from tests.support.task_rows import task_settings
from tests.support.tiny_federation import ROOT

TRL = "trl==1.16.*"
BETAS = (0.02, 0.1, 0.7)
PLACE = Path.home() / ".cache" / "fedlora" / "trl-1.16"


@pytest.fixture(scope="module")
def python() -> Path:
    """An environment that has TRL and sees this one's packages; ours never has it. pip resolves it
    against them, so that TRL must run beside the pinned transformers."""
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    found = PLACE / "bin" / "python"
    with FileLock(f"{PLACE}.lock"):
        if not (PLACE / "made").exists():
            venv.create(PLACE, clear=True, symlinks=True)
            (packages,) = PLACE.glob("lib/python3.*/site-packages")
            (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
            pip = [sys.executable, "-m", "pip", "--python", str(found), "install", "-q", TRL]
            pins = ["-c", str(ROOT / "constraints.txt")]
            done = subprocess.run([*pip, *pins], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"pip cannot install {TRL}: {done.stderr.strip().splitlines()[-1]}")
            (PLACE / "made").touch()
    return found


def tokens(rows: Encoded, i: int) -> list[list[int]]:
    """Prompt, chosen and rejected tokens of an encoded row."""
    assert rows.prompts is not None
    assert rows.other is not None
    asked = int(rows.prompts[i])
    both = (x.ids[x.starts[i] : x.starts[i + 1]].tolist() for x in (rows, rows.other))
    chosen, rejected = both
    return [chosen[:asked], chosen[asked:], rejected[asked:]]


def decided(path: str, to: Path) -> str:
    """The model with larger logits, so that margins are where the loss is no straight line."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    model.save_pretrained(str(to))
    AutoTokenizer.from_pretrained(path).save_pretrained(str(to))
    return str(to)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_loss_margin_and_accuracy_are_those_of_trl(
    settings: Callable[..., dict[str, object]], tmp_path: Path, python: Path, kind: str
) -> None:
    given = task_settings(settings, "preference", tmp_path)
    other = settings(kind)
    more = {"model.path": decided(str(other["model.path"]), tmp_path / "reference"),
            "lora.target-modules": other["lora.target-modules"]}  # fmt: skip
    s = Setting({**given, **more}, torch.float32)
    policy = copy.deepcopy(s.model.peft).merge_and_unload()
    policy.save_pretrained(str(tmp_path / "policy"))
    s.model.tokenizer.save_pretrained(str(tmp_path / "policy"))
    job, out = tmp_path / "job.json", tmp_path / "found.json"
    mine = cache.corpus(s.config).client(0).train
    sides = zip(mine.text, mine.response, mine.second, strict=True)
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in sides]
    job.write_text(json.dumps({
        "policy": str(tmp_path / "policy"), "reference": str(s.config.model.path), "rows": rows,
        "betas": BETAS, "out": str(out),
    }))  # fmt: skip
    command = [str(python), "-P", str(trl_margins.__file__), str(job)]
    ours = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}  # it may be another's
    done = subprocess.run(command, env=ours, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for theirs in json.loads(out.read_text()):
        beta = theirs["beta"]
        train = s.config.train.model_copy(update={"dpo_beta": beta})
        s.model.config = config = s.config.model_copy(update={"train": train})
        ours = evaluate(s.model, s.rows, config)
        assert ours is not None
        for i, row in enumerate(theirs["tokens"]):
            assert tokens(s.rows, i) == [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
        assert ours["margin"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-5 * beta)
        assert ours["loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5 * beta)
        assert ours["accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"])
        assert ours["loss"] > 0.6931 - ours["margin"] / 2 + 0.01 * beta**2, "too near the reference"
        assert 0 < ours["accuracy"] < 1
