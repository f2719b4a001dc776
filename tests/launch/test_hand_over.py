"""Hand-over: an export is whole and right or not there, and loads where nobody knows fedlora."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedlora.errors import CheckpointError, ModelError
from fedlora.federation.server import adapter
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.run import load as load_state
from fedlora.launch import fresh_process, reload_card
from fedlora.launch.export import export_run
from fedlora.launch.export_directory import MARKER, placed
from fedlora.training import cache
from tests.support.architectures import write
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")


@pytest.fixture
def ran(settings: Settings) -> Ran:
    return federate(settings("gpt2", **quick("fedex")))


def listing(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# -- whole, or not there --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fresh
def test_an_export_is_checked_in_a_new_process(ran: Ran, tmp_path: Path) -> None:
    """The other tests share one, which differs in nothing else."""
    assert export_run(ran.directory, tmp_path / "out").deviation < 1e-5


def test_the_process_that_checks_an_export_cannot_import_fedlora(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = adapter.load_script
    monkeypatch.setattr(
        adapter, "load_script", lambda *x: ("import fedlora\n" + real(*x)[0], real(*x)[1])
    )
    with pytest.raises(ModelError, match=r"does not load with transformers (?s:.*) fedlora"):
        export_run(ran.directory, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_weight_that_is_wrong_on_disk_is_seen_where_it_is_loaded(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the export that was there before stays, to the byte."""
    out = tmp_path / "out"
    export_run(ran.directory, out)
    before = listing(out)
    served = fresh_process.run_script

    def damaged(job: Path) -> None:
        (directory,) = json.loads(job.read_text())["directories"]
        file = Path(directory, "adapter_model.safetensors")
        save_file({k: 1.5 * x for k, x in load_file(file).items()}, file, {"format": "pt"})
        served(job)

    monkeypatch.setattr(fresh_process, "run_script", damaged)
    with pytest.raises(ModelError, match=r"out: its logits deviate .*; nothing was written"):
        export_run(ran.directory, out)
    assert listing(out) == before
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".out")] == []


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(
    ran: Ran, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_run(ran.directory, out)
    (out / "stale.txt").write_text("of the first")
    export_run(ran.directory, out, merged=True)
    assert not (out / "stale.txt").exists()
    assert (out / "config.json").exists()
    assert not (out / "adapter_config.json").exists()
    (out / MARKER).unlink()
    before = listing(out)
    with pytest.raises(ModelError, match="holds something that is no export of fedlora's"):
        export_run(ran.directory, out)
    with pytest.raises(ModelError, match="holds something that is no export"):
        export_run(ran.directory, ran.directory)
    assert listing(out) == before


PLACES = {
    "file": "holds something that is no export",
    "file/below": "exist|Not a directory",
    "link": "holds something that is no export",
    "run/plots": "is the run's own plots/",
    "here": "the current directory is in there",
    "here/inner": "the current directory is in there",
    "x" * 300: "too long",
}


def test_a_place_that_no_export_can_have_is_one_line_and_stays_as_it_is(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here" / "inner").mkdir(parents=True)
    (tmp_path / "here" / MARKER).write_text("{}")
    monkeypatch.chdir(tmp_path / "here" / "inner")
    run = ran.directory
    assert run == tmp_path / "run"
    before = listing(tmp_path)
    for place, says in PLACES.items():
        with pytest.raises((ModelError, OSError), match=says):
            export_run(run, tmp_path / place)
    with pytest.raises(ModelError, match="the current directory is in there"):
        export_run(run, Path())
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_a_place_with_spaces_and_accents_is_a_place(ran: Ran, tmp_path: Path) -> None:
    out = tmp_path / "a b" / "\u00e9 \u6f22 [red]"
    assert export_run(ran.directory, out).directory == out
    assert (out / "adapter_model.safetensors").exists()


def test_what_ends_halfway_leaves_nothing(tmp_path: Path) -> None:
    def cut_short() -> None:
        with placed(tmp_path / "out", {}) as new:
            (new / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert [*tmp_path.iterdir()] == []


def test_the_script_of_the_check_imports_nothing_of_fedlora() -> None:
    text = Path(str(reload_card.__file__)).read_text()
    assert "from fedlora" not in text
    assert "import fedlora" not in text


def test_a_run_whose_rows_were_changed_since_is_not_exported(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path(tiny["rows"]).read_text())
    ran = federate(settings("bert", **quick("fedex", **{"data.path": str(rows)})))
    rows.write_text(rows.read_text().replace('"animal"', '"beast"'))
    cache.forget_data()
    with pytest.raises(CheckpointError, match="other labels"):
        export_run(ran.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- tied weights ---------------------------------------------------------------------------------


def tied(kind: str, given: dict[str, object], at: Path) -> str:
    """A checkpoint whose embeddings are one."""
    path = str(given["model.path"])
    if kind == "llama":
        config = transformers.AutoConfig.from_pretrained(path)
        config.tie_word_embeddings = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(at)
        transformers.AutoTokenizer.from_pretrained(path).save_pretrained(at)
        path = str(at)
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    return path


@pytest.mark.parametrize(
    ("kind", "module"), [("llama", "lm_head"), ("llama", "embed_tokens"), ("gpt2", "lm_head")]
)
def test_embeddings_that_were_one_and_now_differ_are_two_in_the_export(
    settings: Settings, tmp_path: Path, kind: str, module: str
) -> None:
    given = settings(kind, **quick("fedex", **{"train.steps": 3, "clients.ranks": "2,3"}))
    path = tied(kind, given, tmp_path / "tied")
    ran = federate({**given, "model.path": path, "lora.modules-to-save": module})
    for merged in (False, True):
        assert export_run(ran.directory, tmp_path / f"{merged}", merged=merged).deviation < 1e-5
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    assert not whole.config.tie_word_embeddings
    ends = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    kept, changed = ends if module == "lm_head" else ends[::-1]
    old = transformers.AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    assert torch.equal(kept, old)
    assert not torch.equal(changed, old)


def test_an_adapter_on_a_tied_module_is_refused_before_round_1(
    settings: Settings, tmp_path: Path
) -> None:
    """Where a strategy moves the base, the embeddings would move along."""
    given = settings("llama", **quick("fedex"))
    path = tied("llama", given, tmp_path / "tied")
    with pytest.raises(ModelError, match=r"^lm_head is tied to model.embed_tokens: .*modules-to"):
        federate({**given, "model.path": path, "lora.target-modules": "q_proj,lm_head"})


def test_a_tie_that_no_config_can_undo_is_refused_before_round_1(
    settings: Settings, tmp_path: Path
) -> None:
    given = settings("bert", **quick("fedavg")) | {
        "model.path": str(write("t5", tmp_path / "t5")), "lora.target-modules": "q,v",
        "lora.modules-to-save": "shared",
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"shared is tied to .*; take it out of lora.modules-to"):
        federate(given)


# -- the run's own adapter ------------------------------------------------------------------------


def test_an_adapter_that_outgrows_the_dense_weights_is_cut_and_says_so(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of flora at ranks 2, 3, 5 stack more ranks than weights of 24 x 24 have."""
    changes: dict[str, object] = {"clients.ranks": "2,3,5", "train.steps": 3}
    whole = federate(settings("llama", **quick("flora", **changes)))
    assert whole.summary["adapter"]["truncation"] == 0
    assert whole.summary["adapter"]["rank"] > 12, "more numbers than the weights have"
    monkeypatch.setattr(adapter.limited, "__defaults__", (0,))
    cut = federate(settings("llama", **quick("flora", **changes, **{"run.name": "cut"})))
    A, B = (load_file(r.directory / "adapter" / "adapter_model.safetensors") for r in (whole, cut))
    lost = size = 0.0
    for key in [k for k in A if "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        d, k = A[other].shape[0], A[key].shape[1]
        assert B[key].shape[0] * (d + k) <= d * k < A[key].shape[0] * (d + k)
        want, got = (x[other].double() @ x[key].double() for x in (A, B))
        best = float(torch.linalg.svdvals(want)[B[key].shape[0] :].square().sum())
        assert float((want - got).square().sum()) == pytest.approx(best, rel=1e-4)
        lost += float((want - got).square().sum())
        size += float(want.square().sum())
    assert cut.summary["adapter"]["truncation"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert 0 <= cut.summary["export_excess"] < 1
    text = (cut.directory / "adapter" / "README.md").read_text()
    assert f"{(lost / size) ** 0.5:.2%} of the change (Frobenius norm) is left out" in text
    assert cut.summary["final"] == whole.summary["final"]  # scores are of the whole model
    assert [r["proof"] for r in cut.rounds] == [r["proof"] for r in whole.rounds]
    assert export_run(cut.directory, tmp_path / "all").truncation == 0


# -- model cards ----------------------------------------------------------------------------------

RUN_CARDS = r"""
import json, os, re, sys
sys.modules["fedlora"] = None
for place in json.loads(sys.argv[1]):
    os.chdir(place)
    known = {}
    for block in re.findall(r"^```python\n(.*?)^```", open("README.md").read(), re.M | re.S):
        exec(block, known)
    batch = known["tokenizer"](json.loads(sys.argv[2]), padding=True, return_tensors="pt")
    print("logits", json.dumps(known["logits"](batch).double().tolist()))
"""


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        pytest.param("bert", "mean", marks=pytest.mark.slow),
        pytest.param("bert", "default", marks=pytest.mark.slow),
        pytest.param("gpt2", "default", marks=pytest.mark.slow),
    ],
)
def test_the_script_in_the_card_runs_as_written_and_gives_the_models_logits(
    settings: Settings, tmp_path: Path, kind: str, pooling: str
) -> None:
    seen: list[FederatedLora] = []
    changes: dict[str, object] = {"model.pooling": pooling, "train.steps": 3}
    ran = federate(settings(kind, **quick("fedex", **changes)), before=seen.append)
    (server,) = seen
    load_state(server.setting, server.session, server.run, server.run.state)
    model, texts = server.setting.model, ["red cat", "where is the blue dog"]
    model.peft.eval()
    with torch.no_grad():
        want = model.logits(model.tokenizer(texts, padding=True, return_tensors="pt")).double()
    places = [ran.directory / "adapter"]
    for merged in (False, True):
        places.append(tmp_path / f"out-{merged}")
        export_run(ran.directory, places[-1], merged=merged)
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN_CARDS, json.dumps([*map(str, places)]), json.dumps(texts)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [x.removeprefix("logits") for x in done.stdout.splitlines() if x.startswith("logits")]
    for place, line in zip(places, found, strict=True):
        got = torch.tensor(json.loads(line), dtype=torch.float64)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5, place


def test_a_card_says_what_it_is_what_was_proved_and_what_was_private(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    ran = federate(settings("gpt2", **quick("fedex", **{"evaluate.every": 1})))
    export_run(ran.directory, tmp_path / "out")
    for place in (ran.directory / "adapter", tmp_path / "out"):
        text = (place / "README.md").read_text()
        for words in (
            "strategy fedex, 2 rounds, 3 clients", f"base: `{tiny['gpt2']}`", "task: causal-lm",
            "ends with the token `[EOS]`", "was kept in every round", "The certificate compared",
            "trained without differential privacy", "sent by the clients: trained factors",
            "on the central test rows (30)", "| 0 | ",
        ):  # fmt: skip
            assert words in text
        for line in (ran.directory / "clients.jsonl").read_text().splitlines():
            found = json.loads(line)
            assert f"| {found['client']} | {found['train_examples']} | " in text
    assert "in a Python process without fedlora, its logits equal" in text


# -- settings of the merged model -----------------------------------------------------------------


def test_a_merged_export_has_the_dropout_of_the_model_not_of_the_run(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    own = json.loads(Path(tiny["bert"], "config.json").read_text())["hidden_dropout_prob"]
    for form in ("lora", "dora"):
        more = {"model.dropout": 0.0, "lora.form": form, "run.name": form, "clients.ranks": "3"}
        ran = federate(settings("bert", **quick("fedavg", **more)))
        export_run(ran.directory, tmp_path / f"{form}-out", merged=True)
        saved = json.loads((tmp_path / f"{form}-out" / "config.json").read_text())
        assert saved["hidden_dropout_prob"] == own > 0


def test_a_merged_language_model_stops_at_the_end_mark_that_was_trained(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    given = settings("gpt2", **quick("fedavg"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny["gpt2"])
    base.generation_config.eos_token_id = 7
    base.generation_config.min_new_tokens = 9
    base.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny["gpt2"]).save_pretrained(tmp_path / "base")
    ran = federate({**given, "model.path": str(tmp_path / "base")})
    export_run(ran.directory, tmp_path / "out", merged=True)
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.min_new_tokens) == (2, None)
