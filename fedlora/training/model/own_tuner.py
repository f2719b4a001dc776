"""The adapter forms of fedlora/lora/forms as a tuner of PEFT, so that a model wraps them alike.

    y = W0 x + s B A x        A (R, k) and B (d, R) made anew in each pass from what trains

One adapter a model. A machine makes what is frozen itself, in float64 on the host, from W0 and
the seed; every byte of it is in `Model.fingerprint`. PEFT's registry takes names of its own alone,
so the tuner is put into its tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fedlora.errors import ModelError
from fedlora.lora.adapter import Pair
from fedlora.lora.forms import OWN
from fedlora.lora.forms.base import ByGradient, OwnForm, numbers
from fedlora.strategies.base import Layer, seeded
from fedlora.training.devices import wide_on_host
from fedlora.training.model.quantized import is_stored

NAME = "FEDLORA"

Shared = dict[tuple[str, tuple[int, ...]], nn.Parameter]
"""What several layers share, by name and size."""


@dataclass
class OwnFormConfig(PeftConfig):  # type: ignore[misc]
    """What a model is wrapped with."""

    form: str = ""
    r: int = 8
    alpha: float = 8.0
    seed: int = 0
    form_dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    """By module path, of a form that chooses by gradient: whole numbers, as they came."""
    target_modules: list[str] = field(default_factory=list)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME


class OwnFormLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear module with a form of this library's own beside it."""

    adapter_layer_names = ("form_theta",)
    other_param_names = ("form_frozen", "form_dropout")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter: str,
        config: OwnFormConfig,
        path: str,
        shared: Shared | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.own: OwnForm = OWN[config.form](**config.options)
        self.form_theta = nn.ModuleDict()
        self.form_frozen = BufferDict(persistent=False)
        self.form_dropout = nn.ModuleDict({adapter: nn.Dropout(config.form_dropout)})
        self.form_scale = config.alpha / config.r if self.own.scaled else 1.0
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter
        self.adapter = adapter
        base: Any = base_layer
        if is_stored(base.weight):
            raise ValueError("its frozen parts are of W0, which may not be quantised")
        W = wide_on_host(base.weight.detach())
        W = W.T if self.fan_in_fan_out else W  # (d, k)
        self._made_for(W, config, path, base.weight.device, {} if shared is None else shared)
        BaseTunerLayer.set_adapter(self, [adapter])

    def _made_for(
        self, W: Tensor, config: OwnFormConfig, path: str, device: Any, shared: Shared
    ) -> None:
        drawn = [seeded(config.seed, 0, 0, f"form/{what}/{path}") for what in ("frozen", "first")]
        for name, x in self.own.frozen(W, config.r, drawn[0]).items():
            self.form_frozen[name] = (x.float() if x.is_floating_point() else x).to(device)
        (d, k), self.form_rank = W.shape, config.r
        if config.places:
            self.place(config.places.get(path, []))
        theta = self.own.first(d, k, config.r, drawn[1])
        params = {}
        for name, x in theta.items():
            made = nn.Parameter(x.float().contiguous().to(device))
            at = (name, tuple(x.shape))
            params[name] = shared.setdefault(at, made) if name.startswith("shared_") else made
        self.form_theta[self.adapter] = nn.ParameterDict(params)

    def place(self, places: Sequence[str]) -> None:
        """Train at these places, in the order and form of `ByGradient.places`.

        Raises:
            ValueError: this layer has none such.
        """
        base: Any = self.base_layer
        d, k = base.weight.shape[::-1] if self.fan_in_fan_out else base.weight.shape
        if isinstance(self.own, ByGradient):
            for name, x in self.own.at(numbers(places), (d, k), self.form_rank).items():
                self.form_frozen[name] = x.to(base.weight.device)

    def theta(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in the form."""
        held: Any = self.form_theta[self.adapter]
        return dict(held.items())

    def pair(self) -> Pair:
        """The change as LoRA's pair, A (R, k) and B (d, R), with the form's scale."""
        base: Any = self.base_layer
        theta = {n: p.to(base.weight.device) for n, p in self.theta().items()}
        A, B = self.own.pair(theta, dict(self.form_frozen.items()))
        return Pair(A, B, self.form_scale)

    def both_sides(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The tensors that stand for A (r, k) and B (d, r), of a form that has them."""
        assert self.own.sides
        theta = self.theta()
        return theta[self.own.sides.A], theta[self.own.sides.B]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        result: Tensor = base(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        p = self.pair()
        inner = linear(self.form_dropout[self.adapter](x).to(p.A.dtype), p.A)
        return result + (p.scale * linear(inner, p.B)).to(result.dtype)


class OwnFormModel(BaseTuner):  # type: ignore[misc]
    """Wraps each target module of a model in an `OwnFormLayer`."""

    prefix = "form_"
    tuner_layer_cls = OwnFormLayer
    target_module_mapping: Mapping[str, Any] = {}

    def _create_and_replace(
        self,
        peft_config: OwnFormConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        shared: Shared = self.__dict__.setdefault("shared", {})
        try:
            new = OwnFormLayer(target, adapter_name, peft_config, current_key, shared)
        except ValueError as e:
            form = peft_config.form
            raise ModelError(f"lora.form = {form!r}: of {current_key}, {e}") from e
        self._replace_module(parent, target_name, new, target)


def place(model: Any, config: Any, places: Mapping[str, Sequence[str]]) -> None:
    """Let a model train at these places, by module; it is then one of this config."""
    for m, mine in places.items():
        model.adapted[m].place(mine)
    model.config = config
    vars(model).pop("fingerprint", None)  # of those before


def layer_of(A: Tensor, B: Tensor) -> Layer:
    """A module as strategies see it whose two sides these are, be they vectors."""
    return Layer(len(B), A.shape[-1], A.reshape(-1, A.shape[-1]).shape[0], 1.0)


def trained_beside(model: Any) -> dict[str, nn.Parameter]:
    """What trains of a form beside its two sides and the heads, by its name in PEFT's files."""
    sides = {id(p) for m in model.held() for p in model.sides(m)}
    found = {}
    for name, p in model.peft.named_parameters():
        if p.requires_grad and "modules_to_save" not in name and id(p) not in sides:
            parts = name.removeprefix("base_model.model.").split(".")
            found[".".join(part for part in parts if part != model.active)] = p
    return found


PEFT_TYPE_TO_CONFIG_MAPPING[NAME] = OwnFormConfig
PEFT_TYPE_TO_TUNER_MAPPING[NAME] = OwnFormModel
PEFT_TYPE_TO_PREFIX_MAPPING[NAME] = OwnFormModel.prefix
