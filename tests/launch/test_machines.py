"""Federations under every instruction set of this processor, and `make machines` itself.

A tiny federation must learn and be exact under each, one at a time: what other processors compute
with, as far as this one has it. tests/support/machines.py: the quickstart and the suite under each.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.measure import forked
from fedlora.training.precision import resolved
from tests.federation.test_federation import AtFirst, dense_adapter, nested
from tests.support.machines import (
    PYTHONS,
    Factor,
    Machine,
    Record,
    counted,
    environment,
    factors,
    fill,
    instruction_sets,
    is_x86,
    of_the_suite,
    pythons,
    row,
    runs,
    table,
    times,
    verdict,
)
from tests.support.tiny_federation import federate, python

Settings = Callable[..., dict[str, object]]

ZEN4 = Machine("AVX512", "bfloat16", "2.13.0")
HASWELL = Machine("AVX2", "float32", "2.13.0")
ARM = Machine("DEFAULT", "float32", "2.13.0", x86=False)
EMULATED = Factor(
    "ONEDNN_MAX_CPU_ISA=SSE41, bfloat16",
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"train.precision": "bfloat16"},
)
"""bfloat16's products are oneDNN's, and under its limit "auto" has none: so they are forced."""


# -- federations --------------------------------------------------------------------------------


def capability() -> Machine:
    found = torch.backends.cpu.get_cpu_capability()
    return Machine(found, resolved("auto"), torch.__version__, x86=is_x86())


def learnt(factor: Factor, given: dict[str, object]) -> dict[str, Any]:
    """A federation under a factor, in a process where torch has computed nothing yet."""
    os.environ.update(factor.environment)
    changed = {**given, **factor.settings, "run.name": factor.name}
    first = AtFirst()
    ran = federate(changed, before=first.watch)
    gaps = [
        np.linalg.norm(found - (want := nested(ran, m, first.factors))) / np.linalg.norm(want)
        for m, found in dense_adapter(ran.directory / "adapter").items()
    ]
    summary = json.loads((ran.directory / "summary.json").read_text())
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "precision": resolved(str(changed["train.precision"])),
        "losses": [r["train_loss"] for r in ran.rounds[1:]],
        "deviations": [r["proof"]["deviation"] / r["proof"]["bound"] for r in ran.rounds[1:]],
        "gap": max(gaps),
        "warnings": summary["warnings"],
        "adapter": hashlib.sha256(ran.adapter).hexdigest(),
    }


def play(path: str) -> None:
    """Print what each factor's federation came to, after one import for all of them.

    Without those that compute as the plain one does.

    Each has a fork of its own: torch, oneDNN and MKL read how far they may go when they first
    compute, and an import computes nothing.
    """
    given = json.loads(Path(path).read_text())
    on, _ = forked(capability)
    x86 = "" if on.x86 else "this processor is no x86"
    others = [f for f in instruction_sets(on) if not f.same]
    wanted = [Factor("plain"), *others, replace(EMULATED, lacking=x86)]
    found = {f.name: f.lacking or forked(learnt, f, given)[0] for f in wanted}
    print(json.dumps(found))


SMALL = {"clients.count": 2, "run.rounds": 2, "train.epochs": 3.0, "evaluate.clients": False}


@pytest.mark.slow
def test_a_federation_learns_and_is_exact_under_every_instruction_set_of_this_processor(
    settings: Settings, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """What it lacks is skipped by name."""
    changes = {**SMALL, "train.precision": "auto", "output.keep-updates": True}
    (tmp_path / "given.json").write_text(json.dumps(settings(**changes)))
    code = "import sys; from tests.launch.test_machines import play; play(sys.argv[1])"
    plain = environment(Factor("plain"))
    ran = python(code, str(tmp_path / "given.json"), timeout=600, environment=plain)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    for name, found in told.items():
        with subtests.test(name):
            if isinstance(found, str):
                pytest.skip(f"{name}: {found}")
            assert found["losses"][-1] < 0.95 * found["losses"][0]
            assert found["warnings"] == []
            assert max(found["deviations"]) < 1
            assert found["gap"] < 1e-5, "the adapter is not W + sum p_i s_i B_i A_i"
    took({name: found for name, found in told.items() if not isinstance(found, str)})


def took(found: dict[str, Any]) -> None:
    """Every limit was one: else this is one processor several times over."""
    for name in found:
        variable, _, value = name.partition("=")
        if variable == "ATEN_CPU_CAPABILITY":
            assert found[name]["capability"] == value.upper()
    if EMULATED.name in found and found["plain"]["precision"] == "bfloat16":
        assert found["ONEDNN_MAX_CPU_ISA=SSE41"]["precision"] == "float32"
        assert found[EMULATED.name]["adapter"] != found["plain"]["adapter"]


# -- factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [ZEN4, HASWELL, ARM], ids=["zen4", "haswell", "arm"])
def test_a_factor_is_one_difference_from_the_plain_run(on: Machine) -> None:
    plain, *others = factors(on)
    assert not plain.environment
    assert not plain.settings
    assert all(len(f.environment) + len(f.settings) == 1 for f in others)
    assert len({f.name for f in others}) == len(others)


def lacking(on: Machine) -> set[str]:
    return {f.name for f in factors(on) if f.lacking}


def test_what_a_processor_lacks_is_skipped_by_name() -> None:
    assert lacking(ZEN4) == set()
    assert lacking(HASWELL) == {"ATEN_CPU_CAPABILITY=avx512"}
    assert lacking(ARM) == {
        "ATEN_CPU_CAPABILITY=avx2",
        "ATEN_CPU_CAPABILITY=avx512",
        "ONEDNN_MAX_CPU_ISA=SSE41",
        "ONEDNN_MAX_CPU_ISA=DEFAULT",
        "MKL_CBWR=COMPATIBLE",
    }
    shown = table(factors(HASWELL), {}, row)
    assert "skipped: this processor has no more than AVX2" in shown


def test_the_same_bits_are_asked_of_what_computes_alike_alone() -> None:
    assert {f.name for f in factors(ZEN4) if f.same} == {
        "ATEN_CPU_CAPABILITY=avx512",
        "ONEDNN_MAX_CPU_ISA=DEFAULT",
        "train.precision=bfloat16",
        "simulate.workers=1",
        "simulate.workers=2",
    }
    assert "train.precision=float32" in {f.name for f in factors(HASWELL) if f.same}


def test_what_the_user_set_does_not_reach_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    given = environment(Factor("", {"ONEDNN_MAX_CPU_ISA": "SSE41"}))
    assert given["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    assert not {"ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA"} & given.keys()


def shim(directory: Path, version: str, body: str) -> Path:
    path = directory / f"python{version}"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_python_that_does_not_run_is_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nowhere")
    monkeypatch.setattr("tests.support.machines.sys.version_info", (3, 11, 7))
    broken = shim(tmp_path, "3.12", "echo no such version >&2; exit 127")
    found = {f.name: f for f in pythons(download=True)}
    assert list(found) == [f"python{v}" for v in PYTHONS]
    assert found["python3.11"].lacking == "the plain run's"
    assert found["python3.12"].lacking == f"{broken} does not run"
    assert found["python3.13"].lacking == "none on PATH or in pyenv"


def test_a_python_behind_a_shim_that_does_not_run_is_found_in_pyenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shims").mkdir()
    (tmp_path / "versions/3.12.1/bin").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    monkeypatch.setattr("tests.support.machines.sys.version_info", (3, 11, 7))
    shim(tmp_path / "shims", "3.12", f"echo {tmp_path}").rename(tmp_path / "shims/pyenv")
    shim(tmp_path / "shims", "3.12", "exit 127")
    real = shim(tmp_path / "versions/3.12.1/bin", "3.12", "echo 3.12")
    assert runs(str(real), "3.12")
    assert not runs(str(real), "3.13")
    (found,) = (f for f in pythons(download=True) if f.name == "python3.12")
    assert (found.python, found.lacking) == (str(real), "")
    (unasked,) = (f for f in pythons(download=False) if f.name == "python3.12")
    assert "--pythons" in unasked.lacking


def test_the_suite_is_not_run_under_what_its_tests_set_themselves() -> None:
    kept = [f.name for f in map(of_the_suite, factors(ZEN4)) if not f.lacking]
    assert kept == ["plain", *(f.name for f in instruction_sets(ZEN4))]


# -- verdicts and the record --------------------------------------------------------------------

WELL: dict[str, Any] = {
    "code": 0, "seconds": 60.0, "cpu": 100.0, "accuracy": 0.9, "head": 0.85, "warnings": [],
    "adapter": "bits",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "ok, the same bits"),
        ({"code": 1}, "exit code 1"),
        ({"accuracy": 0.85}, "no better than a trained head"),
        ({"warnings": ["It did not move."]}, "warnings: It did not move."),
        ({"adapter": "others"}, "other bits than the plain run"),
    ],
)
def test_a_verdict_names_what_is_wrong(change: dict[str, Any], said: str) -> None:
    assert verdict(Factor("x", same=True), {**WELL, **change}, WELL) == said


def test_other_bits_are_no_fault_where_something_else_is_computed() -> None:
    assert verdict(Factor("x"), {**WELL, "adapter": "others"}, WELL) == "ok"


def test_a_run_that_left_nothing_is_not_well() -> None:
    assert verdict(Factor("x"), {"code": 0}, WELL) != "ok"
    assert times({"code": 2}, WELL, "cpu") == "-"
    assert table([Factor("x")], {"x": {"code": 2}}, row).endswith("exit code 2 |")


def test_what_is_on_record_is_not_run_again_and_a_cut_loses_one_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "machines.json", []

    def run(factor: Factor) -> dict[str, Any]:
        if factor.name == "third" and len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(factor.name)
        return WELL

    wanted = [Factor("first"), Factor("second"), Factor("none", lacking="x"), Factor("third")]
    with pytest.raises(KeyboardInterrupt):
        fill(Record(path, "short", "these"), wanted, run)
    fill(Record(path, "short", "these"), wanted, lambda f: run(f) if ran.append("") is None else {})
    assert [x for x in ran if x] == ["first", "second", "third"]
    assert Record(path, "short", "these").found.keys() == {"first", "second", "third"}
    assert not Record(path, "suite", "these").found
    assert not Record(path, "short", "other sources").found, "what other code came to is no answer"


def test_the_failures_of_a_suite_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text(
        "<testsuites><testsuite><testcase classname='t' name='a'/>"
        "<testcase classname='t' name='b'><failure/></testcase>"
        "<testcase classname='t' name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    assert counted(tmp_path / "x.xml") == {"passed": 1, "skipped": 1, "failed": ["t::b"]}
