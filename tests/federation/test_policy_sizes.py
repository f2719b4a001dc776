"""A server that declares one size, and sends or has a node make another.

What is compared is what the node would allocate: each attack is a few bytes on the wire.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import ModelError, PolicyError, WireError
from fedlora.federation.client.admit import admit
from fedlora.federation.client.first_gradient import sketch
from fedlora.federation.client.sent_sizes import check_download, check_modules
from fedlora.federation.wire.codes import Code
from fedlora.federation.wire.job import Job
from fedlora.lora.adapter import Factors, Pair
from fedlora.strategies.base import Download, Version
from fedlora.training.model.model import Model
from tests.conftest import tiny_settings
from tests.support.tiny_federation import quick
from tests.support.under_policy import Recorded, recorded, sent, written

RANK = 16
"""What every policy here allows: see `written`."""
MODULE = "bert.encoder.layer.0.attention.self.query"
Change = Callable[[str, Array], Array]


@pytest.fixture(scope="module")
def node(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorded, Path]:
    """What an honest server sends, and a node's policy."""
    root = tmp_path_factory.mktemp("sizes")
    given = tiny_settings(tiny, root, "float32", "bert", **quick("fedavg", **{"run.rounds": 1}))
    nodes = {i: written(root / f"node-{i}", tiny["bert"], tiny["rows"]) for i in range(3)}
    return recorded(given, nodes), nodes[0]


@pytest.fixture(scope="module")
def model(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(Config.read(tiny_settings(tiny, tmp_path_factory.mktemp("m"), "float32")), "abc")


def array(*shape: int) -> Array:
    return Array("float32", shape, "fedlora.float32", np.zeros(shape, "float32").tobytes())


def answered(node: tuple[Recorded, Path], change: Change) -> Message:
    """The node's answer where the job says what it did, and the factors are others."""
    kept, policy = node
    content = copy.deepcopy(kept.messages["train"])
    factors = content.array_records["send"].items()
    content["send"] = ArrayRecord({key: change(key, x) for key, x in factors})
    return sent(content, "train", kept.config, policy)


def of_rank(rank: int) -> Change:
    def change(key: str, x: Array) -> Array:
        shapes = {"A": (rank, x.shape[-1]), "B": (x.shape[0], rank)}
        return array(*shapes[key[0]]) if key[0] in shapes else x

    return change


def test_a_rank_that_the_job_did_not_declare_is_held_against_the_policy(
    node: tuple[Recorded, Path],
) -> None:
    reply = answered(node, of_rank(RANK + 1))
    assert reply.error.code == Code.NOT_ALLOWED
    assert "does not allow the ranks" in reply.error.reason
    assert not answered(node, of_rank(RANK)).has_error()


def test_a_factor_of_few_numbers_is_not_spread_over_a_large_one(
    node: tuple[Recorded, Path],
) -> None:
    """A (r, 1) would be copied to each of k columns: a message of r numbers to r k."""

    def thin(key: str, x: Array) -> Array:
        return array(*{"A": (3, 1), "B": (1, 1)}[key[0]]) if key[0] in "AB" else x

    reply = answered(node, thin)
    assert reply.has_error()
    assert reply.error.reason.startswith("ModelError")


@pytest.mark.parametrize(
    "send",
    [
        Factors(A={"m": torch.zeros(RANK + 1, 3)}),
        Factors(B={"m": torch.zeros(3, RANK + 1)}),
        Factors(R={"m": torch.zeros(RANK + 1, RANK + 1)}),
        Factors(R={"m": torch.zeros(RANK + 1, 1, 1)}),  # blocks: a core of their number is made
        Factors(A={f"m{i}": torch.zeros(1, 1) for i in range(9)}),
        Factors(B={f"m{i}": torch.zeros(1, 1) for i in range(9)}),
    ],
)
def test_every_kind_of_factor_is_looked_at(tmp_path: Path, send: Factors) -> None:
    policy = Policy.load(written(tmp_path, "m", "rows", limits={"modules": 8}))
    with pytest.raises(PolicyError):
        check_download(policy, Download(send, frozenset()))
    check_download(None, Download(send, frozenset()))


def test_adapted_modules_are_counted_in_the_model_too(tmp_path: Path) -> None:
    """Where the job names one of the modules that lora.target-modules has the node adapt."""
    policy = Policy.load(written(tmp_path, "m", "rows", limits={"modules": 8}))
    check_modules(policy, 8)
    with pytest.raises(PolicyError):
        check_modules(policy, 9)


JOB: dict[str, Any] = {
    "round": 1, "token": "t", "incarnation": "i", "client": 0, "ranks": {"q": 4},
    "memory_round": 0, "base_number": 0, "fingerprint": "", "labels": (),
}  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        {"lora.form": "loha", "clients.ranks": str(RANK + 1)},
        {"lora.form": "vera", "clients.ranks": "1000000000"},
        {"lora.form": "vblora", "lora.options": "num_vectors=4097"},
        {"lora.form": "vblora", "lora.options": "num_vectors=999999999"},
        {"lora.form": "oft", "lora.options": "num_cayley_neumann_terms=999999999"},
        {"lora.form": "gralora", "lora.options": f"hybrid_r={RANK + 1}"},
        {"lora.form": "lora-mini", "lora.options": "width=1e9"},
    ],
)
def test_the_size_of_a_form_is_limited_as_a_rank_is(
    tmp_path: Path, asked: Mapping[str, Any]
) -> None:
    policy = Policy.load(written(tmp_path, "m", "rows"))
    with pytest.raises(PolicyError):
        admit(policy, {"model.path": "m", **asked}, Job(**JOB))


def test_seeds_and_small_options_of_a_form_are_the_runs(tmp_path: Path) -> None:
    policy = Policy.load(written(tmp_path, "m", "rows"))
    for form, text in (("fourierft", "scaling=150, random_loc_seed=777777777"),
                       ("vera", "projection_prng_key=999999999, d_initial=0.1"),
                       ("lora-mini", f"width={RANK}")):  # fmt: skip
        asked = {"model.path": "m", "lora.form": form, "lora.options": text}
        admit(policy, {**asked, "clients.ranks": "4"}, Job(**JOB))


def test_ranks_of_other_clients_may_be_larger_than_this_nodes_limit(tmp_path: Path) -> None:
    """Of LoRA: what is this node's own is in its job."""
    policy = Policy.load(written(tmp_path, "m", "rows"))
    admit(policy, {"model.path": "m", "clients.ranks": "64,4"}, Job(**JOB))


def test_the_numbers_that_signs_are_drawn_for_are_ranks() -> None:
    """Of 2^33 a node would draw 8 GB of signs for each module."""
    for cuts in ([2**33], [-1], [True], ["4"], [65_536]):
        record = {**Job(**JOB).record(), "cuts": cuts}
        with pytest.raises(WireError, match="cuts"):
            Job.read(ConfigRecord(record))
    assert Job.read(ConfigRecord({**Job(**JOB).record(), "cuts": [4, 8]})).cuts == (4, 8)


@pytest.mark.parametrize("where", ["base", "start", "fold"])
def test_no_product_larger_than_a_weight_is_ever_made(model: Model, where: str) -> None:
    """B (d', 1) A (1, k') of 800 kB together would be a change of 40 GB."""
    large = {MODULE: Pair(torch.zeros(1, 100_000), torch.zeros(100_000, 1))}
    base = [Version(1, large)] if where == "base" else []
    start = large if where == "start" else None
    with pytest.raises(ModelError, match=r"is \(100000, 100000\), must be \(24, 24\)"):
        model.folded(large).__enter__() if where == "fold" else model.rebase("t", base, start)


def test_a_change_of_what_is_not_adapted_or_of_another_weights_size_is_none(model: Model) -> None:
    one = Pair(torch.zeros(1, 24), torch.zeros(24, 1))
    for change in ({"elsewhere": one}, {MODULE: torch.zeros(1, 24)}):
        with pytest.raises(ModelError, match="a base change of"):
            model.rebase("t", [Version(1, change)])
    model.rebase("t", [Version(1, {MODULE: one})])


@pytest.mark.parametrize("width", [25, 2**31, 0, -1])
def test_a_sketch_is_no_wider_than_the_weight(model: Model, width: int) -> None:
    asked = RecordDict({
        "sketch": ConfigRecord({"modules": [MODULE], "widths": [width]}), "send": ArrayRecord(),
    })  # fmt: skip
    with pytest.raises(WireError, match="a sketch of width"):
        sketch(model, None, model.config, asked)  # type: ignore[arg-type]
