"""Initial adapters computed from the rows of lora.calibration, which belong to no client.

For a module of inputs x (k) over all the tokens of the calibration rows, padding apart:

    eva      A = the leading principal directions of x, B = 0. The base stays. Paischer et al.,
             "One Initialization to Rule them All", https://arxiv.org/abs/2410.07170
    corda    C = sum x x^T,  U S V^T = SVD(W0 C),  s B A = U_r S_r V_r^T C^-1. Yang et al., "CorDA",
             instruction-previewed, https://arxiv.org/abs/2406.05223
    lora_ga  G = the loss's mean gradient at W0,  U S V^T = SVD(G),  A = V_1..r^T, B from
             U_r+1..2r S_r+1..2r. Wang et al., "LoRA-GA", https://arxiv.org/abs/2407.05000

Once, at the server, before round 1; clients get A and B as they get any, and what goes out of the
base as PiSSA's does. corda and lora_ga end in PEFT's own code. eva is PEFT's at rho = 1, where no
layer takes ranks from another, without a label mask; by one pass and an exact eigendecomposition
in place of an incremental SVD that goes over the rows until it changes no more.

Memory: 8 k^2 bytes a module for eva and corda, as many modules a pass as fit into ROOM; for lora_ga
the gradients, 4 d k bytes a module.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.lora.adapter import Factors, Pair
from fedlora.lora.start_quality import Quality, of_matrix, quality
from fedlora.strategies.base import Client, seeded
from fedlora.strategies.forms import CALIBRATED
from fedlora.training.data.batches import DECODER, Encoded, eval_batches
from fedlora.training.data.corpus import Corpus, load_calibration
from fedlora.training.devices import HOST, moved, wide_on_host
from fedlora.training.draws import host_draws
from fedlora.training.model.decoder import as_read
from fedlora.training.model.layers import initial
from fedlora.training.model.loading import PREFIX
from fedlora.training.model.loftq import nf4
from fedlora.training.model.model import Model
from fedlora.training.references import referred
from fedlora.training.tasks.outputs import at_once
from fedlora.training.train import example_losses, threads

ROOM = 2**30
"""Bytes of second moments at once; more modules than fit take another pass over the rows."""


def first_factors(
    model: Model,
    whole: Client,
    config: Config,
    corpus: Corpus,
    found: dict[str, Quality] | None = None,
) -> Factors:
    """What the run begins with: `Model.init_factors`, from calibration rows where init needs them.

    Leaves the model on W0. found: takes how good the start is, by module.

    Raises:
        DataError: lora.calibration cannot be read, or has rows of a client or of the test set.
        ModelError: what the rows show of a module is too little for its rank.
    """
    init, d = config.lora.init, config.data
    found = {} if found is None else found
    if init not in CALIBRATED:
        factors = model.init_factors(whole, config.run.seed)
        found |= _of_rounding(model, factors) if init == "loftq" else {}
        return factors
    rows = load_calibration(d, model.task, config.lora.calibration, corpus)
    longest = model.longest(d.max_length)
    encoded = model.task.encode(rows, model.tokenizer, corpus.labels, d, longest)
    encoded = referred(model, as_read(model, encoded), config, None)
    model.rebase("calibration", [])
    seed = seeded(config.run.seed, 0, 0, "calibration").initial_seed()
    with host_draws(HOST, seed), threads(config.train.threads):  # PEFT's code works on the host
        made = dict(_pairs(model, whole, config, encoded, found))
    return model.init_factors(whole, config.run.seed, {m: made[m] for m in whole.layers})


def _pairs(
    model: Model, whole: Client, config: Config, rows: Encoded, found: dict[str, Quality]
) -> Iterator[tuple[str, Pair]]:
    size, init = at_once(config), config.lora.init
    if init == "lora_ga":
        W = model.weights()
        for m, G in gradients(model, rows, config.train.microbatch or size).items():
            found[m] = of_matrix(G, 2 * whole.layers[m].rank)
            yield m, _from_gradient(W[m], G, whole, m)
        return
    for modules in _groups(model, [*whole.layers]):
        for m, (n, mean, second) in moments(model, rows, size, modules, init == "corda").items():
            layer = whole.layers[m]
            if n <= layer.rank:
                raise ModelError(
                    f"lora.calibration: {n} tokens reach {m}, whose rank is {layer.rank}; name "
                    "more rows, or lower clients.ranks"
                )
            if init == "eva":
                C = second / n - torch.outer(mean, mean) / n**2
                sizes = torch.linalg.eigvalsh(C).flip(0).clamp(min=0).sqrt()
                found[m] = quality(sizes, layer.rank)
                yield m, _principal(C, layer)
            else:
                W0 = model.weights()[m]
                found[m] = of_matrix(W0.double() @ second, layer.rank)
                yield m, _oriented(W0, second, layer)


def _of_rounding(model: Model, factors: Factors) -> dict[str, Quality]:
    """Of LoftQ: how much of what rounding W0 to 4 bits loses its pairs give back.

    Of a float base; what a base held in 4 bits has lost is not at hand here.
    """
    if model.config.model.quantization != "none":
        return {}
    W = model.weights()
    return {m: of_matrix(W[m].float() - nf4(W[m]), len(A)) for m, A in factors.A.items()}


def _principal(covariance: Tensor, layer: Any) -> Pair:
    """A (r, k): the leading eigenvectors of a covariance (k, k), the largest first; B = 0."""
    vectors = torch.linalg.eigh(covariance)[1].flip(1)  # eigh has the smallest first
    A = vectors[:, : layer.rank].T.float().contiguous()
    return Pair(A, torch.zeros(layer.d, layer.rank), layer.scale)


def _oriented(W: Tensor, C: Tensor, layer: Any) -> Pair:
    """CorDA's pair of W0 (d, k) and its inputs' C (k, k)."""
    d, k = W.shape
    scratch = nn.Linear(k, d, bias=False)
    scratch.weight.data, scratch.covariance_matrix = W.float().clone(), C.float()
    whole = collect_eigens_for_layer(scratch, LoraConfig())
    r = layer.rank
    own = CordaEigens(whole.S_WC[:r].clone(), whole.U_WC[:, :r].clone(), whole.V_WC[:, :r].clone())
    return initial(W, r, layer.scale, "corda", {"eigens": own})


def _from_gradient(W: Tensor, G: Tensor, whole: Client, m: str) -> Pair:
    """LoRA-GA's pair of W0 and the gradient there, both (d, k)."""
    layer = whole.layers[m]
    if not bool(G.any()):
        raise ModelError(
            f"lora.init = 'lora_ga': the gradient of {m} is zero at W0, as under a head that "
            "begins at zero (model.pooling = 'mean'); use eva, corda, or model.pooling = 'default'"
        )
    if 2 * layer.rank > min(G.shape):
        raise ModelError(
            f"lora.init = 'lora_ga': takes 2 r of the gradient's singular vectors, and {m} of "
            f"{layer.d} x {layer.k} has fewer than {2 * layer.rank}; lower clients.ranks"
        )
    return initial(W, layer.rank, layer.scale, "lora_ga", {"_peft_loraga_grad": G})


def gradients(model: Model, rows: Encoded, batch_size: int) -> dict[str, Tensor]:
    """The mean over the examples of the loss's gradient at W0, (d, k), by module."""
    with model.base_gradients() as found:
        for batch in eval_batches(rows, batch_size):
            example_losses(model, batch).sum().backward()
        return {m: G.float() / len(rows) for m, G in found().items()}


Moments = tuple[int, Tensor, Tensor]
"""How many inputs x (k) a module had, their sum (k) and the sum of x x^T (k, k)."""


@torch.no_grad()
def moments(
    model: Model, rows: Encoded, batch_size: int, modules: Sequence[str], scaled: bool
) -> dict[str, Moments]:
    """The moments of these modules' inputs in the untouched model, in float64.

    With `scaled`, as in PEFT's CorDA, each batch is divided by its largest entry, and the second
    moment by the number of batches: it decides how s B A is divided between B and A.
    """
    seen: dict[str, Moments] = {}
    counted = torch.zeros(0)
    batches = 0
    if rows.second == DECODER:  # a module may have either's padding: one at a time has none
        batch_size = 1

    def look(m: str, x: Tensor) -> None:
        x = wide_on_host(x)
        x = x[counted] if x.shape[:-1] == counted.shape else x.reshape(-1, x.shape[-1])
        x = x / x.abs().max().clamp(min=1e-30) if scaled else x
        n, mean, second = seen.get(m, (0, 0.0, 0.0))
        seen[m] = n + len(x), mean + x.sum(0), second + x.T @ x

    def hook(m: str) -> Any:
        return lambda _, inputs: look(m, inputs[0])

    hooks = [
        model.peft.get_submodule(PREFIX + m).register_forward_pre_hook(hook(m)) for m in modules
    ]
    try:
        with model.peft.disable_adapter():
            for batch in eval_batches(rows, batch_size):
                mask = batch.get("attention_mask")
                counted = torch.zeros(0) if mask is None else mask.bool()
                del batch["labels"]
                model.peft(**moved(batch, model.device))
                batches += 1
    finally:
        for h in hooks:
            h.remove()
    share = batches if scaled else 1
    return {m: (n, mean, second / share) for m, (n, mean, second) in seen.items()}


def _groups(model: Model, modules: Sequence[str]) -> Iterator[list[str]]:
    """The modules in runs whose second moments fit into ROOM."""
    group: list[str] = []
    size = 0
    for m in modules:
        need = 8 * model.shapes[m].k ** 2
        if group and size + need > ROOM:
            yield group
            group, size = [], 0
        group.append(m)
        size += need
    yield group
