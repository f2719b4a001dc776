"""Adapter forms: what trains in each, and which strategies can average it.

Every form adds f(theta) to a module's output, theta its trained tensors. All else that f is made
of (the base, random projections, masks, locations) is frozen and equal on every client, so

    linear        f(sum p_i theta_i) = sum p_i f(theta_i): the mean of what trained is exact
    multilinear   linear in each tensor of theta while the others are held: the mean is exact where
                  one of them trains, else off by a covariance, which is measured and logged
    not linear    the mean is off by more than that; it is measured and logged

What a strategy computes decides what it can run (`Needs.algebra`):

    factors       LoRA's A (r, k) and B (d, r): the change is s B A, so any strategy
    sides         two tensors, in either of which the change is linear, with all else between and
                  around them frozen. VeRA's are d (r) and b (out): its change is (B0 * b d^T) A0.
                  Strategies that average each side by itself run it: d is their A, b their B
    tensors       anything else. A linear form is exact under every strategy that averages what is
                  no factor (`Needs.others`); others only go with one that averages whatever trains

`problem` says why a strategy cannot run a form; what else of a form cannot be, and says so before
anything runs, is fedlora/preflight/forms.py. docs/extend/forms.md is `table()`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.lora.forms import OWN
from fedlora.lora.forms.base import OwnForm
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Promise, Strategy
from fedlora.strategies.without_factors import WithoutFactors


@dataclass(frozen=True, slots=True)
class Form:
    """An adapter form, PEFT's or one of fedlora/lora/forms, and how it goes with averaging."""

    change: str
    """f, as its paper writes it."""
    kind: Literal["factors", "sides", "tensors"]
    law: Literal["linear", "multilinear", "not linear"]
    config: str = ""
    """PEFT's class; none where the form is this library's own."""
    size: str = ""
    """Which setting clients.ranks gives; none: the form has one size only."""
    after: bool = False
    """It acts on a row's tokens from an invocation on, and not on those before."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from PEFT's, so that training starts from W0."""
    own: type[OwnForm] | None = None
    """The form itself, where it is none of PEFT's."""
    beside: bool = False
    """More trains than its two sides."""
    computed: bool = False
    """What PEFT freezes is computed from W0, and not drawn."""

    @property
    def makes(self) -> bool:
        """Does each machine compute what is frozen, so that all of it has to be compared?"""
        return self.computed or self.own is not None


def _own(
    name: str,
    change: str,
    kind: Literal["sides", "tensors"],
    law: Literal["linear", "multilinear"],
    beside: bool = False,
) -> dict[str, Form]:
    return {name: Form(change, kind, law, size="r", own=OWN[name], beside=beside)}


FORMS: dict[str, Form] = {
    "lora": Form("s B A x", "factors", "multilinear", "LoraConfig", "r"),
    "dora": Form("(m / |W0 + s B A| - 1) W0 x + (m / |W0 + s B A|) s B A x", "factors",
                 "not linear", "LoraConfig", "r"),
    "alora": Form("s B A x from the invocation's tokens on, 0 before", "factors", "multilinear",
                  "LoraConfig", "r", after=True),
    "vera": Form("diag(b) B0 diag(d) A0 x", "sides", "multilinear", "VeraConfig", "r"),
    "randlora": Form("sum_j B_j diag(l_j) A0 diag(g_j) x", "tensors", "multilinear",
                     "RandLoraConfig", "r"),
    "gralora": Form("s B_ij A_ij on each of n x n blocks", "tensors", "multilinear",
                    "GraloraConfig", "r"),
    "loha": Form("s (B1 A1 * B2 A2) x", "tensors", "multilinear", "LoHaConfig", "r"),
    "lokr": Form("s (C kron B A) x", "tensors", "multilinear", "LoKrConfig", "r"),
    "hira": Form("(W0 * B A) x", "tensors", "multilinear", "HiraConfig", "r"),
    "fourierft": Form("a Re IDFT(c at fixed places) x", "tensors", "linear", "FourierFTConfig",
                      "n_frequency", given={"init_weights": True}),
    "waveft": Form("a IDWT(c at fixed places) x", "tensors", "linear", "WaveFTConfig",
                   "n_frequency"),
    "c3a": Form("block-circulant(c) x", "tensors", "linear", "C3AConfig", "block_size",
                given={"init_weights": True}),
    "shira": Form("S x, S on a fixed random mask", "tensors", "linear", "ShiraConfig", "r"),
    "miss": Form("D repeated along x, summed in groups", "tensors", "linear", "MissConfig", "r"),
    "bat": Form("(W0 D + D) in blocks x (Bone)", "tensors", "linear", "MissConfig", "r",
                given={"init_weights": "bat"}),
    "ia3": Form("(l - 1) * W0 x", "tensors", "linear", "IA3Config", "",
                given={"feedforward_modules": []}),
    "beft": Form("b added to the output", "tensors", "linear", "BeftConfig"),
    "supertuning": Form("S x, S where W0 is largest", "tensors", "linear", "SupertuningConfig"),
    "oft": Form("(W0 R - W0) x, R = Cayley(Q) in blocks", "tensors", "not linear", "OFTConfig",
                "oft_block_size"),
    "hra": Form("(W0 H - W0) x, H a product of reflections", "tensors", "not linear", "HRAConfig",
                "r"),
    "road": Form("(R - I) W0 x, R rotates and scales pairs", "tensors", "not linear",
                 "RoadConfig", "group_size"),
    "delora": Form("(l / r) B diag(|W0| / |b_j| |a_j|) A x", "tensors", "not linear",
                   "DeloraConfig", "r"),
    "vblora": Form("B A x, both mixed from a bank by softmax", "tensors", "not linear",
                   "VBLoRAConfig", "r"),
    "tinylora": Form("B (sum_i v_i P_i) A x, of W0's leading SVD", "tensors", "linear",
                     "TinyLoraConfig", "u", computed=True),
    "psoft": Form("s B (diag(b) R diag(a) - I) A x, R = Cayley(Q), of W0's leading SVD", "tensors",
                  "not linear", "PsoftConfig", "r", computed=True),
    **_own("lora-xs", "s B R A x, R between the leading SVD of W0", "tensors", "linear"),
    **_own("pmss", "s C M R x, M between columns and rows of W0", "tensors", "linear"),
    **_own("paca", "s D x_J, J some of W0's columns", "tensors", "linear"),
    **_own("loldu", "P L D diag(z) U x, of W0 = P L D U", "tensors", "linear"),
    **_own("losia", "M x_J in rows I, where W0 or its gradient is largest", "tensors", "linear"),
    **_own("smt", "M_b x_J(b) in rows I(b), the largest blocks of W0 or its gradient", "tensors",
           "linear"),
    **_own("melora", "s diag(B_1..B_n) diag(A_1..A_n) x", "sides", "multilinear"),
    **_own("moslora", "s B M A x", "sides", "multilinear", beside=True),
    **_own("lora-mini", "s B0 B A A0 x, outer factors drawn", "sides", "multilinear"),
    **_own("nora", "s B0 B A A0 x, outer factors of W0's SVD", "sides", "multilinear"),
    **_own("lotr", "s B G_l A x, A and B of all layers", "tensors", "multilinear"),
    **_own("msplora", "s (B A + B_l A_l) x, A and B of all layers", "tensors", "multilinear"),
}  # fmt: skip

ON_QUANTISED = (
    "lora", "alora", "vera", "randlora", "gralora", "fourierft", "waveft", "c3a", "miss", "beft",
    "vblora",
)  # fmt: skip
"""Forms that add a term of their own to W0 x, so that W0 may be stored in 8 or 4 bits; the others
read W0, and what PEFT makes of a quantised one differs by form and by device."""

LEFT_OUT: dict[str, str] = {
    "adalora": "each client would prune ranks by its own importance scores; use lora.rank-pattern "
    "for ranks by module, or ranks.policy = 'adaptive', by which the server shares out the budget",
    "lora-fa": "freezing A is a strategy's: use strategy.name = 'ffa'",
    "lora+": "it is an optimiser's setting: use train.lr-ratio-b",
    "rslora": "it is lora's scale: use lora.use-rslora = true",
    **{i: f"it is an initialisation: use lora.init = {i!r}" for i in
       ("pissa", "eva", "corda", "lora_ga")},
    "boft": "PEFT's code for it compiles CUDA where it can, so machines differ; use oft",
    "bone": "PEFT has it as MiSS: use miss, or bat for its first form",
    **dict.fromkeys(
        ("adamss", "frod", "osf"),
        "its frozen parts are decompositions of W0 and of several W0 together that PEFT computes "
        "in float32, equal in neither sign nor rounding; use lora-xs, tinylora or fourierft",
    ),
    **dict.fromkeys(
        ("deft", "glora", "kasa", "lily", "peanut", "shadow", "unilora", "xlora", "poly"),
        "its parts go through a non-linear map, shared or routed, whose mean is no model; use "
        "lora, or a linear form such as fourierft",
    ),
    **dict.fromkeys(
        ("pvera", "monteclora"),
        "it draws its weights anew in every pass, so no aggregation can be checked; use vera",
    ),
    **dict.fromkeys(
        ("velora", "arrow", "bdlora"),
        "it changes how LoRA is computed and not what trains, for another setting than this; use "
        "lora",
    ),
    **dict.fromkeys(
        ("prompt-tuning", "p-tuning", "prefix-tuning", "cpt", "cartridge", "adaption-prompt",
         "multitask-prompt-tuning"),
        "it trains virtual tokens and adapts no module, so there is no change of a weight to "
        "average; use ia3 or beft for as few numbers",
    ),
    **dict.fromkeys(
        ("ln-tuning", "trainable-tokens"),
        "it trains tensors of the base whole; name their modules in lora.modules-to-save",
    ),
}  # fmt: skip
"""What PEFT has and this does not run, each with the reason and what to use."""

INITS: dict[str, str] = {
    "default": "A uniform in +-1/sqrt(k), B = 0",
    "gaussian": "A normal of deviation 1/r, B = 0",
    "orthogonal": "A and B random with B A = 0",
    "pissa": "B A the leading part of W0's SVD; the base keeps the rest",
    "olora": "s B A from the QR of W0; the base keeps the rest",
    "loftq": "s B A the leading part of what rounding W0 to 4 bits loses; the base is rounded",
    "eva": "A the leading principal directions of the module's inputs on lora.calibration, B = 0",
    "corda": "s B A the part of W0 that matters most on those inputs; the base keeps the rest",
    "lora_ga": "A and B from the SVD of the loss's gradient there; s B A is taken out of the base",
}
"""Of lora.init; "pissa_niter_N" is pissa by a randomised SVD of N passes."""

CALIBRATED = ("eva", "corda", "lora_ga")
"""Inits that look at rows: those of lora.calibration (fedlora/training/calibration.py)."""

INITS_LEFT_OUT: dict[str, str] = {
    "mica": "it freezes B for good, and strategies say themselves what is frozen; use lora-fa's "
    "counterpart, strategy.name = 'ffa'",
}

MOVES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Inits that take s B A out of the base, so that training starts from W0; or what is rounded."""


def problem(form: Form, strategy: Strategy[Any]) -> str | None:
    """Why the strategy cannot run the form, and what to use; None if it can."""
    algebra = strategy.needs().algebra
    name = type(strategy).__name__
    if form.kind == "tensors" and algebra != "tensors":
        if form.law != "linear":
            return f"{name} is about LoRA's A and B, and this form has none; use fedavg"
        if strategy.needs().others == "kept":
            return f"{name} shares LoRA's A alone, and this form has none; use fedavg or fedex"
        return None
    if form.kind == "sides" and algebra == "products":
        return (
            f"{name} recombines the ranks of B A, and this form has two tensors between frozen "
            "parts; use fedavg, ffa, rolora or fedsa"
        )
    if form.beside and strategy.promise == "exact":
        return (
            f"{name} is exact because one side stands still, and of this form more trains than its "
            "two sides; use fedavg, which logs the deviation, or fedsa"
        )
    if form.after and strategy.needs().moving_base:
        return (
            f"{name} moves the base, which acts on every token, and this form only from its "
            "invocation on; use fedavg, ffa, rolora or fedsvd"
        )
    if form.after and strategy.needs().beside_factors:
        return (
            f"{name} has more than A and B, a core between them or ranks folded into the base, "
            "and PEFT's code for this form those two alone; use fedavg, ffa, rolora or fedsvd"
        )
    if form.kind == "factors" and form.law == "not linear":
        if strategy.needs().moving_base:
            return f"{name} moves the base, whose norm this form divides by; use fedavg or fedsa"
        if strategy.promise == "exact":
            return (
                f"{name} promises an exact aggregation, and the mean of this form's changes is no "
                "change of this form; use fedavg, which logs the deviation, or fedsa"
            )
    return None


def guarantee(form: Form, strategy: Strategy[Any]) -> Promise:
    """What the strategy guarantees of this form: every mean of linear ones is exact."""
    if form.kind != "tensors":
        return strategy.promise
    return "exact" if form.law == "linear" else "approximate"


def for_form(form: Form, strategy: Strategy[Any]) -> Strategy[Any]:
    """The strategy as it runs the form: without its factors, where the form has none."""
    if form.kind != "tensors" or strategy.needs().algebra == "tensors" or problem(form, strategy):
        return strategy
    return WithoutFactors(strategy)


ONE_RANK = (
    "what a client of a lower rank or fewer layers does not train would be folded into its base, "
    "which acts on every token; give all clients one rank, by ranks.policy = 'list'"
)
"""Why a form that acts from an invocation on goes with no mixed ranks."""


def is_init(init: str) -> bool:
    """Is there such a lora.init?"""
    return init in INITS or _niter(init)


def _niter(init: str) -> bool:
    return init.startswith("pissa_niter_") and init.removeprefix("pissa_niter_").isdigit()


def moves_base(init: str, quantization: str = "none") -> bool:
    """Does this init take something out of the base? LoftQ not where it is rounded already."""
    return (init in MOVES_BASE or _niter(init)) and (init != "loftq" or quantization == "none")


def fixed_rank(form: str, ranks: Sequence[int]) -> int:
    """The one size of a form that has no rank by client, the first of `ranks`; 0 for factors."""
    return 0 if FORMS[form].kind == "factors" else ranks[0]


def verdicts(form: Form) -> dict[Promise | Literal["refused"], list[str]]:
    """The strategies' names by what each guarantees of this form, at their defaults."""
    found: dict[Any, list[str]] = {"exact": [], "shared": [], "approximate": [], "refused": []}
    for name, cls in STRATEGIES.items():
        strategy = cls()
        found["refused" if problem(form, strategy) else guarantee(form, strategy)].append(name)
    return found


def shortly(names: Sequence[str]) -> str:
    """These strategies; where they are most of them, all but the others."""
    left = [s for s in STRATEGIES if s not in names]
    if len(left) < len(STRATEGIES) // 3:
        return f"all but {', '.join(left)}" if left else "all"
    return ", ".join(names) or "-"


def rows() -> list[tuple[str, ...]]:
    """Name, change, law, what clients.ranks is, and strategies: exact, shared, approximate."""
    found: list[tuple[str, ...]] = []
    for name, form in FORMS.items():
        v = verdicts(form)
        kinds = (shortly(v[promise]) for promise in ("exact", "shared", "approximate"))
        found.append((name, form.change, form.law, form.size or "-", *kinds))
    return found


HEADINGS = (
    "form", "f(x)", "in what trains", "clients.ranks is", "exact", "exact, of what is shared",
    "logged",
)  # fmt: skip


def table() -> str:
    """The forms as a Markdown table: what docs/extend/forms.md holds."""
    named = ((f"`{name}`", *rest) for name, *rest in rows())
    lines = [HEADINGS, ("---",) * len(HEADINGS), *named]
    cells = [[c.replace("|", "\\|") for c in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
