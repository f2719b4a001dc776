"""Experts of a mixture, which PEFT adapts in stacked parameters: each is a layer like any other."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedlora import check, export, simulate
from fedlora.config.reader import Config
from fedlora.errors import FedLoraError, ModelError
from fedlora.launch.doctor import examine
from fedlora.lora.adapter import Factors, Pair
from fedlora.reports.observers import JsonLines
from fedlora.strategies.base import Version
from fedlora.training import cache
from fedlora.training.certificate import measure, measure_shared, signs
from fedlora.training.model import layers, peft_directory
from fedlora.training.model.expert import Expert
from fedlora.training.model.model import Model
from fedlora.training.model.shape import Shape
from tests.conftest import LABELS, write_tokenizer
from tests.support.architectures import write
from tests.training.test_architectures import proved

Settings = Callable[..., dict[str, object]]

SIZES = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2}
KINDS = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
TRANSPOSED = ("gpt-oss",)
"""Their stacks are (experts, in, out)."""
BOTH = "experts.gate_up_proj,experts.down_proj"
SHARE = 0.05
"""How large B is beside A: changes that the logits show."""


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., str]:
    """A tiny mixture; of gpt-oss one whose down-projections are square, as its real ones are."""

    def make(name: str, **changes: Any) -> str:
        square = {"intermediate_size": 24} if name == "gpt-oss" else {}
        return str(write(name, tmp_path / name, **SIZES, **square, **changes))

    return make


def given(settings: Settings, path: str, **changes: object) -> dict[str, object]:
    return settings("llama") | {
        "model.path": path, "lora.target-modules": "auto", "lora.target-parameters": BOTH,
        "run.rounds": 2, "clients.count": 3, "clients.ranks": "2,3", "train.steps": 2,
        "train.lr": 0.01, "strategy.name": "fedex", **changes,
    }  # fmt: skip


def loaded(settings: Settings, path: str, **changes: object) -> Model:
    return cache._load_model(Config.read(given(settings, path, **changes)), LABELS)


def drawn(model: Model, rank: int = 2, seed: int = 0) -> Factors:
    """Factors of this rank in every layer, B not zero; no two layers alike."""
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, s.k, generator=g) for m, s in model.shapes.items()}
    B = {m: SHARE * torch.randn(s.d, rank, generator=g) for m, s in model.shapes.items()}
    return Factors(dict.fromkeys(A, 1.5), A, B)


def _base(path: str) -> Any:
    """In float64, one expert after the other: the grouped product has no float64."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, experts_implementation="eager"
    )


def merged(path: str, name: str, factors: Factors) -> Any:
    """The base in float64 with every change written into it, expert by expert, by hand."""
    base = _base(path).eval()
    with torch.no_grad():
        for m, A in factors.A.items():
            change = factors.scale[m] * factors.B[m].double() @ A.double()  # (d, k)
            *above, last, index = m.split(".")
            if index.isdigit():
                stack = getattr(base.get_submodule(".".join(above)), last)
                stack[int(index)] += change.T if name in TRANSPOSED else change
            else:
                base.get_submodule(m).weight += change
    return base


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 24, (4, 9), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def off(model: Model, base: Any) -> float:
    """How far the model's logits are from another's, relative to the largest."""
    with torch.no_grad():
        got, want = model.logits(batch()).double(), base(**batch()).logits
    return float((got - want).abs().max() / want.abs().max())


# -- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_an_experts_change_is_s_b_a_added_to_its_own_weight(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    path = made(name)
    model = loaded(settings, path)
    experts = [m for m, s in model.shapes.items() if s.stack]
    assert len(experts) == 2 * 2 * 3, "two layers of two stacks of three experts"
    factors = drawn(model)
    base = merged(path, name, factors)
    assert off(model, base) > 0.01, "the change is to be seen"
    model.load(factors)
    assert off(model, base) < 1e-5
    back = model.read()
    for column in ("A", "B"):
        for m, x in getattr(factors, column).items():
            assert torch.equal(getattr(back, column)[m], x)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_base_that_moved_holds_each_experts_change_and_goes_back_bit_for_bit(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    path = made(name)
    model = loaded(settings, path)
    first = {m: W.clone() for m, W in model.weights().items()}
    factors = drawn(model)
    model.rebase("run", [Version(1, factors.adapter())])
    assert off(model, merged(path, name, factors)) < 1e-5
    assert all(torch.equal(W, first[m]) for m, W in model.weights().items()), "W0 stays W0"
    fold = {m: p for m, p in drawn(model, seed=1).adapter().items() if model.shapes[m].stack}
    bits = {m: model.adapted[m].weight.clone() for m in fold}
    with model.folded(fold):
        assert not any(torch.equal(model.adapted[m].weight, W) for m, W in bits.items())
    assert all(torch.equal(model.adapted[m].weight, W) for m, W in bits.items())
    model.rebase("another run", [])
    assert off(model, _base(path)) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_gradients_reach_each_experts_own_factors_and_weight(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    """Against automatic differentiation of the merged base: dL/dA = s B^T G, dL/dB = s G A^T."""
    path = made(name)
    model = loaded(settings, path, **{"lora.alpha": 3.0, "clients.ranks": "2"})
    factors = drawn(model)
    base = merged(path, name, factors)
    base(**batch()).logits.logsumexp(-1).sum().backward()
    model.load(factors)
    live = model.trainable(frozenset({"A", "B"}))
    model.logits(batch()).logsumexp(-1).sum().backward()
    stacks = [n for n in live["A"] if "experts" in n]
    assert len(stacks) == 4, "what trains is one tensor a stack"
    for stack in stacks:
        path_of, _, parameter = stack.rpartition(".")
        G = getattr(base.get_submodule(path_of), parameter).grad  # (E, d, k), or turned
        G = G.mT if name in TRANSPOSED else G
        A, B = live["A"][stack].grad, live["B"][stack].grad
        for e in range(3):
            m = f"{stack}.{e}"
            want_A = 1.5 * factors.B[m].double().T @ G[e]
            want_B = 1.5 * G[e] @ factors.A[m].double().T
            size = 1e-4 * float(G.abs().max())
            assert (A[2 * e : 2 * e + 2] - want_A).abs().max() < size * 10
            assert (B[:, e::3] - want_B).abs().max() < size * 10


def test_base_gradients_are_each_experts_own(settings: Settings, made: Callable[..., str]) -> None:
    path = made("gpt-oss")
    model = loaded(settings, path)
    base = _base(path)
    base(**batch()).logits.logsumexp(-1).sum().backward()
    with model.base_gradients() as found:
        model.logits(batch()).logsumexp(-1).sum().backward()
        got = {m: G.clone() for m, G in found().items()}
    for m in (m for m, s in model.shapes.items() if s.stack):
        stack, e = m.rsplit(".", 1)
        want = base.get_parameter(stack).grad[int(e)].T
        assert got[m].shape == (model.shapes[m].d, model.shapes[m].k)
        assert (got[m] - want).abs().max() <= 1e-4 * want.abs().max() + 1e-6


def test_adapters_of_several_ranks_take_turns(settings: Settings, made: Callable[..., str]) -> None:
    path = made("mixtral")
    model = loaded(settings, path)
    for rank in (2, 3, 1, 2):
        factors = drawn(model, rank, seed=rank)
        model.load(factors)
        assert off(model, merged(path, "mixtral", factors)) < 1e-5


def test_experts_of_a_stack_that_differ_in_rank_and_scale_are_loaded_as_they_are(
    settings: Settings, made: Callable[..., str]
) -> None:
    """As a truncated export's do; an expert without a pair has no change."""
    path = made("gpt-oss")
    model = loaded(settings, path)
    factors = drawn(model, 3)
    cut = [m for m, s in model.shapes.items() if s.stack]
    adapter = dict(factors.adapter())
    adapter[cut[0]] = Pair(factors.A[cut[0]][:1], factors.B[cut[0]][:, :1], 0.5)
    del adapter[cut[4]]
    uneven = Factors(
        {m: p.scale for m, p in adapter.items()}, {m: p.A for m, p in adapter.items()},
        {m: p.B for m, p in adapter.items()},
    )  # fmt: skip
    model.load(uneven)
    assert off(model, merged(path, "gpt-oss", uneven)) < 1e-5


# -- planted faults -------------------------------------------------------------------------------


def deviation(model: Model) -> float:
    """How far the outputs that proof and certificate read are from W0 x + s B A x."""
    factors = drawn(model)
    model.load(factors)
    x = {m: torch.randn(s.k, 3, dtype=torch.float64) for m, s in model.shapes.items() if s.stack}
    seen, W = model.probe(x), model.weights()
    numbers = measure(model, "key", x, ())
    inner = measure_shared(model, "key", (2,))
    worst = 0.0
    for m, columns in x.items():
        s = model.shapes[m]
        whole = W[m].double() + 1.5 * factors.B[m].double() @ factors.A[m].double()
        worst = max(worst, float((seen[m] - whole @ columns).abs().max()))
        points, u = signs(f"key/{m}/x", 8, s.k), signs(f"key/{m}/u", 8, s.d)
        worst = max(worst, float((numbers[m] - (u * (points @ whole.T)).sum(1)).abs().max()))
        v = signs(f"key/{m}/v", 8, 2)
        wanted = (v * (points @ factors.A[m].double().T)).sum(1)
        worst = max(worst, float((inner[f"{m}[0:2]"] - wanted).abs().max()))
    return worst


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_proof_and_certificate_read_each_expert_as_it_is(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    assert deviation(loaded(settings, made(name))) < 1e-4


def swap_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's B is another's, in reading and in writing."""
    sides = Expert.sides

    def wrong(self: Expert, adapter: str) -> tuple[Tensor, Tensor]:
        other = Expert(self._wrapper, self.parameter, len(self.stack) - 1 - self.index, False)
        return sides(self, adapter)[0], sides(other, adapter)[1]

    monkeypatch.setattr(Expert, "sides", wrong)


def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """B's columns lie expert by expert, as A's rows do: not as PEFT has them."""

    def wrong(self: Expert, adapter: str) -> tuple[Tensor, Tensor]:
        A, B = self.packed(adapter)
        E = len(self.stack)
        return A.view(E, -1, A.shape[1])[self.index], B.view(len(B), E, -1)[:, self.index]

    monkeypatch.setattr(Expert, "sides", wrong)


def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack of square weights is read the wrong way round."""
    right = layers._experts

    def wrong(base: Any, stack: str) -> Any:
        for m, s in right(base, stack):
            yield m, Shape(s.d, s.k, not s.fan_in_fan_out if s.d == s.k else True, stack)

    monkeypatch.setattr(layers, "_experts", wrong)


@pytest.mark.parametrize("fault", [swap_b, by_blocks, transposed])
def test_a_planted_fault_shows_in_what_proof_and_certificate_read(
    settings: Settings, made: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:  # fmt: skip
    fault(monkeypatch)
    assert deviation(loaded(settings, made("gpt-oss"))) > 0.01


@pytest.mark.slow
def test_a_planted_fault_ends_the_run(
    settings: Settings, made: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_b(monkeypatch)
    with pytest.raises(FedLoraError, match=r"proof|certificate"):
        simulate(given(settings, made("mixtral")))


# -- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-oss"])
def test_a_run_trains_experts_at_mixed_ranks_and_proves_it(
    settings: Settings, made: Callable[..., str], name: str
) -> None:
    changes = {"clients.count": 2, "train.steps": 1, "run.name": "moe"}
    run = simulate(given(settings, made(name), **changes))
    assert proved(run)
    found = run.adapter()
    here = "base_model.model.model.layers.1.mlp.experts"
    assert bool(found[f"{here}.lora_B.weight"].any())
    assert bool(found[f"{here}.base_layer.lora_B.weight"].any())


STRATEGIES = [
    ("fedavg", {"clients.ranks": "3"}), ("fedex", {"lora.target-modules": "all-linear"}),
    ("flora", {}), ("fedsa", {}), ("lora-a2", {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("strategy", "changes"), STRATEGIES)
def test_a_run_proves_and_exports_and_plain_libraries_reload_it(
    settings: Settings, made: Callable[..., str], tmp_path: Path, name: str, strategy: str,
    changes: dict[str, object],
) -> None:  # fmt: skip
    run = simulate(given(settings, made(name), **{"strategy.name": strategy, **changes}))
    certificate, proof = (
        run.rounds[f"{kind}.deviation"].dropna() for kind in ("certificate", "proof")
    )
    near = 0.2 if run.summary["promise"] == "approximate" else 1e-5
    assert proof.max() < near
    assert certificate.max() < near
    client = 1 if strategy == "fedsa" else None
    for whole in (False, True):
        out = export(run, tmp_path / f"out-{whole}", merged=whole, client=client)
        assert out.deviation < 1e-4
        assert out.excess <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train.gradient-checkpointing": True, "lora.init": "pissa"},
        {"model.dtype": "bfloat16", "model.merge": "into-base"},
        {"train.precision": "bfloat16", "lora.layers": "-1"},
        {"model.task": "classification", "data.prompt": "", "lora.target-modules": "all-linear"},
        {"lora.rank-pattern": r"experts.gate_up_proj.\d+=4"},
    ],
    ids=str,
)
def test_what_goes_with_experts(
    settings: Settings, made: Callable[..., str], tmp_path: Path, changes: dict[str, object]
) -> None:
    run = simulate(given(settings, made("mixtral"), **changes))
    assert run.rounds["proof.deviation"].dropna().max() < 1e-5
    for whole in (False, True):
        assert export(run, tmp_path / f"out-{whole}", merged=whole).excess <= 1


class StopsAfterRoundOne(JsonLines):
    def round_done(self, record: Mapping[str, Any]) -> None:
        if record.get("round") == 1:
            raise RuntimeError("stopped")


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(
    settings: Settings, made: Callable[..., str]
) -> None:
    path = made("gpt-oss")
    whole = simulate(given(settings, path, **{"run.name": "whole"}))
    part = given(settings, path, **{"run.name": "part"})
    with pytest.raises(RuntimeError, match="stopped"):
        simulate(part, observers=[StopsAfterRoundOne(lambda _: None)])
    resumed = simulate({**part, "run.resume": True})
    want, got = whole.adapter(), resumed.adapter()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("depth", [2, 11])
def test_an_export_names_the_parameters_and_packs_them_as_peft_reads_them(
    settings: Settings, made: Callable[..., str], tmp_path: Path, depth: int
) -> None:
    """A loaded copy is another program's: PEFT's own, on a base that knows nothing of fedlora.

    From 20 modules on PEFT shortens their names.
    """
    from peft import PeftModel

    path = made("gpt-oss", num_hidden_layers=depth)
    model = loaded(settings, path)
    factors = drawn(model)
    from fedlora.strategies.base import Effective

    peft_directory.save_peft(model, Effective((), factors), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(path)
    read = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    config = read.peft_config["default"]
    stacks = {s.stack for s in model.shapes.values() if s.stack}
    assert set(config.target_parameters) == stacks
    assert off(model, merged(path, "gpt-oss", factors)) > 0.01
    model.load(factors)
    with torch.no_grad():
        assert off(model, lambda **x: read(**x)) < 1e-5


# -- mistakes, and what doctor says ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("mixtral", "experts.w1", r"experts.w1 matches no parameter; choose from mlp.experts.gate"),
        ("mixtral", "mlp.gate.weight", r"is \(3, 24\) of torch.float32, no stack of real weights"),
        ("llama", "gate_up_proj", "matches no parameter; this model has none; leave it empty"),
        ("gpt-oss", "router.weight", "no stack of real weights of its module's `num_experts`"),
        ("xlnet", "rel_attn.q", "no stack of real weights of its module's `num_experts`"),
    ],
)
def test_a_parameter_that_is_no_stack_is_refused_with_those_that_are(
    settings: Settings, made: Callable[..., str], tmp_path: Path, name: str, target: str, says: str
) -> None:
    path = made(name) if name in KINDS else str(write(name, tmp_path / name))
    changes = {"lora.target-parameters": target}
    if name == "xlnet":
        changes |= {"model.task": "classification", "lora.target-modules": "layer_1"}
    with pytest.raises(ModelError, match=f"^lora.target-parameters: {target} .*{says}|{says}"):
        loaded(settings, path, **changes)


def test_modules_that_peft_takes_for_experts_are_refused(
    settings: Settings, tmp_path: Path
) -> None:
    """DeepSeek's shared experts and first layers are linear modules, of the names that PEFT turns
    into stacked experts; its attention and its experts are adapted as any mixture's."""
    config = transformers.DeepseekV3Config(
        vocab_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=40, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, eos_token_id=2,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(str(tmp_path / "deepseek"))
    write_tokenizer(tmp_path / "deepseek")
    path = str(tmp_path / "deepseek")
    with pytest.raises(ModelError, match=r"PEFT takes down_proj, gate_proj, up_proj for this mod"):
        loaded(settings, path, **{"lora.target-modules": "all-linear"})
    model = loaded(settings, path)
    factors = drawn(model)
    model.load(factors)
    assert off(model, merged(path, "deepseek", factors)) < 1e-5


def test_the_prefix_cache_leaves_mixtures_alone(
    settings: Settings, made: Callable[..., str]
) -> None:
    """How many of a group's tokens an expert gets, and so the bits, depends on the others."""
    changes = {"lora.layers": "-1", "train.prefix-cache": 8, "lora.target-parameters": ""}
    assert loaded(settings, made("mixtral"), **changes).prefix is None
    assert loaded(settings, settings("llama")["model.path"], **changes).prefix is not None


def test_experts_of_one_parameter_with_ranks_of_their_own_are_refused(
    settings: Settings, made: Callable[..., str]
) -> None:
    changes = {"lora.rank-pattern": "layers.0.mlp.experts.down_proj.2=5"}
    (problem,) = check(given(settings, made("mixtral"), **changes))
    assert "layers.0.mlp.experts.down_proj the ranks 2, 5" in problem or "3, 5" in problem
    assert "one parameter, which has one rank" in problem


def test_doctor_says_how_many_experts_are_adapted_and_which_key_adapts_the_others(
    settings: Settings, made: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted by hand: 2 layers of 3 experts; down is 24 x 40, gate and up 80 x 24."""
    path = tmp_path / "moe.toml"
    changes = {"lora.target-parameters": "experts.down_proj"}
    path.write_text(tomli_w.dumps(given(settings, made("mixtral"), **changes)))
    assert examine(path, {}) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 adapted experts in 2 stacked tensors, 0.0 M weights" in said
    assert "experts in 2 stacked tensors, not adapted" in said
    assert 'lora.target-parameters = "mlp.experts.gate_up_proj" would adapt them' in said


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_a_server_of_linear_adapters_is_told_to_take_the_merged_weights(
    settings: Settings, made: Callable[..., str], target: str
) -> None:
    from fedlora.launch.export_targets import problems

    (said,) = problems(target, loaded(settings, made("mixtral")), 0)
    assert "does not read adapters of experts as PEFT stacks them (lora.target-parameters)" in said
    assert "--for merged writes whole weights" in said
