"""Two pretend accelerators for a torch without any: real numbers, and the rules of a real card.

    with cards():
        x = torch.randn(3, device="pretend:1")

A process that a test starts has them with torch itself, by the entry point with which real devices
of other makers come (the group torch.backends), where its environment is `plugged_in`'s.

A tensor "on" one of them holds a tensor on the host, and every operation computes with that. What a
card would refuse is refused: an operand that lies on the host or on the other card, `.numpy()`, a
host's generator for a draw on the card. Each card has a generator of its own, which the host's
seed does not reach but through torch.manual_seed, and a memory: what is allocated, the most that
was, and a limit above which torch.OutOfMemoryError is raised.

It is a device to torch itself (its PrivateUse1 slot, with torch.accelerator, autocast and fork_rng;
what such a slot has no hook for is at torch.pretend), so fedlora has no word about it. What it
cannot show: other kernels, their speed, and work that is under way when a call returns.
"""

import contextlib
import gc
import json
import os
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COUNT = 2
aten = torch.ops.aten

BETWEEN = {aten.copy_.default, aten._to_copy.default}
"""Operations whose operands may lie on two devices."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""Operations whose second operand, indices, may lie on the host."""

OWN_ROUNDING = ("erfinv", "erfinv_", "linalg_qr")
"""Operations whose last bit is not the host's, as in every maker's own kernels."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
SEARCHED = {aten.nonzero.default, aten.masked_select.default, aten.masked_scatter_backward.default}
"""Operations whose results have as many numbers as a card has found."""


class Lease:
    """Some bytes of a card, given back when the last tensor that has them is gone."""

    def __init__(self, card: "Card", size: int) -> None:
        self.card, self.size, self.count = card, size, card.count
        card.take(size)

    def __del__(self) -> None:
        if self.count == self.card.count:
            self.card.used -= self.size


class Card:
    """One device: its memory and its generator."""

    def __init__(self, index: int) -> None:
        self.index = self.place = index
        """Its number in this process, and in the machine."""
        self.generator = torch.Generator()
        self.used = self.peak = self.reserved = 0
        """`reserved` is what torch has of the card: what it let go of is not free to others."""
        self.count = 0
        """Which count of bytes is under way: see `count_anew`."""
        self.workspace = self.kept = 0
        self.limit: int | None = None
        self.float64 = True
        self.says_float64 = False
        """Does it say so itself, as Intel's cards do? Those raise a RuntimeError then."""
        self.total = 2**34
        self.leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, self.index)

    def seed(self, seed: int) -> None:
        """The numbers that follow are those of any card with this seed, and not the host's."""
        self.generator.manual_seed(seed ^ 0x5EED)

    def count_anew(self) -> None:
        """As if nothing lay here. What does, as the tensors that the trace of a failed test holds,
        is of no later test's count, and takes nothing from it when it goes."""
        self.count += 1
        self.leases = weakref.WeakValueDictionary()
        self.used = self.peak = self.reserved = self.workspace = self.kept = 0

    def take(self, size: int) -> None:
        self.used += size
        if self.limit is not None and self.used > self.limit:
            gc.collect()  # circles that hold tensors: a card would have them freed too
            if self.used > self.limit:
                raise torch.OutOfMemoryError(
                    f"{NAME}:{self.index} out of memory: {size} bytes asked, {self.used - size} "
                    f"of {self.limit} in use"
                )
        self.peak = max(self.peak, self.used)
        self.reserved = max(self.reserved, self.used)

    def multiply(self) -> None:
        """The first product takes what its library works in, as cuBLAS does, and keeps it."""
        if self.workspace:
            self.take(self.workspace)
            self.workspace, self.kept = 0, self.workspace

    def lease(self, held: Tensor) -> Lease | None:
        """The bytes under a tensor: those of all tensors that share them."""
        storage = held.untyped_storage()
        if not (at := storage.data_ptr()):
            return None
        found = self.leases.get(at)
        if found is None:
            found = self.leases[at] = Lease(self, storage.nbytes())
        return found


CARDS = [Card(i) for i in range(COUNT)]
READ: Counter[str] = Counter()
"""How often something waited for a card: "synchronize", "item", "to host", "upload", "nonzero".
What a library other than torch asks for itself, as transformers does of a mask, is apart: "item
(library)"."""


def waited(what: str) -> None:
    """Count it, by who asked: the innermost frame outside of torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        f"{os.sep}torch{os.sep}" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    library = frame is not None and "site-packages" in frame.f_code.co_filename
    READ[f"{what} (library)" if library else what] += 1


class PretendTensor(torch.Tensor):
    """A tensor on a card, which computes with the one that it holds."""

    held: Tensor
    card: Card
    lease: Lease | None

    @staticmethod
    def __new__(cls, held: Tensor, card: Card) -> "PretendTensor":
        found: PretendTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=card.device,
        )
        return found

    def __init__(self, held: Tensor, card: Card) -> None:
        if held.dtype == torch.float64 and not card.float64:
            kind = RuntimeError if card.says_float64 else TypeError
            raise kind(f"{card.device} has no float64")
        self.held, self.card, self.lease = held, card, card.lease(held)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.held!r}, device={self.card.device})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor on {self.card.device} is no array; copy it to the host first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        waited("item")
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = PretendTensor(self.held.detach().clone(), self.card)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        else:
            copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def card_of(device: Any) -> Card | None:
    """The card that a device names; None where it names the host."""
    device = torch.device(device)
    if device.type != NAME:
        return None
    return CARDS[Module.current if device.index is None else device.index]


def tensors(given: Any, found: list[Tensor]) -> list[Tensor]:
    """The tensors in nested arguments, added to those found."""
    if isinstance(given, Tensor):
        found.append(given)
    elif isinstance(given, tuple | list):
        for x in given:
            tensors(x, found)
    return found


def each(given: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested arguments with every tensor changed."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, tuple | list):
        return type(given)([each(x, change) for x in given])
    return given


def held_by(x: Tensor) -> Tensor:
    return x.held if isinstance(x, PretendTensor) else x


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the cards, with the numbers that they hold."""
    operands = tensors(list(kwargs.values()), tensors(args, []))
    mine = [x for x in operands if isinstance(x, PretendTensor)]
    if func not in BETWEEN:
        check_together(func, args, operands, mine)
    if func is aten._local_scalar_dense.default:
        waited("item")
        return func(mine[0].held)
    card = mine[0].card if mine else None
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        card = card_of(kwargs["device"])
        kwargs["device"] = torch.device("cpu")
    elif func is aten.copy_.default:
        card = args[0].card if isinstance(args[0], PretendTensor) else None
        if card is not None and not isinstance(args[1], PretendTensor) and args[2:] != (True,):
            waited("upload")  # not where it is non_blocking
    if card is None and mine and func in BETWEEN:
        waited("to host")
    if card is not None and func.__name__.split(".")[0] in PRODUCTS:
        card.multiply()
    if func in SEARCHED or (func in INDEXED and any(x.dtype == torch.bool for x in operands[1:])):
        waited("nonzero")  # how many there are decides the shape of what follows
    kwargs.pop("pin_memory", None)
    inner_args = each(args, held_by)
    inner_kwargs = {key: each(x, held_by) for key, x in kwargs.items()}
    if func is aten.histc.default and not inner_args[0].is_floating_point():
        counts = func(inner_args[0].float(), *inner_args[1:], **inner_kwargs)
        return PretendTensor(counts.to(inner_args[0].dtype), mine[0].card)  # the host counts floats
    if func.__name__.split(".")[0] in OWN_ROUNDING:
        out = each(func(*inner_args, **inner_kwargs), rounded)
    elif card is not None and torch.Tag.nondeterministic_seeded in func.tags:
        with draws_of(card, inner_kwargs.get("generator")):
            out = func(*inner_args, **inner_kwargs)
    else:
        out = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and out is inner_args[0]:
        out = out.clone()
    if card is None:
        return args[0] if func is aten.copy_.default else out
    known = {id(x.held): x for x in mine}
    out = each(out, lambda x: known[id(x)] if id(x) in known else PretendTensor(x, card))
    if torch.Tag.inplace_view in func.tags:
        return return_and_correct_aliasing(func, args, kwargs, out)
    if any(x.held.shape != x.shape for x in mine):
        raise NotImplementedError(f"{func} gives a tensor on a card another shape")
    return out


def rounded(x: Tensor) -> Tensor:
    """A result's last bit as the card's own kernel has it, in place."""
    return (
        x.copy_(torch.nextafter(x, torch.full_like(x, torch.inf))) if x.is_floating_point() else x
    )


def check_together(func: Any, args: Any, operands: list[Tensor], mine: list[PretendTensor]) -> None:
    """Raises RuntimeError where operands lie on two devices; a number (0-d) on the host may."""
    if not mine or len(operands) == 1:
        return
    spared = {id(x) for x in tensors(args[1], [])} if func in INDEXED else set()
    for x in operands:
        if id(x) in spared and x.device.type == "cpu":
            continue
        if isinstance(x, PretendTensor):
            wrong = x.card is not mine[0].card
        else:
            wrong = x.dim() > 0 or func.__name__.startswith(("cat", "stack"))
        if wrong:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{mine[0].card.device} and {x.device}! ({func})"
            )


@contextlib.contextmanager
def draws_of(card: Card, given: torch.Generator | None) -> Iterator[None]:
    """Within it, what an operation draws comes from that card's own generator."""
    if given is not None:
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found '{given.device.type}'"
        )
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(card.generator.get_state())
    try:
        yield
    finally:
        card.generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


class Module:
    """What torch looks for at torch.pretend."""

    current = 0
    log: str | None = None

    _initialized = True
    """As torch.cuda and torch.xpu say it, and torch.mps does not."""

    present = False
    """Whether the machine has them: within `cards`."""

    @staticmethod
    def is_initialized() -> bool:
        return any(card.used for card in CARDS)

    @staticmethod
    def is_available() -> bool:
        return Module.present

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return len(CARDS) if Module.present else 0

    @staticmethod
    def current_device() -> int:
        return Module.current

    @staticmethod
    def set_device(device: Any) -> None:
        Module.current = _index(device)
        torch.autograd.set_multithreading_enabled(False)  # as `cards` does, for this thread
        say()

    @staticmethod
    @contextlib.contextmanager
    def device(device: Any) -> Iterator[None]:
        before, Module.current = Module.current, _index(device)
        try:
            yield
        finally:
            Module.current = before

    @staticmethod
    def synchronize(device: Any = None) -> None:
        waited("synchronize")

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return True

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return f"Pretend accelerator {_index(device)}"

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        card = CARDS[_index(device)]
        return SimpleNamespace(has_fp64=card.float64) if card.says_float64 else SimpleNamespace()

    @staticmethod
    def empty_cache() -> None:
        gc.collect()
        for card in CARDS:
            card.reserved = card.used

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return CARDS[_index(device)].used

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        return CARDS[_index(device)].peak

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        card = CARDS[_index(device)]
        card.peak = card.used

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        card = CARDS[_index(device)]
        total = card.limit or card.total
        return total - card.reserved, total

    @staticmethod
    def get_rng_state(device: Any = NAME) -> Tensor:
        return CARDS[_index(device)].generator.get_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = NAME) -> None:
        CARDS[_index(device)].generator.set_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        CARDS[Module.current].seed(seed)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        for card in CARDS:
            card.seed(seed)

    class Event:
        """A mark in a card's work."""

        def __init__(self, enable_timing: bool = False) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, later: "Module.Event") -> float:
            """Milliseconds."""
            return (later.at - self.at) * 1e3


def _index(device: Any) -> int:
    if device is None:
        return Module.current
    if isinstance(device, int):
        return device
    found = torch.device(device).index
    return Module.current if found is None else found


LOW = (
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear", "conv1d", "conv2d", "conv3d",
    "scaled_dot_product_attention",
)  # fmt: skip
"""What autocast computes in the low precision."""
WIDE = (
    "nll_loss", "nll_loss2d", "cross_entropy_loss", "mse_loss", "l1_loss", "smooth_l1_loss",
    "kl_div", "prod",
)  # fmt: skip
"""What it computes in float32."""
MIXED = ("cat", "stack", "index_copy")
"""What it computes in the widest precision among its operands."""
MADE = ("arange", "eye", "full", "linspace", "ones", "randperm", "tril_indices", "triu_indices")
"""What makes a tensor of nothing; torch itself would begin with an empty one and resize it."""
_kept: list[torch.library.Library] = []


@contextlib.contextmanager
def cards() -> Iterator[list[Card]]:
    """Within it, this machine has the two cards; what else it changes of torch is put back."""
    _install()
    before = torch._C._is_multithreading_enabled()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    exact = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    torch.autograd.set_multithreading_enabled(False)  # torch would have a thread for one card only
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to: the same Parameters
    forget = torch.clear_autocast_cache
    torch.clear_autocast_cache = lambda: (CASTS.clear(), forget())[1]
    Module.present = True
    for card in CARDS:
        card.count_anew()
        card.limit, card.float64, card.says_float64 = None, True, False
        card.generator.manual_seed(card.index)
    try:
        yield CARDS
    finally:
        Module.present, Module.current = False, 0
        torch.clear_autocast_cache = forget
        torch.autograd.set_multithreading_enabled(before)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch.use_deterministic_algorithms(exact[0])
        torch.set_float32_matmul_precision(exact[1])
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if workspace is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


LOG = "PRETEND_LOG"
"""The directory in which a process that plugged the cards in says what it had there."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""What Ray sets for the cards that it gives a process; the pretend ones go by it as well."""


def plugged_in(log: Path) -> dict[str, str]:
    """The environment in which a fresh process has the cards as soon as it imports torch."""
    here = Path(__file__).parent
    path = [str(here.parents[1]), str(here / "autoload"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), LOG: str(log)}


def plug_in() -> None:
    """What torch calls as it is imported: the cards are there until the process ends."""
    if VISIBLE in os.environ:
        CARDS[:] = [CARDS[int(n)] for n in os.environ[VISIBLE].split(",") if n]
        for n, card in enumerate(CARDS):
            card.index = n
    torch.set_num_threads(1)
    _forever.enter_context(cards())
    Module.log = os.environ.get(LOG)
    end = os._exit
    os._exit = lambda status: (say(), end(status))  # type: ignore[assignment]


def say() -> None:
    """Write down what this process has and had on each card, where it plugged them in."""
    if Module.log:
        said = {card.place: {"used": card.used, "peak": card.peak} for card in CARDS}
        Path(Module.log, f"{os.getpid()}.json").write_text(json.dumps(said))


_forever = contextlib.ExitStack()


def _install() -> None:
    """Make the two cards known to this process's torch. Once is enough; it cannot be undone."""
    if _kept:
        return
    # Torch counts devices at a process's first backward pass; with some, it forbids forks for good.
    torch.ones(1, requires_grad=True).sum().backward()
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda op, *args, **kwargs: compute(op, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    ops = torch.library.Library("aten", "IMPL")
    ops.impl("_copy_from", _copied, "PrivateUse1")  # where torch.tensor(data, device=...) ends
    for name in MADE:
        for overload in (packet := getattr(aten, name)).overloads():
            op = getattr(packet, overload)
            if "out" not in overload and "names" not in overload:
                ops.impl(op.name(), _made(op), "PrivateUse1")
    for names, dtype_of in ((LOW, _low), (WIDE, _wide), (MIXED, _widest)):
        for name in names:
            packet = getattr(aten, name)
            for overload in packet.overloads():
                op = getattr(packet, overload)
                if "out" not in overload and "names" not in overload:
                    ops.impl(op.name(), _cast_before(op, dtype_of), "AutocastPrivateUse1")
    _kept.extend([every, ops])


def _made(op: Any) -> Any:
    return lambda *args, **kwargs: compute(op, args, kwargs)


def _copied(x: Any, onto: Any, non_blocking: bool = False) -> Any:
    if isinstance(onto, PretendTensor) and not isinstance(x, PretendTensor) and not non_blocking:
        waited("upload")
    (onto.held if isinstance(onto, PretendTensor) else onto).copy_(
        x.held if isinstance(x, PretendTensor) else x
    )
    return onto


def _low(_: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _wide(_: list[Tensor]) -> torch.dtype:
    return torch.float32


def _widest(operands: list[Tensor]) -> torch.dtype:
    found = torch.get_autocast_dtype(NAME)
    for x in operands:
        found = torch.promote_types(found, x.dtype)
    return found


def _cast_before(op: Any, dtype_of: Callable[[list[Tensor]], torch.dtype]) -> Any:
    """The operation under autocast: floating operands in another precision."""

    def run(*args: Any, **kwargs: Any) -> Any:
        floats = [
            x
            for x in tensors(list(kwargs.values()), tensors(args, []))
            if x.is_floating_point() and x.dtype != torch.float64 and x.device.type == NAME
        ]
        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
            dtype, chosen = dtype_of(floats), {id(x) for x in floats}
            CAST[dtype] += 1

            def cast(x: Tensor) -> Tensor:
                if id(x) not in chosen or x.dtype == dtype:
                    return x
                if not (torch.is_autocast_cache_enabled() and x.is_leaf and x.requires_grad):
                    return x.to(dtype)
                return CASTS.setdefault((id(x), dtype), (x, x.to(dtype)))[1]

            args = each(args, cast)
            kwargs = {key: each(x, cast) for key, x in kwargs.items()}
            return op(*args, **kwargs)

    return run


CASTS: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
"""Autocast's cache of weights, each with its cast, which ends with the outermost block."""
CAST: Counter[torch.dtype] = Counter()
"""How many operations autocast computed in each precision."""
