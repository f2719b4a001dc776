"""The library's own adapter forms against their definitions, written anew here in NumPy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.config.reader import Config
from fedlora.errors import ConfigError, ModelError
from fedlora.federation.server.loop import FederatedLora
from fedlora.lora.forms import OWN
from fedlora.lora.forms.lora_xs import LoraXS
from fedlora.strategies.base import seeded
from fedlora.strategies.forms import FORMS
from fedlora.training.model.model import Model
from fedlora.training.model.own_tuner import OwnFormConfig, OwnFormLayer
from tests.support.exported import check_exports
from tests.support.long import few
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
Arrays = dict[str, np.ndarray[Any, Any]]
D, K, R, ALPHA = 12, 8, 4, 6.0  # out, in
BITS = 2.0**-11  # of the largest entry: what is frozen has 12 bits


# -- the slow definitions: the change (d, k) of theta and of what is frozen ----------------------


def lora_xs(t: Arrays, f: Arrays) -> Any:
    return sum(np.outer(f["B"][:, i], f["A"][j]) * t["R"][i, j] for i in range(R) for j in range(R))


def pmss(t: Arrays, f: Arrays) -> Any:
    return sum(np.outer(f["B"][:, i], f["A"][j]) * t["M"][i, j] for i in range(R) for j in range(R))


def paca(t: Arrays, f: Arrays) -> Any:
    change = np.zeros((D, K))
    for n, j in enumerate(f["columns"]):
        change[:, j] = t["D"][:, n]
    return change


def loldu(t: Arrays, f: Arrays) -> Any:
    return sum(t["z"][i] * np.outer(f["PL"][:, i], f["DU"][i]) for i in range(R))


def losia(t: Arrays, f: Arrays) -> Any:
    change = np.zeros((D, K))
    change[np.ix_(f["rows"], f["columns"])] = t["M"]
    return change


def smt(t: Arrays, f: Arrays) -> Any:
    change, b = np.zeros((D, K)), 2
    for n, M in enumerate(t["M"]):
        at = slice(n * b, n * b + b)
        change[np.ix_(f["rows"][at], f["columns"][at])] += M
    return change


def melora(t: Arrays, f: Arrays) -> Any:
    change, n = np.zeros((D, K)), 2
    for i in range(n):
        A, B = t["A"][i * R : i * R + R], t["B"][:, i * R : i * R + R]
        change[i * D // n : (i + 1) * D // n, i * K // n : (i + 1) * K // n] = B @ A
    return change


def nested(t: Arrays, f: Arrays) -> Any:
    return np.einsum("da,ar,rb,bk->dk", f["B_out"], t["B"], t["A"], f["A_out"])


SLOW: dict[str, Callable[[Arrays, Arrays], Any]] = {
    "lora-xs": lora_xs,
    "pmss": pmss,
    "paca": paca,
    "loldu": loldu,
    "losia": losia,
    "smt": smt,
    "melora": melora,
    "moslora": lambda t, f: np.einsum("di,ij,jk->dk", t["B"], t["M"], t["A"]),
    "lora-mini": nested,
    "nora": nested,
    "lotr": lambda t, f: np.einsum("di,ij,jk->dk", t["shared_B"], t["G"], t["shared_A"]),
    "msplora": lambda t, f: t["shared_B"] @ t["shared_A"] + t["B"] @ t["A"],
}
OPTIONS: dict[str, dict[str, object]] = {
    "smt": {"block": 2},
    "lora-mini": {"width": 6},
    "nora": {"width": 6},
}
UNSCALED = {"loldu", "losia", "smt"}


def layer(form: str, seed: int = 3, W: torch.Tensor | None = None) -> OwnFormLayer:
    base = nn.Linear(K, D)
    with torch.no_grad():
        base.weight.copy_(torch.randn(D, K, generator=seeded(1, 0, 0, "W")) if W is None else W)
    options = OPTIONS.get(form, {})
    config = OwnFormConfig(form=form, r=R, alpha=ALPHA, seed=seed, options=options)
    return OwnFormLayer(base, "p", config, "here")


def arrays(tensors: Any) -> Arrays:
    return {n: x.detach().double().numpy() if x.is_floating_point() else x.numpy()
            for n, x in tensors.items()}  # fmt: skip


def drawn(made: OwnFormLayer, what: str) -> dict[str, torch.Tensor]:
    g = seeded(5, 0, 0, what)
    return {n: 0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64)
            for n, p in made.theta().items()}  # fmt: skip


def set_to(made: OwnFormLayer, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for n, p in made.theta().items():
            p.copy_(values[n])


def change(made: OwnFormLayer) -> torch.Tensor:
    """(d, k), through the layer's own forward pass."""
    x = torch.eye(K, dtype=torch.float64)
    y: torch.Tensor = made(x) - made.get_base_layer()(x)
    return y.T


@pytest.mark.parametrize("form", OWN)
def test_the_change_and_its_gradient_are_the_slow_definitions(form: str) -> None:
    made = layer(form).double()
    theta, frozen = drawn(made, "theta"), arrays(made.form_frozen)
    set_to(made, theta)
    s = 1.0 if form in UNSCALED else ALPHA / R
    slow = lambda values: s * SLOW[form](arrays(values), frozen)  # noqa: E731
    got = change(made)
    assert np.abs(got.detach().numpy() - slow(theta)).max() < 1e-12
    assert float(got.detach().abs().max()) > 1e-3
    G = torch.randn(D, K, generator=seeded(7, 0, 0, "G"), dtype=torch.float64)
    (G * got).sum().backward()
    for n, p in made.theta().items():
        assert p.grad is not None
        for at in range(p.numel()):
            step = {m: x.clone() for m, x in theta.items()}
            pair = []
            for sign in (1, -1):
                step[n].view(-1)[at] = theta[n].view(-1)[at] + sign * 1e-4
                pair.append((G.numpy() * slow(step)).sum())
            want = (pair[0] - pair[1]) / 2e-4
            assert abs(float(p.grad.view(-1)[at]) - want) < 1e-6 * max(1.0, abs(want)), (n, at)


@pytest.mark.parametrize("form", OWN)
def test_training_begins_at_w0_and_can_move(form: str) -> None:
    made = layer(form).double()
    got = change(made)
    assert not bool(got.any())
    (torch.randn(D, K, generator=seeded(7, 0, 0, "G"), dtype=torch.float64) * got).sum().backward()
    assert any(bool(p.grad is not None and p.grad.any()) for p in made.theta().values())


@pytest.mark.parametrize("form", OWN)
def test_a_mean_of_what_trains_is_a_mean_of_changes_where_the_form_is_linear(form: str) -> None:
    """To float64's rounding; and where it is multilinear, here is a counterexample."""
    made, weights = layer(form).double(), (0.5, 0.3, 0.2)
    thetas = [drawn(made, f"client {i}") for i in range(3)]
    want = torch.zeros(D, K, dtype=torch.float64)
    for p, theta in zip(weights, thetas, strict=True):
        set_to(made, theta)
        want += p * change(made).detach()
    sums = {n: sum(p * t[n] for p, t in zip(weights, thetas, strict=True)) for n in thetas[0]}
    set_to(made, sums)  # type: ignore[arg-type]
    gap = float((change(made) - want).detach().norm() / want.norm())
    if FORMS[form].law == "linear":
        assert gap < 1e-14
    else:
        assert gap > 1e-2


@pytest.mark.parametrize("form", OWN)
def test_what_is_frozen_follows_from_w0_and_the_seed_and_forgets_last_bits(form: str) -> None:
    """A machine whose W0 differs in float64's last bits makes the same."""
    own, r = OWN[form](**OPTIONS.get(form, {})), R
    W = torch.randn(D, K, generator=seeded(1, 0, 0, "W"), dtype=torch.float64)
    found = [own.frozen(V, r, seeded(3, 0, 0, "frozen")) for V in (W, W * (1 + 1e-14))]
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name
        if x.is_floating_point():
            assert torch.equal(x.float().double(), x), "it is the same in float32"


def test_lora_xs_is_between_the_leading_singular_vectors() -> None:
    made = layer("lora-xs")
    W = made.get_base_layer().weight.detach().double().numpy()
    U, S, Vh = np.linalg.svd(W)
    f = arrays(made.form_frozen)
    assert np.abs(np.abs(f["A"]) - np.abs(Vh[:R])).max() < BITS
    assert np.abs(f["B"] @ f["A"] - (U[:, :R] * S[:R]) @ Vh[:R]).max() < 4 * BITS * S[0]


def test_pmss_takes_the_rows_and_columns_of_a_pivoted_qr() -> None:
    made = layer("pmss")
    W = made.get_base_layer().weight.detach().double().numpy()
    from scipy.linalg import qr

    f, size = arrays(made.form_frozen), np.linalg.norm(W) / K**0.5
    for name, M in (("A", W.T), ("B", W)):
        chosen = np.sort(qr(M, pivoting=True)[2][:R])  # columns of M
        part = (M[:, chosen] / size).T if name == "A" else M[:, chosen] / size
        assert np.abs(f[name] - part).max() < BITS * np.abs(part).max()


def test_paca_trains_columns_that_the_seed_alone_draws() -> None:
    one, again, other = (arrays(layer("paca", seed).form_frozen)["columns"] for seed in (1, 1, 2))
    assert len({*one.tolist()}) == R
    assert (one == again).all()
    assert (one != other).any()


def test_loldu_is_of_w0s_own_factors() -> None:
    f = arrays(layer("loldu").form_frozen)
    from scipy.linalg import lu

    W = layer("loldu").get_base_layer().weight.detach().double().numpy()
    P, L, U = lu(W)
    assert np.abs(f["PL"] - (P @ L)[:, :R]).max() < BITS
    assert np.abs(f["DU"] - U[:R]).max() < BITS * np.abs(U).max()


def test_losia_and_smt_choose_where_w0_is_largest() -> None:
    W = np.arange(D * K, dtype=float).reshape(D, K) % 17
    W[3:5, 4:6] += 100
    torch_W = torch.from_numpy(W).float()
    f = arrays(layer("losia", W=torch_W).form_frozen)
    assert {3, 4} <= {*f["rows"].tolist()}
    assert {4, 5} <= {*f["columns"].tolist()}
    f = arrays(layer("smt", W=torch_W).form_frozen)
    blocks = {tuple(x) for x in np.stack([f["rows"][::2], f["columns"][::2]], 1).tolist()}
    assert {(2, 4), (4, 4)} <= blocks, "rows 3 and 4 are of two blocks of a grid of 2"


def test_nora_is_outside_of_w0s_leading_singular_vectors() -> None:
    made = layer("nora")
    f, W = arrays(made.form_frozen), made.get_base_layer().weight.detach().double().numpy()
    U, S, Vh = np.linalg.svd(W)
    assert np.abs(f["B_out"] @ f["A_out"] - (U[:, :6] * S[:6]) @ Vh[:6] / S[0]).max() < 8 * BITS


def test_what_layers_share_is_one_parameter_that_travels_once(settings: Settings) -> None:
    config = Config.read(given(settings, "lotr", "fedavg"))
    model = Model(config, ("x", "y"))
    layers = [*model.adapted.values()]
    assert len({id(x.theta()["shared_A"]) for x in layers}) == len(
        {tuple(x.theta()["shared_A"].shape) for x in layers}
    )
    assert len({id(x.theta()["G"]) for x in layers}) == len(layers)
    names = [n for n in model.live()["other"] if n.endswith("shared_A")]
    assert len(names) == len({tuple(x.theta()["shared_A"].shape) for x in layers})


# -- whole federations --------------------------------------------------------------------------


def given(settings: Settings, form: str, name: str, **changes: object) -> dict[str, object]:
    options = ",".join(f"{k}={v!r}".replace("'", '"') for k, v in OPTIONS.get(form, {}).items())
    more = {"lora.form": form, "clients.ranks": "4", "lora.options": options, "train.steps": 3}
    return settings(**{**quick(name), **more, "data.partition": "dirichlet", **changes})


def strategy_of(form: str) -> str:
    """One that is exact, where there is one."""
    known = FORMS[form]
    return "fedex" if known.law == "linear" else "ffa" if can_be_exact(form) else "fedavg"


def can_be_exact(form: str) -> bool:
    known = FORMS[form]
    return known.law == "linear" or (known.kind == "sides" and not known.beside)


@pytest.mark.parametrize("form", few(OWN, *[*OWN][::4]))
def test_a_federation_is_certified_resumes_to_its_bits_and_exports_as_plain_lora(
    settings: Settings, tmp_path: Path, form: str
) -> None:
    """Two rounds, of which the second is resumed; the export loads without fedlora."""
    name = strategy_of(form)
    config, seen = given(settings, form, name), list[FederatedLora]()

    def breaks(server: FederatedLora) -> None:
        def started(number: int, _: Any) -> None:
            if number == 2:
                raise RuntimeError("power cut")

        server.observer.round_started = started  # type: ignore[method-assign]

    with pytest.raises(RuntimeError, match="power cut"):
        federate(config, before=breaks)
    ran = federate({**config, "run.resume": True}, before=seen.append)
    whole = federate({**config, "run.name": "whole"})
    assert ran.adapter == whole.adapter
    for r in ran.rounds[1:]:
        assert not r["failures"]
        assert r["proof"]["promise"] == ("exact" if can_be_exact(form) else "approximate")
        if can_be_exact(form):
            assert r["proof"]["deviation"] < r["proof"]["bound"]
            assert r["certificate"]["excess"] <= 1
        assert r["certificate"]["start_excess"] <= 1
    assert ran.rounds[-1]["proof"]["norm"] > 0
    (server,) = seen
    check_exports(server, tmp_path)
    assert '"peft_type": "LORA"' in (tmp_path / "False" / "adapter_config.json").read_text()


def test_one_bit_of_what_is_frozen_is_in_the_fingerprint_that_clients_compare(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.read(given(settings, "lora-xs", "fedavg"))
    one, again = Model(config, ("x", "y")), Model(config, ("x", "y"))
    assert one.fingerprint == again.fingerprint
    real = LoraXS.frozen

    def other(self: LoraXS, *args: Any) -> dict[str, torch.Tensor]:
        found = real(self, *args)
        found["A"][0, 1] += 2.0**-20
        return found

    monkeypatch.setattr(LoraXS, "frozen", other)
    assert Model(config, ("x", "y")).fingerprint != one.fingerprint


def test_what_an_own_form_cannot_be_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"lora.options: lora-xs has no 'q'; it has none"):
        federate(given(settings, "lora-xs", "fedavg", **{"lora.options": "q=1"}))
    with pytest.raises(ModelError, match=r"'lora-xs': of .*, clients.ranks = 400: must be at most"):
        federate(given(settings, "lora-xs", "fedavg", **{"clients.ranks": "400"}))
    with pytest.raises(ConfigError, match="this form reads W0"):
        federate(given(settings, "paca", "fedavg", **{"model.quantization": "4bit"}))
