"""Exports for vLLM, llama.cpp and PEFT, read by NumPy under each one's own scaling rule."""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from typer.main import get_command

from fedlora.cli import app
from fedlora.errors import FedLoraError, ModelError
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.export import export_clients, export_run
from fedlora.launch.export_targets import VLLM_RANKS
from fedlora.lora.adapter import dense
from tests.support.long import few
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
Dense = dict[str, Any]
UNEVEN = {"lora.rank-pattern": "q_proj=7", "train.steps": 3, "clients.ranks": "2,3"}


def files(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def pairs(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Module to A (r, k) and B (d, r), in float64. Every tensor is one of the two."""
    found: dict[str, dict[str, Any]] = {}
    for key, x in tensors.items():
        name, side, rest = key.removeprefix("base_model.model.").rpartition(".lora_")
        assert side == ".lora_"
        assert rest in ("A.weight", "B.weight")
        found.setdefault(name, {})[rest[0]] = x.astype(np.float64)
    return {m: (x["A"], x["B"]) for m, x in found.items()}


def by_peft(directory: Path) -> Dense:
    config, tensors = files(directory)
    found = {}
    for m, (A, B) in pairs(tensors).items():
        alpha = config["alpha_pattern"].get(f"^{m}$", config["lora_alpha"])
        r = config["rank_pattern"].get(f"^{m}$", config["r"])
        assert r == len(A)
        found[m] = alpha / r * B @ A
    return found


def by_vllm(directory: Path) -> Dense:
    """alpha over the config's r for all; it checks the rank, modules_to_save and DoRA."""
    config, tensors = files(directory)
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["r"] <= VLLM_RANKS[-1]
    assert {len(A) for A, _ in pairs(tensors).values()} == {config["r"]}
    return {m: config["lora_alpha"] / config["r"] * B @ A for m, (A, B) in pairs(tensors).items()}


def by_llama_cpp(directory: Path) -> Dense:
    """One alpha, over each tensor's own rank; no pattern is ever read."""
    config, tensors = files(directory)
    return {m: config["lora_alpha"] / B.shape[1] * B @ A for m, (A, B) in pairs(tensors).items()}


READERS = {"peft": by_peft, "vllm": by_vllm, "llama.cpp": by_llama_cpp}


def played(settings: Settings, name: str, **changes: object) -> tuple[Ran, Dense]:
    """A run, and its whole change of W0, summed in float64 from what the server holds."""
    seen: list[FederatedLora] = []
    ran = federate(settings("llama", **quick(name, **{**UNEVEN, **changes})), before=seen.append)
    effective = seen[0].setting.strategy.effective(seen[0].run.state)
    total: Dense = {}
    for version in effective.base:
        for m, delta in version.delta.items():
            total[m] = total.get(m, 0) + dense(delta).double().numpy()
    f = effective.factors
    for m in f.A:
        A, B = f.A[m].double().numpy(), f.B[m].double().numpy()
        total[m] = total.get(m, 0) + f.scale[m] * B @ A
    return ran, total


def apart(found: Dense, want: Dense) -> float:
    assert found.keys() == want.keys()
    lost = sum(np.square(found[m] - want[m]).sum() for m in want)
    return float((lost / sum(np.square(x).sum() for x in want.values())) ** 0.5)


@pytest.mark.parametrize("name", ["fedex", "fedavg"])
def test_each_target_computes_the_runs_change_by_its_own_rule(
    settings: Settings, tmp_path: Path, name: str
) -> None:
    more = {"clients.ranks": "3"} if name == "fedavg" else {}
    ran, want = played(settings, name, **more)
    for target, read in READERS.items():
        done = export_run(ran.directory, tmp_path / target, target=target)
        assert done.truncation == 0
        assert apart(read(tmp_path / target), want) < 1e-6
    ranks = {len(A) for A, _ in pairs(files(tmp_path / "peft")[1]).values()}
    assert len(ranks) > 1
    assert apart(by_llama_cpp(tmp_path / "peft"), want) > 0.1  # what the plain export would be
    config, _ = files(tmp_path / "vllm")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_an_export_cut_to_a_rank_states_its_error_and_is_the_nearest(
    settings: Settings, tmp_path: Path, target: str
) -> None:
    ran, want = played(settings, "fedex")
    done = export_run(ran.directory, tmp_path / "out", target=target, rank=4)
    found = READERS[target](tmp_path / "out")
    best = sum(np.square(np.linalg.svd(x)[1][4:]).sum() for x in want.values())
    size = sum(np.square(x).sum() for x in want.values())
    assert apart(found, want) == pytest.approx(done.truncation, rel=1e-3)
    assert done.truncation == pytest.approx((best / size) ** 0.5, rel=1e-3)
    assert done.deviation < 1e-5  # of the cut model's logits
    assert done.rank == 4


def test_the_command_for_vllm_makes_room_for_the_rank(settings: Settings, tmp_path: Path) -> None:
    ran, _ = played(settings, "fedex", **{"run.name": "my run; rm"})
    out = tmp_path / "a b"
    done = export_run(ran.directory, out, target="vllm")
    (line,) = done.serve
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"]
    assert Path(words[2], "config.json").is_file()
    room = int(words[words.index("--max-lora-rank") + 1])
    assert room in VLLM_RANKS
    assert room >= files(out)[0]["r"] > max([r for r in VLLM_RANKS if r < room], default=0)
    assert words[-1] == f"my-run-rm={out}"


def test_the_commands_for_llama_cpp_name_base_and_adapter(
    settings: Settings, tmp_path: Path
) -> None:
    ran, _ = played(settings, "fedex")
    lines = export_run(ran.directory, tmp_path / "out", target="llama.cpp").serve
    assert [shlex.split(x)[:2] for x in lines[:2]] == [
        ["python", "convert_hf_to_gguf.py"], ["python", "convert_lora_to_gguf.py"]
    ]  # fmt: skip
    assert shlex.split(lines[-1]) == "llama-server -m base.gguf --lora run.gguf".split()  # noqa: SIM905


def test_personalised_clients_are_served_together(settings: Settings, tmp_path: Path) -> None:
    ran, _ = played(settings, "fedsa", **{"clients.ranks": "3", "lora.rank-pattern": ""})
    command = ["export", str(ran.directory), "--out", str(tmp_path / "out"),
               "--for", "vllm", "--clients", "all"]  # fmt: skip
    done = CliRunner().invoke(get_command(app), command)
    assert done.exit_code == 0, done.output
    found = {p.name: by_vllm(p) for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert sorted(found) == ["client-0", "client-1", "client-2"]
    for i in range(3):
        export_run(ran.directory, tmp_path / f"one-{i}", client=i)
        assert apart(found[f"client-{i}"], by_peft(tmp_path / f"one-{i}")) < 1e-7
    assert apart(found["client-0"], found["client-1"]) > 1e-3
    words = shlex.split(done.output.splitlines()[-1])
    start = words.index("--lora-modules") + 1
    assert words[start:] == [f"client-{i}={tmp_path / 'out' / f'client-{i}'}" for i in range(3)]
    assert words[words.index("--max-loras") + 1] == "3"


def test_clients_of_one_model_are_not_exported_apart(settings: Settings, tmp_path: Path) -> None:
    ran, _ = played(settings, "fedex")
    with pytest.raises(ModelError, match=r"'fedex': clients keep nothing .* leave --clients out"):
        export_clients(ran.directory, tmp_path / "out")


@pytest.mark.parametrize("target", few(["vllm", "llama.cpp"], "llama.cpp"))
@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("bert", {}, "this is a classifier"),
        ("llama", {"lora.modules-to-save": "lm_head"}, r"trained whole \(lm_head"),
        ("llama", {"lora.form": "dora", "clients.ranks": "3"}, "lora.form = 'dora'"),
        ("gpt2", {}, "GPT-2's transposed weights"),
    ],
)
def test_what_a_target_cannot_load_is_refused_with_what_can(
    settings: Settings, tmp_path: Path, target: str, kind: str, more: dict[str, object], why: str
) -> None:
    ran = federate(settings(kind, **quick("fedavg", **{"clients.ranks": "3", **more})))
    with pytest.raises(ModelError, match=rf"^{target} .*{why}.*--for peft .*--for merged"):
        export_run(ran.directory, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_none_and_a_rank_that_vllm_has_not_are_refused(
    settings: Settings, tmp_path: Path
) -> None:
    ran, _ = played(settings, "fedex")
    with pytest.raises(ModelError, match=r"must be one of peft, vllm, llama.cpp, merged"):
        export_run(ran.directory, tmp_path / "out", target="ollama")
    with pytest.raises(FedLoraError, match="vLLM takes 512 at most"):
        export_run(ran.directory, tmp_path / "out", target="vllm", rank=600)
