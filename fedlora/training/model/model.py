"""The model in memory: one frozen base, PEFT adapters swapped in place, base changes folded in.

    model = Model(config, labels)
    model.rebase(token, versions)        # W = W0 + the changes so far
    with model.folded(fold):             # this client's own change, for this round only
        model.load(factors)              # A, B, (R), head at this client's ranks
        ...  train model.trainable({"A", "B", "other"})  ...
        trained = model.read()

All the clients of a process share the base; what differs between them is `Factors`. What is
loaded lies on `model.device`, or its layers on all `devices`; what goes in or out is on the host.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.lora.adapter import Adapter, Delta, Factors
from fedlora.strategies.base import Client, Layer, Version, as_factors, seeded
from fedlora.strategies.forms import CALIBRATED, FORMS, fixed_rank
from fedlora.training.devices import moved, on_host, used, wide_on_host
from fedlora.training.draws import host_draws
from fedlora.training.model import stacks
from fedlora.training.model.agreement import agree, pads_left, positions, unread
from fedlora.training.model.alora import offsets
from fedlora.training.model.compiled import compile_layers
from fedlora.training.model.expert import Expert, layer_at
from fedlora.training.model.heads import head_names
from fedlora.training.model.in_float64 import in_float64
from fedlora.training.model.inner_factor import Core
from fedlora.training.model.layers import adapter_config, check_targets, find_layers, first_pairs
from fedlora.training.model.loading import (
    PREFIX,
    checkpoint_activations,
    fingerprint,
    frozen_tensors,
    load_base,
    load_tokenizer,
    logits_of,
    without_input_gradients,
)
from fedlora.training.model.moving_base import MovingBase, beside
from fedlora.training.model.own_tuner import OwnFormLayer, layer_of, trained_beside
from fedlora.training.model.prefix_cache import Prefix
from fedlora.training.model.put import put
from fedlora.training.model.raised import named
from fedlora.training.model.start_adapter import start_of
from fedlora.training.model.ties import check_ties
from fedlora.training.model.whole import in_float32, inside_body, trained_whole
from fedlora.training.tasks import task_of

KEPT_PROFILES = 8
"""Rank profiles whose PEFT adapters stay attached; the least recently used one goes first."""


class Model:
    """A base with its adapters. Nothing here is random but what `init_factors` draws."""

    def __init__(self, config: Config, labels: Sequence[str] = ()) -> None:
        self.config = config
        self.labels = tuple(labels)
        self.devices = used(config.simulate.devices, config.model.device_map != "none")
        self.device = self.devices[0]
        self.task, self.tokenizer = task_of(config.model.task), load_tokenizer(config.model)
        base = load_base(config.model, self.labels, config.run.seed, self.devices)
        agree(base, self.tokenizer, config.model)
        self._positions, self.pads_left = positions(base), pads_left(base)
        if config.train.gradient_checkpointing:
            checkpoint_activations(base)
        self.form = FORMS[config.lora.form]
        self.rank = fixed_rank(config.lora.form, config.clients.ranks)
        self.shapes = find_layers(base, config)
        self.heads, self.stacks = head_names(base, config), stacks.stacks_of(self.shapes)
        self._inner, self._unread = inside_body(base, self.heads), unread(base)
        check_ties(base, stacks.owners(self.shapes), self.heads)
        self._of_base = fingerprint(dict(base.named_parameters()))
        self.start = start_of(base, config.model, self.heads, self.labels)
        self.prefix = Prefix.of(base, self.shapes, config)
        self._profiles: dict[tuple[tuple[str, int], ...], str] = {}
        self._born = 0
        self.peft: PeftModel = self._attach(base, dict.fromkeys(self.shapes, self.rank or 1))
        if not self.form.after:  # aLoRA's own hooks on checkpoints need them
            without_input_gradients(base)
        if config.train.compile:
            compile_layers(base)
        self.adapted: dict[str, Any] = {
            m: layer_at(self.peft, m, shape, PREFIX) for m, shape in self.shapes.items()
        }
        self._whole = {n.removeprefix(PREFIX): x for n, x in trained_whole(self.peft).items()}
        self._tensors = trained_beside(self) if self.rank else {}
        self.cores: dict[str, Core] = {}
        aside = self.start.kept_beside(config.model)
        self.base = MovingBase(self.adapted, self.shapes, beside(config.model), aside)
        self._scale: Mapping[str, float] = {}
        if self.rank:
            self._first = self.read()

    @property
    def masks(self) -> dict[nn.Parameter, Tensor]:
        """1 where a core trains, of those that do not everywhere."""
        return {x.R: x.mask for x in self.cores.values() if x.mask is not None}

    def longest(self, wanted: int) -> int:
        """The tokens of an example: as many as wanted, and no more than it has positions for."""
        return min(wanted, self._positions or wanted)

    # -- what a client can train ------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what is frozen before round 1; behind a "+" that of its start adapter."""
        if not self.rank:
            return self.start.added_to(self._of_base)
        frozen = dict(x for m, layer in self.adapted.items() for x in frozen_tensors(m, layer))
        return self.start.added_to(fingerprint(frozen, self._of_base, self.form.makes))

    def layers(self, ranks: Mapping[str, int]) -> dict[str, Layer]:
        """The client's layers at these ranks, each with alpha's scale; where a policy gives ranks
        by module one for all: of legend's last layer, or of the largest in clients.ranks.

        Those of a form of two sides have these sides' sizes; other forms have a size and no ranks.

        Raises:
            ModelError: experts of one parameter are to differ in rank.
        """
        lora = self.config.lora
        stacks.ranks_of_stacks(ranks, self.shapes)
        if self.form.kind == "sides":
            return {m: layer_of(*self.sides(m)) for m in ranks}
        if self.rank:
            return {m: Layer(self.shapes[m].d, self.shapes[m].k, self.rank, 1.0) for m in ranks}
        policies = {"legend": [*ranks.values()], "adaptive": self.config.clients.ranks}
        top = max(policies.get(self.config.ranks.policy, ()), default=0)
        power = 0.5 if lora.use_rslora else 1
        return {
            m: Layer(s.d, s.k, ranks[m], lora.alpha / ((top or ranks[m]) ** power))
            for m, s in self.shapes.items()
            if m in ranks
        }

    def weights(self) -> Mapping[str, Tensor]:
        """W0 of every adaptable module, (d, k), on the host; fetched from a card one at a time."""
        return self.base.weights()

    def init_factors(self, client: Client, seed: int, made: Adapter | None = None) -> Factors:
        """PEFT's own initialisation at the client's ranks, seeded; the head as loaded.

        B is zero, but where lora.init takes s B A out of the base: see `layers.taken_out`.
        The same (seed, ranks) gives the same factors, whatever was loaded before. A form that is
        not LoRA begins as it was attached, from run.seed. `made` are the pairs, where they are not
        made here (`calibration.first_factors`).
        """
        if self.rank:
            self.load(self._first)
            return self.read()
        ranks = {m: layer.rank for m, layer in client.layers.items()}
        with host_draws(self.device, seeded(seed, 0, 0, "init").initial_seed()):
            old = self._profiles.pop(tuple(sorted(ranks.items())), None)
            self.select(ranks)
            if old is not None:
                self.peft.delete_adapter(old)
            self.cores = {}
            self._scale = {m: layer.scale for m, layer in client.layers.items()}
            first, init = self.read(), self.config.lora.init
            if made is None and init == "default":
                return first
            if made is None and init in CALIBRATED:
                raise ModelError(f"lora.init = {init!r}: begins from lora.calibration, not here")
            made = made or first_pairs(self.config, client.layers, self.weights())
            return as_factors(made, first.other)

    # -- loading and reading ----------------------------------------------------------------

    def select(self, ranks: Mapping[str, int]) -> None:
        """Make the adapter of these ranks the active one, attaching it if it is not there."""
        if self.rank:
            return
        key = tuple(sorted(ranks.items()))
        if key not in self._profiles:
            self._attach(self.peft, ranks)
        name = self._profiles.pop(key)
        self._profiles[key] = name  # most recently used last
        self.peft.set_adapter(name)
        self.active = name
        while len(self._profiles) > KEPT_PROFILES:
            self._drop(next(iter(self._profiles)))

    def load(self, factors: Factors, block: int = 0, scaled: bool = False) -> None:
        """Take these factors as the model's adapter and head, at their own ranks and scales.

        Without factors (a model that is all in its base) the adapter is one that adds nothing.
        `block`, `scaled`: what of a core trains, see Core.
        """
        if self.stacks and factors.A:
            factors = as_factors(stacks.alike(factors.adapter(), self.shapes), factors.other)
        self.select({m: A.shape[0] for m, A in factors.A.items()} or dict.fromkeys(self.shapes, 1))
        self._scale = factors.scale
        self.cores = {}
        with torch.no_grad():
            for m, A in factors.A.items():
                layer, (a, b) = self.adapted[m], self.sides(m)
                put(m, a, A if a.ndim > 1 else A[0])
                put(m, b, factors.B[m] if b.ndim > 1 else factors.B[m][:, 0])
                if self.rank:
                    continue
                layer.scaling[self.active] = factors.scale[m]
                if isinstance(layer.lora_variant.get(self.active), Core):
                    del layer.lora_variant[self.active]
                if m in factors.R:
                    R = factors.R[m].detach().to(a.device, copy=True)
                    self.cores[m] = Core(R, block, scaled)
                    layer.lora_variant[self.active] = self.cores[m]
            if not factors.A:
                for m in self.held():
                    self.sides(m)[1].zero_()
            mine = self._other()
            for name, tensor in factors.other.items():
                if name not in mine:
                    raise ModelError(f"{name}: this model trains no such tensor; it has {[*mine]}")
                put(name, mine[name], tensor)

    def read(self) -> Factors:
        """A copy of the active adapter, core and head, on the host."""
        sides = {m: self.sides(m) for m in self.held()}
        scaling = {m: 1.0 if self.rank else self.adapted[m].scaling[self.active] for m in sides}
        return Factors(
            {m: self._scale.get(m, s) for m, s in scaling.items()},
            {m: on_host(A).reshape(-1, A.shape[-1]).clone() for m, (A, _) in sides.items()},
            {m: on_host(B).reshape(len(B), -1).clone() for m, (_, B) in sides.items()},
            {m: on_host(core.whole()).clone() for m, core in self.cores.items()},
            {name: on_host(p).clone() for name, p in self._other().items()},
        )

    def live(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters of the active adapter, core and head, by column and name.

        Those of the experts of a stack are one, by the stack's name.
        """
        whole = {self.shapes[m].stack or m: self._whole_sides(m) for m in self.held()}
        return {
            "A": {n: sides[0] for n, sides in whole.items()},
            "B": {n: sides[1] for n, sides in whole.items()},
            "R": {n: p for m, core in self.cores.items() for n, p in core.named(m).items()},
            "other": self._other(),
        }

    def trainable(self, columns: frozenset[str]) -> dict[str, dict[str, nn.Parameter]]:
        """The live parameters of these columns, which alone get gradients, by column and name."""
        live = self.live()
        for p in self.peft.parameters():
            p.requires_grad_(False)
        for column, params in live.items():
            for p in params.values():
                p.requires_grad_(column in columns)
        return {c: params for c, params in live.items() if c in columns and params}

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the model makes of a batch (b, t), in float32: (b, classes) or (b, t, tokens)."""
        return logits_of(self.run(**inputs)).float()

    def run(self, **inputs: Any) -> Any:
        """One forward pass, on the model's device: what its `forward` gives, or a ModelError."""
        after = {"alora_offsets": offsets(self, inputs["input_ids"])} if self.form.after else {}
        inputs = self._unread | inputs | after
        with named(f"model.path = {self.config.model.path!r}: its forward pass"):
            if self.prefix:
                return self.prefix.run(self.peft, inputs)
            return self.peft(**moved(inputs, self.device))

    # -- the base ---------------------------------------------------------------------------

    def rebase(
        self, token: str, versions: Sequence[Version], start: Mapping[str, Delta] | None = None
    ) -> None:
        """Set every base weight to W0 plus `start` plus these changes, in order.

        `token` names the run, and with it `start`. Continues from the changes it has already where
        it can; the bits are the same as from the beginning.
        """
        self.base.rebase(token, versions, start)

    def folded(self, fold: Adapter) -> contextlib.AbstractContextManager[None]:
        """Within it, these pairs are part of the base; after it, the base has its old bits."""
        return self.base.folded(fold)

    @contextlib.contextmanager
    def base_gradients(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Within it, adapters are off and base weights gather gradients, given back as (d, k)."""
        with self.peft.disable_adapter(), self.base.gradients() as gathered:
            yield gathered

    def probe(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each adapted module of x now makes of its columns x[m] (k, n): (d, n)."""
        self.peft.eval()
        own = self.config.model.dtype == "float32" and self.config.model.quantization == "none"
        with torch.no_grad():
            if own:  # in the model's own precision
                rows = {m: x[m].T.float().to(self.base.device_of(m)) for m in x}
                return {m: wide_on_host(self._at(self.adapted[m], rows[m]).T) for m in x}
            return {
                m: self._at(in_float64(self.adapted[m], self.shapes[m]), x[m].T.double()).T
                for m in x
            }

    def _at(self, layer: Any, x: Tensor) -> Tensor:
        """A module's output for rows of x, each a token that its adapter acts on."""
        y: Tensor = layer(x, alora_offsets=[1] * len(x)) if self.form.after else layer(x)
        return y

    @torch.no_grad()
    def change(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """f(x): what the adapter adds to each module's output for columns x[m] (k, n), (d, n).

        Through the modules themselves, in float64: rounding in them hides no wrong mean.
        """
        found = {}
        for m, columns in x.items():
            layer = in_float64(self.adapted[m], self.shapes[m])
            whole = layer(columns.T)
            layer.enable_adapters(False)
            found[m] = (whole - layer(columns.T)).T
        return found

    def held(self) -> list[str]:
        """The modules whose A and B side the active adapter has."""
        if self.form.kind == "sides":
            return [*self.adapted]
        if self.rank:
            return []
        return [m for m, x in self.adapted.items() if self.active in x.lora_A]

    def sides(self, m: str) -> tuple[Tensor, Tensor]:
        """A (r, k) and B (d, r) of a module, or a form's two sides; VeRA's are (r) and (d)."""
        x = self.adapted[m]
        return x.sides(self.active) if isinstance(x, Expert) else self._whole_sides(m)

    def _whole_sides(self, m: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The same as what trains: of an expert those of all experts of its stack."""
        x = self.adapted[m]
        if isinstance(x, Expert):
            return x.packed(self.active)
        if isinstance(x, OwnFormLayer):
            return x.both_sides()
        if self.form.kind == "sides":
            return x.vera_lambda_d[self.active], x.vera_lambda_b[self.active]
        return x.lora_A[self.active].weight, x.lora_B[self.active].weight

    def _other(self) -> dict[str, nn.Parameter]:
        """Trained tensors that are no LoRA factor: heads, magnitudes, by their plain names."""
        found = dict(self._tensors)
        for name, module in self._whole.items():
            if self.active in module.modules_to_save:
                for tail, p in module.modules_to_save[self.active].named_parameters():
                    found[f"{name}.{tail}"] = p
        for m, layer in self.adapted.items():
            if self.active in (magnitudes := getattr(layer, "lora_magnitude_vector", {})):
                found[f"{m}.lora_magnitude_vector"] = magnitudes[self.active].weight
        return found

    def _attach(self, base: nn.Module, ranks: Mapping[str, int]) -> PeftModel:
        name = f"p{self._born}"
        self._born += 1
        peft_config = adapter_config(self.config, self.shapes, ranks, self.heads)
        seed = seeded(self.config.run.seed, 0, 0, "form").initial_seed()
        more = isinstance(base, PeftModel)
        with (
            torch.random.fork_rng(devices=[]) if more else host_draws(self.device, seed),
            warnings.catch_warnings(),
        ):
            # PEFT looks for these keys among modules alone, and uses them for experts too
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys", RuntimeWarning)
            if isinstance(base, PeftModel):
                (model := base).add_adapter(name, peft_config)
            else:
                with named(f"lora.form = {self.config.lora.form!r}: PEFT"):
                    model = get_peft_model(base, peft_config, adapter_name=name)
                check_targets(self.shapes, model.get_base_model())
        in_float32(model, name, self._inner)
        self._profiles[tuple(sorted(ranks.items()))] = name
        self.active = name
        return model

    def asleep(self) -> frozenset[str]:
        """The attached adapters that are not active."""
        return frozenset(self._profiles.values()) - {self.active}

    def _drop(self, key: tuple[tuple[str, int], ...]) -> None:
        name = self._profiles.pop(key)
        if name == self.active:  # PEFT warns where the active adapter goes
            self.active = next(iter(self._profiles.values()))
            self.peft.set_adapter(self.active)
        self.peft.delete_adapter(name)
