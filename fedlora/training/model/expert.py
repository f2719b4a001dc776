"""One expert of a mixture: of E linear layers, stacked in one parameter (E, d, k) or (E, k, d).

To strategies, proof, certificate and exports every expert is a layer (d, k) like any other, with a
pair B_e (d, r), A_e (r, k) of its own. This file is where that meets PEFT, which wraps the whole
parameter (`target_parameters`) and keeps the pairs of all experts in two matrices:

    name       "<module>.<parameter>.<e>":  model.layers.0.mlp.experts.gate_up_proj.3
    lora_A     (E r, k)    A_e is the rows  e r ... e r + r - 1
    lora_B     (d, r E)    column j of B_e is the column  j E + e
    forward    W0[e] + s B_e A_e, or its transpose where the stack is (E, k, d)

The experts of one parameter have one rank and one scale. `Expert` copies nothing: what it reads and
what is written into it are views of PEFT's tensors. What it computes, it computes with the factors
that PEFT's own forward adds to the stack, so a pair under the wrong expert shows in the proof.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from fedlora.training.model.shape import Shape


class Expert:
    """One expert as the linear layer that it is, with as much of a PEFT layer as others ask for."""

    def __init__(self, module: Any, parameter: str, index: int, turned: bool) -> None:
        self.parameter, self.index, self._turned = parameter, index, turned
        self._wrapper: Any = None
        self.outside = 0
        """How many wrappers, of the module's other parameters, lie around its own."""
        while isinstance(module, ParamWrapper):
            if module.parameter_name == parameter:
                self._wrapper = module
            self.outside += self._wrapper is None
            module = module.base_layer
        self._owner = module

    def get_base_layer(self) -> "Expert":
        return self

    @property
    def stack(self) -> nn.Parameter:
        """The whole parameter, (E, d, k) or (E, k, d), without adapters."""
        found: nn.Parameter = getattr(self._owner, self.parameter)
        return found

    @property
    def weight(self) -> Tensor:
        """W0[e], (d, k), or (k, d) where the stack lies that way: a view."""
        return self.stack.detach()[self.index]

    @property
    def lora_A(self) -> Mapping[str, Any]:  # noqa: N802 (PEFT's name)
        return {} if self._wrapper is None else self._wrapper.lora_A

    @property
    def lora_variant(self) -> dict[str, Any]:
        return {}

    @property
    def scaling(self) -> dict[str, float]:
        """Of all experts of the parameter, by adapter."""
        return self._wrapper.scaling  # type: ignore[no-any-return]

    def packed(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of all experts, which are what trains."""
        return self._wrapper.lora_A[adapter].weight, self._wrapper.lora_B[adapter].weight

    def sides(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A_e (r, k) and B_e (d, r): views."""
        A, B = self.packed(adapter)
        E = len(self.stack)
        return A.view(E, -1, A.shape[1])[self.index], B.view(len(B), -1, E)[..., self.index]

    def inner(self, x: Tensor) -> Tensor:
        """A_e x for rows of x, (n, r), with the factor that PEFT's forward uses."""
        lhs, rhs, _ = self._added()
        return x @ (lhs if self._turned else rhs.T).to(x.device).to(x)

    def __call__(self, x: Tensor) -> Tensor:
        """The expert's output (n, d) for rows of x, in x's dtype; without a bias."""
        W = self.weight.to(x.device).to(x)  # over first, then widened: not every card has float64
        if self._wrapper is not None and not self._wrapper.disable_adapters:
            lhs, rhs, scale = self._added()
            W = W + scale * lhs.to(x.device).to(x) @ rhs.to(x.device).to(x)
        return x @ (W if self._turned else W.T)

    def _added(self) -> tuple[Tensor, Tensor, float]:
        """What PEFT adds to this slice of the stack, as factors of its own reading and a scale."""
        wrapper = self._wrapper
        (adapter,) = wrapper.active_adapters
        own = wrapper.lora_A[adapter].weight
        with patch.object(wrapper, "get_param", lambda: own):  # it asks for the dtype to round to
            lhs, rhs, scale = wrapper.get_delta_factors(adapter)
        return lhs[self.index], rhs[self.index], scale


def layer_at(root: nn.Module, m: str, shape: Shape, prefix: str = "") -> Any:
    """The module that layer m is, below `prefix`; of an expert its view.

    Raises:
        AttributeError: there is none.
    """
    if not shape.stack:
        return root.get_submodule(prefix + m)
    path, _, parameter = shape.stack.rpartition(".")
    index = int(m.rpartition(".")[2])
    return Expert(root.get_submodule(prefix + path), parameter, index, shape.fan_in_fan_out)
