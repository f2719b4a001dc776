"""A copy of an adapted module that rounds nothing, to measure on what the module itself makes."""

import copy
from typing import Any

from torch import nn

from fedlora.training.devices import HOST, wide_on_host
from fedlora.training.model.expert import Expert
from fedlora.training.model.quantized import is_stored
from fedlora.training.model.shape import Shape


def in_float64(layer: Any, shape: Shape) -> Any:
    """A copy of a module that computes in float64 with what its tensors hold.

    On the host, as not every device has float64. A quantised weight, which nothing changes, is 0 in
    it.
    """
    if isinstance(layer, Expert):
        return layer  # computes in its inputs' dtype
    base, memo = layer.get_base_layer(), dict[int, Any]()
    if not is_stored(base.weight):
        wide = nn.Parameter(wide_on_host(base.weight), requires_grad=False)
        memo[id(base.weight)] = wide  # over at once: not copied on a card first
    else:
        memo[id(base)] = empty = nn.Linear(shape.k, shape.d, bias=False)
        nn.init.zeros_(empty.weight)
        empty._forward_hooks = base._forward_hooks
    return copy.deepcopy(layer, memo).to(HOST).double().eval()
