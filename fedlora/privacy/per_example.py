"""Each example's own gradient of A, B, R and linear heads, at the cost of a plain backward pass.

For one adapted module with input x (b, t, k) and output y = W0 x + s B R A x  (R = 1 for LoRA):

    u = x A^T           (b, t, r)          v = s g B      (b, t, r)       g = dL/dy  (b, t, d)
    dA_i = (v R)_i^T x_i                   (r, k)         w = u R^T
    dB_i = s g_i^T w_i                     (d, r)
    dR_i = v_i^T u_i                       (r, r)

These are the very products of the plain weight gradient, kept apart by example instead of summed:
a batched product in place of one, with the same number of operations. The two backward passes of
ghost clipping would cost half as much again, since a frozen W0 has no weight gradient to save.

Formal guarantee
    `Sink.take(n)` gives, for every live parameter, the gradient of each example's own loss, or
    raises. Nothing un-noised is ever in `p.grad`: the functions below return None for parameters.

Edge cases
    a layer called twice in a forward      its gradients are added before any norm is taken
    gradient checkpointing                 works, either way: each backward runs once
    bf16 autocast                          products in bf16, as in plain training; norms and sums
                                           of what they give are float64 (`mechanism`)
    rows that are not examples (a MoE      PrivacyError: the leading size is not the batch's; and
    router, sequence-first layouts)        `probe` compares with single examples before training
    a live parameter without a gradient    PrivacyError
    a live parameter used elsewhere too    PrivacyError: its p.grad is not None
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant, ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlora.errors import PrivacyError
from fedlora.training.devices import counts_wide, wide_on_host
from fedlora.training.model.whole import trained_whole


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """G (b, *p.shape), each example's gradient of p; with its last two axes swapped if turned."""

    G: Tensor
    turned: bool = False

    def squares(self) -> Tensor:
        """Each example's squared norm, in float64."""
        return _norms(self.G.flatten(1)).square()

    def weighted_sum(self, c: Tensor) -> Tensor:
        """sum_i c_i G_i in float64, on the host where the device has none; c (b,) likewise."""
        G = _widened(self.G.flatten(1))
        total = (c.to(G.device) @ G).view(self.G.shape[1:])
        return total.T if self.turned else total

    def without(self, bad: Tensor) -> "Dense":
        return Dense(self.G.masked_fill(bad.view(-1, *[1] * (self.G.ndim - 1)), 0), self.turned)

    def dense(self) -> Tensor:
        return self.G.transpose(1, 2) if self.turned else self.G


@dataclass(frozen=True, slots=True, eq=False)
class Outer:
    """g (b, d) and x (b, k): each example's gradient is the outer product, never formed."""

    g: Tensor
    x: Tensor

    def squares(self) -> Tensor:
        """As of `Dense`."""
        return (_norms(self.g) * _norms(self.x)).square()

    def weighted_sum(self, c: Tensor) -> Tensor:
        """As of `Dense`."""
        g = _widened(self.g)
        return (c.to(g.device)[:, None] * g).T @ _widened(self.x)

    def without(self, bad: Tensor) -> "Outer":
        return Outer(self.g.masked_fill(bad[:, None], 0), self.x.masked_fill(bad[:, None], 0))

    def dense(self) -> Tensor:
        return self.g[:, :, None] * self.x[:, None]


Gradient = Dense | Outer


@dataclass
class Sink:
    """Gathers per-example gradients of one micro-batch, by parameter."""

    live: frozenset[nn.Parameter]
    masks: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    """1 where a parameter trains, for those of which only a part does."""
    found: dict[nn.Parameter, Gradient] = field(default_factory=dict)

    def put(self, p: nn.Parameter, gradient: Gradient) -> None:
        if p in self.found:  # the module was called before in this forward
            gradient = Dense(self.found[p].dense() + gradient.dense())
        if p in self.masks:
            gradient = Dense(gradient.dense() * self.masks[p])
        self.found[p] = gradient

    def take(self, n: int) -> dict[nn.Parameter, Gradient]:
        """The gradients of the n examples since the last take.

        Raises:
            PrivacyError: a live parameter has none, or has one that noise would not cover.
        """
        found, self.found = self.found, {}
        if missing := self.live - set(found):
            raise PrivacyError(
                f"{len(missing)} trainable tensors got no per-example gradient (the first has "
                f"shape {tuple(next(iter(missing)).shape)}); nothing was released"
            )
        for p, gradient in found.items():
            rows = len(gradient.G if isinstance(gradient, Dense) else gradient.g)
            if p.grad is not None:
                raise PrivacyError(
                    f"a trainable tensor of shape {tuple(p.shape)} is used outside of the module "
                    "that keeps examples apart (a tied weight?); nothing was released"
                )
            if rows != n:
                raise PrivacyError(
                    f"a module saw {rows} rows for {n} examples: it does not keep examples apart "
                    "(mixture of experts, or sequence-first layout); nothing was released"
                )
        return found


class _Adapter(torch.autograd.Function):
    """s B R A x; R None for plain LoRA. Gradients of A, B, R go to the sink, and only there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None, s: float, sink: Sink
    ) -> Tensor:
        device = x.device.type
        low = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else x.dtype
        ctx.keys, ctx.s, ctx.sink = (A, B, R), s, sink  # checkpointing makes others of saved ones
        with torch.autocast(device, enabled=False):
            x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
            R = None if R is None else R.to(dtype)
            u = x @ A.T  # (b, t, r)
            w = u if R is None else u @ R.T
            ctx.save_for_backward(x, A, B, R, u, w)
            y = w @ B.T
        return y.mul_(s)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        x, A, B, R, u, w = ctx.saved_tensors
        kA, kB, kR = ctx.keys
        put, s = ctx.sink.put, ctx.s
        with torch.autocast(x.device.type, enabled=False):
            g = g.to(x.dtype)
            v = (g @ B).mul_(s)  # (b, t, r)
            inner = v if R is None else v @ R
            gx = inner @ A if ctx.needs_input_grad[0] else None
            if kA.requires_grad:
                put(kA, Dense(_pairs(inner, x)))
            if kB.requires_grad:
                put(kB, Dense(_pairs(w * s, g), turned=True))
            if kR is not None and kR.requires_grad:
                put(kR, Dense(_pairs(v, u)))
        return gx, None, None, None, None, None


class _Linear(torch.autograd.Function):
    """x W^T + b; gradients of W and b go to the sink, and only there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, sink: Sink) -> Tensor:
        device = x.device.type
        low = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else W.dtype
        ctx.keys, ctx.sink = (W, b), sink
        with torch.autocast(device, enabled=False):
            x, W = x.to(dtype), W.to(dtype)
            ctx.save_for_backward(x, W)
            return linear(x, W, None if b is None else b.to(dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, W = ctx.saved_tensors
        kW, kb = ctx.keys
        with torch.autocast(x.device.type, enabled=False):
            g = g.to(x.dtype)
            gx = g @ W if ctx.needs_input_grad[0] else None
            if kW.requires_grad:
                ctx.sink.put(kW, Outer(g, x.detach()) if x.ndim == 2 else Dense(_pairs(g, x)))
            if kb is not None and kb.requires_grad:
                ctx.sink.put(kb, Dense(g if g.ndim == 2 else _by_example(g).sum(1)))
        return gx, None, None, None


class PerExample(LoraVariant):  # type: ignore[misc]
    """The adapter's forward in PEFT, with its backward pass by example."""

    def __init__(self, sink: Sink, R: nn.Parameter | None) -> None:
        self.sink, self.R = sink, R

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        x = module.lora_dropout[active_adapter](x)
        s = module.scaling[active_adapter]
        adapted: Any = _Adapter.apply
        out: Tensor = result + adapted(x, A, B, self.R, s, self.sink)
        return out


@contextmanager
def kept_apart(
    peft: nn.Module,
    name: str,
    live: frozenset[nn.Parameter],
    masks: Mapping[nn.Parameter, Tensor] | None = None,
) -> Iterator[Sink]:
    """Within it, a backward pass leaves per-example gradients of `live` in the sink.

    `name` is the active PEFT adapter; what is in the model is as before afterwards.

    Raises:
        PrivacyError: a live parameter is in a module of a kind that cannot be kept apart.
    """
    refuse(peft, name, live)
    sink = Sink(live, masks or {})
    variants: dict[Any, Any] = {}
    heads: list[nn.Linear] = []
    for p in live:
        p.grad = None  # of a plain training before this
    try:
        for layer in _layers(peft, name):
            variants[layer] = layer.lora_variant.get(name)
            layer.lora_variant[name] = PerExample(sink, getattr(variants[layer], "R", None))
        for head in _heads(peft, name):
            heads.append(head)
            head.forward = _head(head, sink)  # type: ignore[method-assign]
        yield sink
    finally:
        for layer, before in variants.items():
            layer.lora_variant.pop(name)
            if before is not None:
                layer.lora_variant[name] = before
        for head in heads:
            del head.forward
        for p in live:
            p.grad = None


def refuse(peft: nn.Module, name: str, live: frozenset[nn.Parameter]) -> None:
    """Raises PrivacyError where examples cannot be kept apart; says of what and why."""
    for path, module in peft.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"{path} is a BatchNorm: it mixes the examples of a batch, so no example has a "
                "gradient of its own; use a model with LayerNorm or RMSNorm"
            )
    owners: dict[nn.Parameter, list[str]] = {}
    for path, module in peft.named_modules():
        for tail, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append(f"{path}.{tail}")
    known: set[nn.Parameter] = set()
    for layer in _layers(peft, name):
        known |= {layer.lora_A[name].weight, layer.lora_B[name].weight}
        variant = layer.lora_variant.get(name)
        known |= {variant.R} if isinstance(getattr(variant, "R", None), nn.Parameter) else set()
        if variant is not None and not hasattr(variant, "R"):
            raise PrivacyError(
                f"{type(variant).__name__} adapters have no per-example gradient here; under "
                "privacy.level = 'example' use lora.form = 'lora'"
            )
    for head in _heads(peft, name):
        known |= set(head.parameters(recurse=False))
    for p in live:
        paths = owners.get(p, ["R"])
        if len(paths) > 1:
            raise PrivacyError(
                f"{' and '.join(paths)} are one tensor: a tied weight has no per-example gradient "
                "here; take it out of lora.modules-to-save"
            )
        if p not in known:
            raise PrivacyError(
                f"{paths[0]} is trained, but only LoRA factors and linear heads have per-example "
                "gradients; take it out of lora.modules-to-save, or set privacy.level = 'client'"
            )


def _layers(peft: nn.Module, name: str) -> Iterator[Any]:
    """The adapted linear modules; PEFT has classes of its own for quantised ones."""
    for m in peft.modules():
        if not isinstance(m, LoraLayer) or isinstance(m, ParamWrapper) or name not in m.lora_A:
            continue
        if isinstance(m, LoraLinear) or isinstance(m.get_base_layer(), nn.Linear):
            yield m


def _heads(peft: nn.Module, name: str) -> Iterator[nn.Linear]:
    """Linear modules within what is trained whole."""
    for wrapper in trained_whole(peft).values():
        if name in wrapper.modules_to_save:
            for module in wrapper.modules_to_save[name].modules():
                if isinstance(module, nn.Linear):
                    yield module


def _head(head: nn.Linear, sink: Sink) -> Any:
    apply: Any = _Linear.apply

    def forward(x: Tensor) -> Tensor:
        out: Tensor = apply(x, head.weight, head.bias, sink)
        return out

    return forward


def _by_example(x: Tensor) -> Tensor:
    """(b, d) or (b, ..., d) as (b, t, d)."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    """sum over t of left_t right_t^T, by example: (b, t, m), (b, t, n) -> (b, m, n)."""
    return torch.bmm(_by_example(left).transpose(1, 2), _by_example(right))


def _norms(x: Tensor) -> Tensor:
    """Of each row, in float64: added up in float32, that of a million numbers is off by 3e-4."""
    if not counts_wide(x.device):
        x = wide_on_host(x)
    found: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    return found


def _widened(x: Tensor) -> Tensor:
    return x.double() if counts_wide(x.device) else wide_on_host(x)


def clipping(
    found: Mapping[nn.Parameter, Gradient], C: float
) -> tuple[dict[nn.Parameter, Gradient], Tensor]:
    """The gradients with non-finite examples as zero; each example's factor c (b,), on the host.

    |c_i g_i| <= C for every example, in exact arithmetic on the numbers at hand: the factor is
    a part in 10^6 below C / |g_i|, above the rounding of a norm. One that is not finite gives
    c = 0.
    """
    total = sum(wide_on_host(g.squares()) for g in found.values())
    assert isinstance(total, Tensor)
    norms = total.sqrt()
    bad = ~torch.isfinite(norms)
    if bool(bad.any()):
        found = {p: g.without(bad.to(p.device)) for p, g in found.items()}
        norms = norms.masked_fill(bad, 0.0)
    c = (C * (1 - 1e-6) / norms.clamp(min=1e-300)).clamp(max=1.0)
    return dict(found), c.masked_fill(bad, 0.0)
