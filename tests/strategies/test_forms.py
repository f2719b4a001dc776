"""Every adapter form under every strategy: exact, measured, or refused before round 1."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from typer.main import get_command

from fedlora import preflight
from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, ModelError, ProofError, StrategyError
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.ranks import patterned
from fedlora.federation.server.run import load as load_state
from fedlora.launch.export import export_run
from fedlora.lora.adapter import Factors
from fedlora.strategies import STRATEGIES, fedavg, forms
from fedlora.strategies.base import (
    Client,
    Round,
    Start,
    Upload,
    as_factors,
    seeded,
    travelling,
    whole_download,
)
from fedlora.strategies.forms import FORMS, INITS_LEFT_OUT, LEFT_OUT
from fedlora.training.export_certificate import load_exported
from fedlora.training.model.model import Model
from tests.support.doc_tables import load
from tests.support.tiny_federation import ROOT, federate, quick

Settings = Callable[..., dict[str, object]]
OPTIONS = {
    "supertuning": "sparsity=0.9",
    "vblora": "num_vectors=8,vector_length=4",
    "smt": "block=4",
    "lora-mini": "width=8",
    "nora": "width=8",
}
INVOCATION = "what is"
RANK, SEED, EXAMPLES = 4, 3, (10, 31, 7)
BOUND = 1e-6  # of what float32 tensors hold, seen through layers in float64
CELLS = [(form, name) for form in FORMS for name in STRATEGIES]
MODELS: dict[tuple[str, str], Model] = {}


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch, for SHiRA


def given(settings: Settings, form: str, name: str, **changes: object) -> dict[str, object]:
    more = {"lora.form": form, "clients.ranks": str(RANK), "lora.options": OPTIONS.get(form, "")}
    more |= {} if FORMS[form].size else {"clients.ranks": "4,8,16"}  # its default
    kind = "llama" if form == "alora" else "bert"
    more |= (
        {"data.prompt": "{text} what is", "lora.invocation": INVOCATION} if kind == "llama" else {}
    )
    return settings(kind, **{**more, "strategy.name": name, **changes})


def built(settings: Settings, form: str) -> Model:
    """One model a form for all the cells: what is loaded into it is loaded whole."""
    config = Config.read(given(settings, form, "fedavg"))
    key = (form, config.model.path)
    if key not in MODELS:
        labels = ("x", "y", "z") if config.model.task == "classification" else ()
        MODELS[key] = Model(config, labels)
    return MODELS[key]


def inputs(model: Model) -> dict[str, Tensor]:
    g = seeded(SEED, 0, 0, "x")
    return {m: torch.randn(5, s.k, generator=g).double() for m, s in model.shapes.items()}


def outputs(model: Model, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the adapted layers make of x (n, k) now, in float64, through PEFT's own forward.

    Each row a token of its own, at which an invocation has begun.
    """
    at = {"alora_offsets": [1] * len(next(iter(x.values())))} if model.form.after else {}
    with torch.no_grad():
        return {m: copy.deepcopy(model.adapted[m]).double().eval()(x[m], **at) for m in x}


def moved(model: Model, columns: frozenset[str], client: int, round: int) -> None:
    """Stands in for training."""
    with torch.no_grad():
        for column, live in model.trainable(columns).items():
            for name, p in live.items():
                g = seeded(SEED, round, client, f"{column}/{name}")
                p.add_(0.1 * torch.randn(p.shape, generator=g) * model.masks.get(p, torch.ones(())))


def gap(got: Mapping[str, Tensor], want: Mapping[str, Tensor], bare: Mapping[str, Tensor]) -> float:
    """The largest difference of a layer's outputs, over the size of the change there."""
    return max(
        float((got[m] - want[m]).norm() / ((want[m] - bare[m]).norm() + 1e-2 * bare[m].norm()))
        for m in want
    )


def round_of(
    model: Model, strategy: Any, ranks: Mapping[str, int] | None = None
) -> tuple[float, float]:
    """The model's deviation from the mean of what clients trained, and the shared side's."""
    x = inputs(model)
    ranks = ranks or dict.fromkeys(model.shapes, RANK)
    clients = [Client(i, model.layers(ranks)) for i in range(len(EXAMPLES))]
    first = model.init_factors(replace(clients[0], id=-1), SEED)
    model.rebase("none", [])
    with model.peft.disable_adapter():
        bare = outputs(model, x)
    state = strategy.init(Start(first, clients, model.weights(), SEED))
    for number in (1, 2):  # in the second round both sides have moved
        round, uploads = Round(number, SEED), []
        want = {m: torch.zeros_like(y) for m, y in bare.items()}
        for client, n in zip(clients, EXAMPLES, strict=True):
            came = whole_download(strategy, state, client, round, True)
            model.rebase(f"{client.id}/{number}", came.base)
            with model.folded(came.fold):
                model.load(strategy.start(came, Factors(), client, round), came.block)
                moved(model, came.trainable, client.id, number)
                for m, y in outputs(model, x).items():
                    want[m] += n / sum(EXAMPLES) * y
                sent, _ = strategy.upload(model.read(), Factors())
            uploads.append(Upload(client, travelling(sent, came.trainable), n))
        before, state = state, strategy.aggregate(state, uploads, round)
    effective = strategy.effective(state)
    model.rebase(f"after/{number}", effective.base)
    model.load(effective.factors)
    if strategy.promise != "shared":
        return gap(outputs(model, x), want, bare), 0.0
    A = {m: sum(u.num_examples * u.sent.A[m] for u in uploads) / sum(EXAMPLES) for m in x}
    trained = {m: p.A for m, p in as_pairs(strategy, before, uploads[0], round).items()}
    assert trained.keys() == A.keys()
    return 0.0, max(float((effective.factors.A[m] - A[m]).abs().max()) for m in A)


def as_pairs(strategy: Any, state: Any, upload: Upload, round: Round) -> Any:
    found = strategy.trained(state, upload, round)
    assert as_factors(found, {}).A.keys() == upload.sent.A.keys()
    return found


@pytest.mark.parametrize(("form", "name"), CELLS, ids=[f"{f}-{n}" for f, n in CELLS])
def test_a_form_under_a_strategy_is_averaged_as_promised_or_refused(
    settings: Settings, form: str, name: str
) -> None:
    strategy: Any = forms.for_form(FORMS[form], STRATEGIES[name]())
    if forms.problem(FORMS[form], strategy):
        with pytest.raises(ConfigError, match=rf"lora.form = '{form}' with .*{name}.*; use \w+"):
            preflight.read(given(settings, form, name))
        return
    preflight.read(given(settings, form, name))
    whole, shared = round_of(built(settings, form), strategy)
    promise = forms.guarantee(FORMS[form], strategy)
    if promise == "exact":
        assert whole < BOUND
    elif promise == "shared":
        assert shared < 1e-6
    else:
        assert whole < 10
    if type(strategy) is fedavg.FedAvg and promise != "exact":
        assert whole > 1e-3, "a counterexample, or it should promise to be exact"


@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_by_module_are_averaged_as_promised(settings: Settings, name: str) -> None:
    model, strategy = built(settings, "lora"), STRATEGIES[name]()
    ranks = patterned(model.shapes, RANK, ("value=8", "layer.1.*=12"))
    assert set(ranks.values()) == {4, 8, 12}
    assert not [*strategy.problems([Client(0, model.layers(ranks))])]
    whole, shared = round_of(model, strategy, ranks)
    if strategy.promise == "exact":
        assert whole < 3 * BOUND  # of higher ranks than RANK
    elif strategy.promise == "shared":
        assert shared < 1e-6
    else:
        assert whole < 10


def spread(model: Model, names: set[str], only: str = "") -> float:
    """|f(mean of theta) - mean of f(theta)| over f's size, moving the tensors of these names."""
    x, found = inputs(model), []
    own = {**model._tensors, **{f"{m}.{i}": p for m in model.held() for i, p in
                                enumerate(model.sides(m))}}  # fmt: skip
    model.load(model._first)
    g = seeded(SEED, 0, 0, "theta")
    middle = {n: p.detach() + 0.3 * torch.randn(p.shape, generator=g) for n, p in own.items()}
    step = {n: 0.3 * torch.randn(p.shape, generator=g) for n, p in own.items()}
    for sign in (1, -1, 0):
        with torch.no_grad():
            for n, p in own.items():
                live = n.split(".")[-1] in names
                p.copy_(middle[n] + sign * step[n] * live)
        found.append(outputs(model, x))
    plus, minus, mean = found
    sizes = [
        ((plus[m] + minus[m]) / 2 - mean[m]).norm() / (plus[m] - minus[m]).norm().clamp(min=1e-9)
        for m in x
    ]
    return float(max(sizes))


@pytest.mark.parametrize("form", [f for f, x in FORMS.items() if x.kind != "factors"])
def test_a_form_is_as_linear_as_the_table_says(settings: Settings, form: str) -> None:
    model, law = built(settings, form), FORMS[form].law
    groups = {name.split(".")[-1] for name in model._tensors} | {*("01" if model.held() else "")}
    together = spread(model, groups)
    apart = [spread(model, {group}) for group in groups]
    if law == "linear":
        assert together < 1e-6
    elif law == "multilinear":
        assert together > 1e-3
        assert max(apart) < 1e-6
    else:
        assert max(apart) > 1e-4


@pytest.mark.parametrize("form", [f for f, x in FORMS.items() if x.kind != "factors"])
def test_what_a_form_freezes_follows_from_the_seed_alone(settings: Settings, form: str) -> None:
    """And is in the fingerprint, so that a client whose projections differ is refused."""

    def made(seed: int) -> Model:
        torch.rand(seed + 3)
        return Model(Config.read(given(settings, form, "fedavg", **{"run.seed": seed})), ("x",))

    one, again, other = made(1), made(1), made(2)
    assert one.fingerprint == again.fingerprint
    x = inputs(one)
    for model in (one, again):
        model.load(one._first)
        moved(model, frozenset({"A", "B", "other"}), 0, 0)
    for (m, y), z in zip(outputs(one, x).items(), outputs(again, x).values(), strict=True):
        assert torch.equal(y, z), m
    if form in ("vera", "randlora", "fourierft", "waveft", "shira"):
        other.load(one._first)
        moved(other, frozenset({"A", "B", "other"}), 0, 0)
        assert one.fingerprint != other.fingerprint
        assert gap(outputs(one, x), outputs(other, x), outputs(other, x)) > 1e-3


def test_alora_changes_nothing_before_its_invocation(settings: Settings) -> None:
    """Each row from its own, padded or not, and in what it generates."""
    model = built(settings, "alora")
    ids = [model.tokenizer.encode(f"{a} what is {b}") for a, b in
           (("red cat", "the"), ("one two what is three left", "right up"))]  # fmt: skip
    width = max(map(len, ids))
    rows = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = (rows > 0).long()
    starts = [2, 6]  # of the last invocation
    inputs = {"input_ids": rows, "attention_mask": mask}
    model.load(model.init_factors(Client(0, model.layers(dict.fromkeys(model.shapes, RANK))), SEED))
    moved(model, frozenset({"A", "B"}), 0, 0)
    with torch.no_grad():
        got = model.logits(inputs)
        with model.peft.disable_adapter():
            bare = model.logits(inputs)
    for n, (start, row) in enumerate(zip(starts, ids, strict=True)):
        assert torch.equal(got[n, :start], bare[n, :start])
        assert not torch.isclose(got[n, start : len(row)], bare[n, start : len(row)]).all(-1).any()
    with pytest.raises(ModelError, match=r"is not in the row 'red cat the', .* end data.prompt"):
        model.logits({"input_ids": torch.tensor([model.tokenizer.encode("red cat the")])})


def test_what_goes_with_no_invocation_is_refused(settings: Settings) -> None:
    for changes, says in (
        ({"lora.invocation": ""}, "needs lora.invocation, a text that every prompt has"),
        ({"clients.ranks": "2,4"}, "would be folded into its base, .*; give all clients one rank"),
        ({"ranks.policy": "legend"}, "would be folded into its base"),
        ({"lora.init": "pissa"}, "takes s B A out of the base on every token"),
        ({"lora.form": "lora"}, "lora.invocation: is alora's; lora acts on every token"),
        ({"privacy.epsilon": 3.0}, "only LoRA factors and linear heads have per-example"),
    ):
        with pytest.raises(ConfigError, match=says):
            preflight.read(given(settings, "alora", "fedavg", **changes))
    with pytest.raises(ConfigError, match="what a classifier reads is no continuation; use lora"):
        preflight.read(settings(**{"lora.form": "alora", "lora.invocation": "is"}))
    with pytest.raises(
        StrategyError, match=r"client 1 (has )?rank 2: .* give all clients one rank"
    ):
        federate(given(settings, "alora", "ffa", **quick("ffa", **{"clients.ranks": "3"})),
                 nodes={1: {"rank": 2}})  # fmt: skip


def test_a_federation_of_alora_learns_is_proved_and_exported_as_peft_alone(
    settings: Settings, tmp_path: Path
) -> None:
    more = {"clients.ranks": "4", "run.rounds": 3, "train.steps": 6, "evaluate.every": 1,
            "evaluate.generate-tokens": 2}  # fmt: skip
    ran = federate(given(settings, "alora", "ffa", **quick("ffa", **more)))
    for r in ran.rounds[1:]:
        assert not r["failures"]
        assert r["proof"]["model_deviation"] < r["proof"]["bound"]
        assert r["proof"]["norm"] > 0
    first, last = ran.rounds[0]["evaluation"], ran.rounds[-1]["evaluation"]
    assert last["loss"] < first["loss"]
    assert export_run(ran.directory, tmp_path / "peft").deviation < 1e-5
    with pytest.raises(ModelError, match=r"weights act on every token, .* export it as peft"):
        export_run(ran.directory, tmp_path / "merged", merged=True)


def test_dora_is_dora(settings: Settings) -> None:
    """The magnitude is a factor of the output; PEFT's layer has it, and loading must keep it."""
    model = built(settings, "dora")
    first = model.init_factors(Client(-1, model.layers(dict.fromkeys(model.shapes, RANK))), SEED)
    model.load(first)
    x = inputs(model)
    before = outputs(model, x)
    double = {n: 2 * t if "magnitude" in n else t for n, t in first.other.items()}
    model.load(replace(first, other=double))
    for m, y in outputs(model, x).items():
        bias = model.adapted[m].get_base_layer().bias.double()
        assert torch.allclose(y - bias, 2 * (before[m] - bias), rtol=1e-5)


@pytest.mark.parametrize("name", [*LEFT_OUT, *INITS_LEFT_OUT])
def test_what_is_not_here_says_why_and_what_to_use(settings: Settings, name: str) -> None:
    key = "lora.form" if name in LEFT_OUT else "lora.init"
    with pytest.raises(ConfigError, match=rf"{key} = '.*': .*(use|name) .*\w"):
        preflight.read(settings(**{key: name}))


def test_a_misspelt_form_is_named_with_the_nearest(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fourierft'"):
        preflight.read(settings(**{"lora.form": "fourierf"}))
    with pytest.raises(ConfigError, match=r"lora.init = 'piza': must be default, .*pissa_niter_N"):
        preflight.read(settings(**{"lora.init": "piza"}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clients.ranks": "2,4"}, "every client has the same tensors"),
        ({"ranks.policy": "legend"}, "every client has the same tensors"),
        ({"robust.method": "median"}, "judges updates by their products"),
        ({"lora.use-rslora": True}, "lora.use-rslora = true"),
        ({"lora.init": "pissa"}, "begins as PEFT begins it"),
        ({"lora.rank-pattern": "value=2"}, "leave it empty"),
    ],
)
def test_what_a_form_cannot_be_asked_is_refused(
    settings: Settings, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        preflight.read(given(settings, "fourierft", "fedavg", **changes))


def test_ranks_of_a_form_that_has_one_size_are_no_setting(settings: Settings) -> None:
    for form in (f for f, x in FORMS.items() if not x.size):
        preflight.read(given(settings, form, "fedavg"))
        for changes in ({"clients.ranks": "8"}, {"ranks.policy": "capability"}):
            with pytest.raises(ConfigError, match=r"has one size, of which clients\.ranks"):
                preflight.read(given(settings, form, "fedavg", **changes))


def test_options_that_a_form_has_not_are_listed(settings: Settings) -> None:
    def model(form: str, **changes: object) -> Model:
        return Model(preflight.read(given(settings, form, "fedavg", **changes)), ("x", "y"))

    with pytest.raises(ConfigError, match=r"fourierft has no 'scalling'; it has .*scaling"):
        model("fourierft", **{"lora.options": "scalling=3"})
    with pytest.raises(ConfigError, match=r"lora.dropout: fourierft has none"):
        model("fourierft", **{"lora.dropout": 0.1})
    with pytest.raises(ConfigError, match=r"lora.options: PEFT's own settings"):
        model("lora", **{"lora.options": "use_qalora=true"})
    gpt2 = settings("gpt2")
    with pytest.raises(ModelError, match=r"lora.form = 'miss': .*Conv1D"):
        model("miss", **{k: gpt2[k] for k in ("model.path", "model.task", "lora.target-modules")})


def test_the_document_holds_the_table() -> None:
    text = (ROOT / "docs" / "extend" / "forms.md").read_text()
    assert forms.table() in text, "run: python docs/generate_configuration.py"
    for name in [*FORMS, *forms.INITS, *LEFT_OUT, *INITS_LEFT_OUT]:
        assert f"`{name}`" in text, name
    told = " ".join(text.split())
    for name, why in {**LEFT_OUT, **INITS_LEFT_OUT}.items():
        assert f"- `{name}`: {' '.join(why.split())}." in told, name


def test_the_generator_writes_the_table_anew_and_nothing_else() -> None:
    generator = load(ROOT / "docs" / "generate_configuration.py", "docs_generate_configuration")
    text = (ROOT / "docs" / "extend" / "forms.md").read_text()
    last = forms.table().splitlines()[-1] + "\n"
    assert generator.with_table(text.replace(last, "| stale |\n")) == text


def test_the_command_prints_every_form() -> None:
    """In the width of the terminal, with no word cut."""
    for columns in (80, 200):
        done = CliRunner().invoke(get_command(app), ["forms"], env={"COLUMNS": str(columns)})
        assert done.exit_code == 0
        found = done.output.splitlines()
        assert max(map(len, found)) <= columns
        words = {word.strip(",;:") for line in found for word in line.split()}
        assert {*FORMS, *forms.INITS, *STRATEGIES} <= words


# -- whole federations --------------------------------------------------------------------------

RUNS = [
    ("fourierft", "fedavg"),
    ("vera", "ffa"),
    ("tinylora", "fedex"),
    pytest.param("psoft", "fedavg", marks=pytest.mark.slow),
    pytest.param("dora", "fedavg", marks=pytest.mark.slow),
    pytest.param("randlora", "fedavg", marks=pytest.mark.slow),
]


def run(settings: Settings, form: str, name: str, **changes: object) -> tuple[Any, Any]:
    seen: list[FederatedLora] = []
    more = {"train.steps": 3, "data.partition": "dirichlet", **changes}
    ran = federate(given(settings, form, name, **{**quick(name), **more, "clients.ranks": "4"}),
                   before=seen.append)  # fmt: skip
    return ran, seen[0]


@pytest.mark.parametrize(("form", "name"), RUNS)
def test_a_federation_of_a_form_is_proved_and_exported(
    settings: Settings, tmp_path: Path, form: str, name: str
) -> None:
    ran, server = run(settings, form, name)
    proof = ran.rounds[-1]["proof"]
    assert not ran.rounds[-1]["failures"]
    assert proof["norm"] > 0
    assert proof["promise"] == forms.guarantee(FORMS[form], server.setting.strategy)
    if proof["promise"] == "exact":
        assert proof["deviation"] < proof["bound"]
    else:
        assert proof["deviation"] > 1e-3
    load_state(server.setting, server.session, server.run, server.run.state)
    ids = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 20, 3]])
    with torch.no_grad():
        want = server.setting.model.peft.eval()(input_ids=ids).logits
        for merged in (False, True):
            export_run(ran.directory, tmp_path / str(merged), merged=merged)
            config, labels = server.setting.config, server.setting.labels
            plain = load_exported(config, labels, tmp_path / str(merged), merged)
            got = plain(input_ids=ids).logits
            assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    with server.setting.model.peft.disable_adapter(), torch.no_grad():  # else all would agree
        assert not torch.allclose(server.setting.model.peft(input_ids=ids).logits, want, rtol=1e-3)


def test_a_mean_that_forgets_the_weights_stops_the_run_of_a_linear_form(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fedavg.mean
    even = lambda uploads, s: real((replace(u, num_examples=1) for u in uploads), s)  # noqa: E731
    monkeypatch.setattr(fedavg, "mean", even)
    with pytest.raises(ProofError, match="fedavg promises an exact aggregation"):
        run(settings, "fourierft", "fedavg")


def test_fedsa_on_vera_shares_d_and_keeps_b(settings: Settings) -> None:
    ran, server = run(settings, "vera", "fedsa", **{"output.keep-updates": True,
                      "strategy.fedsa.average-at-end": False, "lora.dropout": 0.1})  # fmt: skip
    tensors, _ = ran.update(2, 0)
    assert {n.split(".")[-1] for n in tensors} == {"A"}
    assert all(t.shape == (1, RANK) for t in tensors.values())  # d, and r numbers each way
    assert ran.rounds[-1]["proof"]["promise"] == "shared"
    assert ran.rounds[-1]["proof"]["deviation"] < 1e-6
    assert len([*(ran.directory / "clients").rglob("round-*.safetensors")]) >= 3
    assert not any(bool(B.any()) for B in server.run.state.B.values())  # b never left a client


# -- initialisations and bases of low precision ---------------------------------------------------


def test_pissa_takes_one_part_out_of_the_base_for_clients_of_any_rank(
    settings: Settings, tmp_path: Path
) -> None:
    """Narrow clients train the leading part of what the widest took out; the rest is folded."""
    seen: list[FederatedLora] = []
    more = {"lora.init": "pissa", "clients.ranks": "2,3,5", "train.steps": 3}
    federated = settings(**quick("fedex", **more))
    ran = federate(federated, before=seen.append)
    for r in ran.rounds[1:]:
        assert not r["failures"]
        assert r["proof"]["deviation"] < r["proof"]["bound"]
        assert r["proof"]["model_deviation"] < r["proof"]["bound"]
    assert len([*(ran.directory / "clients").rglob("base/00000.safetensors")]) == 1
    base_offset = seen[0].run.base_offset
    assert {p.rank for p in base_offset.values()} == {5}
    for m, W in seen[0].setting.model.weights().items():
        S = torch.linalg.svdvals(W)
        assert torch.allclose(base_offset[m].delta().norm(), S[:5].norm(), rtol=1e-4)
    for merged in (False, True):
        out = tmp_path / str(merged)
        assert export_run(ran.directory, out, merged=merged).deviation < 1e-5


def test_a_resumed_run_from_pissa_has_the_same_bits(settings: Settings) -> None:
    more = {"lora.init": "pissa", "clients.ranks": "2,3", "run.rounds": 3}

    def breaks(server: FederatedLora) -> None:
        def started(number: int, _: Any) -> None:
            if number == 3:
                raise RuntimeError("power cut")

        server.observer.round_started = started  # type: ignore[method-assign]

    given = settings(**quick("ffa", **more))
    with pytest.raises(RuntimeError, match="power cut"):
        federate(given, before=breaks)
    resumed = federate({**given, "run.resume": True})
    whole = federate({**given, "run.name": "whole"})
    assert resumed.adapter == whole.adapter


def test_loftqs_base_is_the_same_on_every_client_and_goes_into_the_export(
    settings: Settings, tmp_path: Path
) -> None:
    seen: list[FederatedLora] = []
    more = {"lora.init": "loftq", "clients.ranks": "2,3,5"}
    ran = federate(settings(**quick("fedex", **more)), before=seen.append)
    assert not any(r["failures"] for r in ran.rounds)
    assert ran.rounds[-1]["proof"]["model_deviation"] < ran.rounds[-1]["proof"]["bound"]
    server, stored = seen[0], [*(ran.directory / "clients").rglob("base/00000.safetensors")]
    assert len(stored) == 1
    kept = ClientMemory(ran.directory / "clients", 0, server.run.token).base_offset()
    assert kept.keys() == server.run.base_offset.keys() == server.setting.model.shapes.keys()
    for m, moved in server.run.base_offset.items():
        assert torch.equal(kept[m], moved), m
    for merged in (False, True):
        assert export_run(ran.directory, tmp_path / str(merged), merged=merged).deviation < 1e-5


@pytest.mark.parametrize("name", ["flora", "fedsa", "fedsb", "hetlora"])
def test_a_strategy_that_begins_with_its_own_factors_refuses_pissa(
    settings: Settings, name: str
) -> None:
    with pytest.raises(StrategyError, match=rf"lora.init = 'pissa': {name} begins with .*; use"):
        federate(settings(**quick(name, **{"lora.init": "pissa"})))


def test_pissa_is_refused_where_the_wire_would_round_the_base(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"use wire.dtype = 'float32'"):
        preflight.read(settings(**{"lora.init": "pissa", "wire.dtype": "int8"}))


def test_the_proof_says_what_rounding_costs_a_bfloat16_base(
    settings: Settings, tmp_path: Path
) -> None:
    """flora: all that is learned goes into the base."""
    found, lost = {}, {}
    for merge in ("auto", "into-base"):
        low = {"model.dtype": "bfloat16", "model.merge": merge, "run.name": merge}
        ran = federate(settings(**quick("flora", **{**low, "train.steps": 3})))
        proof = ran.rounds[-1]["proof"]
        assert proof["deviation"] < proof["bound"]
        found[merge] = proof["model_deviation"]
        assert proof["model_deviation"] < proof["model_bound"]
        lost[merge] = export_run(ran.directory, tmp_path / f"{merge}-out", merged=True).rounding
    assert found["auto"] < 1e-6
    assert 1e-4 < found["into-base"] < 1e-2
    assert lost["auto"] > 1e-3


def test_a_quantised_base_takes_no_form_that_reads_it_and_no_change(settings: Settings) -> None:
    low = {"model.quantization": "4bit"}
    for form in set(FORMS) - set(forms.ON_QUANTISED):
        with pytest.raises(ConfigError, match="this form reads W0; use lora"):
            preflight.read(given(settings, form, "fedavg", **low))
    with pytest.raises(ConfigError, match="quantised weights cannot take a change"):
        preflight.read(settings(**low, **{"model.merge": "into-base"}))


@pytest.mark.parametrize("bits", ["8bit", "4bit", "int8"])
def test_a_quantised_base_federates_with_its_changes_beside_it(
    settings: Settings, tmp_path: Path, bits: str
) -> None:
    pytest.importorskip("torchao" if bits == "int8" else "bitsandbytes")
    ran = federate(settings("llama", **quick("fedex", **{"model.quantization": bits})))
    for r in ran.rounds[1:]:
        assert not r["failures"]
        assert r["proof"]["model_deviation"] < r["proof"]["bound"]
    assert export_run(ran.directory, tmp_path / "peft").deviation < 0.05
    with pytest.raises(ModelError, match="quantised weights cannot take the change"):
        export_run(ran.directory, tmp_path / "merged", merged=True)


def test_loftq_on_a_base_of_four_bits_takes_nothing_out_of_it(settings: Settings) -> None:
    pytest.importorskip("bitsandbytes")
    low = {"model.quantization": "4bit", "lora.init": "loftq", "clients.ranks": "2,6"}
    seen: list[FederatedLora] = []
    ran = federate(settings("llama", **quick("ffa", **low)), before=seen.append)
    assert not any(r["failures"] for r in ran.rounds)
    server = seen[0]
    assert not server.run.base_offset
    whole = Model(Config.read(settings("llama")), ()).weights()
    me = Client(-1, server.setting.model.layers(dict.fromkeys(server.setting.model.shapes, 6)))
    first = server.setting.model.init_factors(me, 0)
    for m, Q in server.setting.model.weights().items():
        gap = whole[m] - Q.float()
        left = gap - first.scale[m] * first.B[m] @ first.A[m]
        assert 0 < float(left.norm()) < 0.8 * float(gap.norm())


def test_alora_trains_on_a_base_of_four_bits(settings: Settings) -> None:
    pytest.importorskip("bitsandbytes")
    low = {"model.quantization": "4bit", "clients.ranks": "3"}
    ran = federate(given(settings, "alora", "ffa", **quick("ffa", **low)))
    assert not any(r["failures"] for r in ran.rounds)
    assert 0 < ran.rounds[-1]["proof"]["model_deviation"] < ran.rounds[-1]["proof"]["bound"]
