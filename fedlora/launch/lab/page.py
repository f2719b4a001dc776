"""The lab's report: one page with every table and plot, and the tables as Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedlora.launch.lab.attacks import SECURE
from fedlora.launch.lab.notes import NOTES
from fedlora.launch.lab.plan import Lab
from fedlora.lora.tree_file import write_atomically
from fedlora.reports.axes import GREEN, GREY, RED, new_figure, share, with_legend
from fedlora.reports.html import COLOURS, drawn, interval, markdown, render

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
"""Heads, and rows of cells."""

MARKERS = "osD^vPX*"
PROBE = "linear probe"


# -- tables ---------------------------------------------------------------------------------------


def budget(epsilon: float) -> str:
    return f"{epsilon:g}" if epsilon else "none"


def heading(epsilon: float) -> str:
    return f"epsilon {epsilon:g}" if epsilon else "no DP"


def percent(values: Sequence[float]) -> str:
    """The mean, and with several values half of their 95 % interval by Student's t."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    half = interval(values)
    return mean if half is None else f"{mean} +- {100 * half:.1f}"


def by(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows grouped by these labels."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


def scores(lab: Lab) -> tuple[str, dict[str, dict[float, list[float]]]]:
    """The metric's name, and every seed's value by method and epsilon; the probe comes first."""
    runs, probes = lab.rows("utility"), lab.rows("probe")
    metric = "accuracy" if any("accuracy" in r for r in runs or probes) else "loss"
    found: dict[str, dict[float, list[float]]] = {}
    for name, rows in ((PROBE, probes), *by(runs, "strategy").items()):
        label = name if isinstance(name, str) else name[0]
        for (epsilon,), same in by(rows, "epsilon").items():
            values = [r[metric] for r in same if metric in r]
            found.setdefault(label, {})[epsilon] = values
    return metric, found


def utility(lab: Lab) -> Table:
    """Scores by method and budget; the probe first."""
    metric, found = scores(lab)
    write = percent if metric == "accuracy" else lambda x: f"{statistics.fmean(x):.3f}"
    heads = ["strategy", *(heading(e) for e in lab.epsilons)]
    return heads, [
        [name, *(write(row[e]) if row.get(e) else "" for e in lab.epsilons)]
        for name, row in found.items()
    ]


def epsilons(lab: Lab) -> Table:
    """Epsilon claimed and measured of each mechanism."""
    heads = ["mechanism", "epsilon claimed", "epsilon measured", "flagged", "must be flagged"]
    return heads, [
        [r["mechanism"], budget(r["epsilon"]), f"{r['epsilon measured']:.2f}", r["flagged"],
         r["must be"]]
        for r in lab.rows("canaries")
    ]  # fmt: skip


def models(lab: Lab) -> Table:
    """The attacks on shadow models, and the loss threshold on the federations' own models."""
    heads = ["epsilon", "attack", "AUC", "+-", "TPR at 5 % FPR"]
    body = []
    for r in lab.rows("shadows"):
        for attack in ("loss", "LiRA offline", "LiRA online"):
            body.append([
                budget(r["epsilon"]), attack, f"{r[f'{attack} AUC']:.3f}", f"{r['+-']:.3f}",
                f"{r[f'{attack} TPR at 5 %']:.3f}",
            ])  # fmt: skip
    for (epsilon,), rows in by(lab.rows("utility"), "epsilon").items():
        auc = statistics.fmean(r["loss AUC"] for r in rows)
        body.append([
            budget(epsilon), f"loss, {len(rows)} federations", f"{auc:.3f}",
            f"{statistics.fmean(r['+-'] for r in rows):.3f}", "",
        ])  # fmt: skip
    return heads, body


def seats(lab: Lab) -> Table:
    """AUC of the server's attack: strategies down, budgets across."""
    found = by(lab.rows("seat"), "strategy", "rows")
    heads = [
        "strategy",
        "rows of the client",
        *(heading(e) for e in lab.epsilons),
        "+-",
    ]
    heads += ["no DP, secure aggregation"] if SECURE else []
    body = []
    for (strategy, n), rows in found.items():
        of = {r["epsilon"]: r for r in rows}
        cells = [f"{of[e]['AUC']:.3f}" if e in of else "" for e in lab.epsilons]
        secure = f"{of[0]['AUC, secure aggregation']:.3f}" if SECURE and 0 in of else ""
        body.append([
            strategy, str(n), *cells, f"{max(r['+-'] for r in rows):.3f}",
            *([secure] if SECURE else []),
        ])  # fmt: skip
    return heads, body


def inversions(lab: Lab) -> Table:
    """Part of a sentence read, by strategy and rank; one column a budget."""
    rows = [r for r in lab.rows("inversion") if "tokens" in r]
    recalls = list(dict.fromkeys(k for r in rows for k in r if k.startswith(("no DP", "epsilon"))))
    heads = ["strategy", "rank", "tokens", "sent", *recalls]
    return heads, [
        [r["strategy"], str(r["rank"]), str(r["tokens"]), r["sent"],
         *(f"{r[k]:.2f}" if k in r else "" for k in recalls)]
        for r in rows
    ]  # fmt: skip


def plain(lab: Lab, part: str) -> Table:
    """A part's rows as they were measured."""
    rows = lab.rows(part)
    heads = [k for k in dict.fromkeys(k for r in rows for k in r) if k != "seconds"]

    def cell(x: Any) -> str:
        return f"{x:.2f}" if isinstance(x, float) and not x.is_integer() else str(x)

    return heads, [[cell(r.get(k, "")) for k in heads] for r in rows]


# -- plots ----------------------------------------------------------------------------------------


def look(n: int) -> dict[str, Any]:
    return {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}


def look_of(lab: Lab, name: str) -> dict[str, Any]:
    """The same for a strategy in every figure."""
    if name == PROBE:
        return {"color": "#1f2937", "linestyle": "--", "marker": "s"}
    return look(list(lab.strategies).index(name))


def across(ax: Axes, lab: Lab) -> None:
    """Budgets from none to the smallest, equally far apart."""
    ax.set_xticks(range(len(lab.epsilons)), [budget(e) for e in lab.epsilons])
    ax.set_xlim(-0.3, len(lab.epsilons) - 0.7)
    ax.set_xlabel("epsilon")


def plot_utility(lab: Lab) -> Figure | None:
    """Score by budget, a line a method; None where nothing was run."""
    metric, found = scores(lab)
    if not any(any(row.values()) for row in found.values()):
        return None
    figure, (ax,) = new_figure(3.8)
    for n, (name, row) in enumerate(found.items()):
        at = [i for i, e in enumerate(lab.epsilons) if row.get(e)]
        values = [row[lab.epsilons[i]] for i in at]
        ax.errorbar(
            [i + 0.05 * (n - len(found) / 2) for i in at],
            [statistics.fmean(v) for v in values],
            yerr=[interval(v) or 0.0 for v in values],
            label=name, linewidth=1.4, elinewidth=0.8, **look_of(lab, name),
        )  # fmt: skip
    across(ax, lab)
    ax.set_ylabel(f"test {metric}")
    if metric == "accuracy":
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))  # two seeds' intervals leave what there is
        ax.yaxis.set_major_formatter(FuncFormatter(share))
    return with_legend(figure, ax)


def plot_epsilons(lab: Lab) -> Figure | None:
    """Measured epsilon as bars, the claim as a stroke."""
    rows = lab.rows("canaries")
    if not rows:
        return None
    figure, (ax,) = new_figure(1.0 + 0.3 * len(rows))
    for n, r in enumerate(rows):
        bad = r["flagged"] == "yes"
        ax.barh(n, r["epsilon measured"], 0.6, color=RED if bad else GREEN)
        ax.plot([r["epsilon"]] * 2, [n - 0.42, n + 0.42], color="#1f2937", linewidth=2)
    names = [f"{r['mechanism']}, epsilon {r['epsilon']:g}" for r in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("epsilon: bar measured, stroke claimed; red proves a bug")
    return figure


def plot_models(lab: Lab) -> Figure | None:
    """AUC of each attack on the shadow models by budget."""
    rows = {r["epsilon"]: r for r in lab.rows("shadows")}
    at = [i for i, e in enumerate(lab.epsilons) if e in rows]
    if not at:
        return None
    figure, (ax,) = new_figure(3.2)
    for n, attack in enumerate(("loss", "LiRA offline", "LiRA online")):
        found = [rows[lab.epsilons[i]] for i in at]
        ax.errorbar(at, [r[f"{attack} AUC"] for r in found], yerr=[r["+-"] for r in found],
                    label=attack, linewidth=1.4, elinewidth=0.8, **look(n))  # fmt: skip
    chance(ax)
    across(ax, lab)
    return with_legend(figure, ax)


def plot_seats(lab: Lab) -> Figure | None:
    """AUC of the server's attack by budget, a panel a client's size."""
    rows = lab.rows("seat")
    sizes = sorted({r["rows"] for r in rows})
    if not rows:
        return None
    figure, axes = new_figure(2.6 * len(sizes), rows=len(sizes))
    for ax, size in zip(axes, sizes, strict=True):
        here = by([r for r in rows if r["rows"] == size], "strategy")
        for (strategy,), mine in here.items():
            of = {r["epsilon"]: r["AUC"] for r in mine}
            at = [i for i, e in enumerate(lab.epsilons) if e in of]
            values = [of[lab.epsilons[i]] for i in at]
            ax.plot(at, values, label=strategy, linewidth=1.4, **look_of(lab, strategy))
        chance(ax)
        across(ax, lab)
        ax.set_title(f"client of {size} rows", fontsize=10)
    return with_legend(figure, axes[0])


def chance(ax: Axes) -> None:
    ax.axhline(0.5, color=GREY, linestyle="--", linewidth=1.2)
    ax.set_ylabel("AUC")
    ax.set_ylim(min(0.4, ax.get_ylim()[0]), max(0.8, ax.get_ylim()[1]))


def plot_inversions(lab: Lab) -> Figure | None:
    """Part of a sentence read by strategy and rank: without DP as bars, with it as strokes."""
    rows = [r for r in lab.rows("inversion") if "tokens" in r]
    if not rows:
        return None
    recalls = [k for k in rows[0] if k.startswith(("no DP", "epsilon"))]
    ranks = sorted({r["rank"] for r in rows})
    names = list(dict.fromkeys(r["strategy"] for r in rows))
    figure, (ax,) = new_figure(3.0)
    for n, rank in enumerate(ranks):
        of = {r["strategy"]: r for r in rows if r["rank"] == rank}
        for k, recall in enumerate((recalls[0], recalls[-1])):
            at = [i + (n - (len(ranks) - 1) / 2) * 0.8 / len(ranks) for i in range(len(names))]
            heights = [of.get(name, {}).get(recall, 0.0) for name in names]
            label = f"rank {rank}, {recall}" if not k else None
            if not k:
                ax.bar(at, heights, 0.72 / len(ranks), color=COLOURS[n], label=label)
            else:
                ax.scatter(at, heights, marker="_", color="#1f2937", s=60, zorder=3,
                           label=f"any rank, {recall}" if not n else None)  # fmt: skip
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("tokens read")
    ax.set_ylim(-0.03, 1.05)
    ax.yaxis.set_major_formatter(FuncFormatter(share))
    return with_legend(figure, ax)


# -- the page -------------------------------------------------------------------------------------

PARTS: Mapping[str, tuple[str, str, Callable[..., Table], Callable[..., Figure | None] | None]] = {
    "utility": (
        "Utility",
        "Test accuracy in percent after the whole run, by strategy and budget; with several seeds "
        "half of the 95 % interval. The linear probe trains nothing but a head on the frozen "
        "model's mean-pooled features, under the same budget and the same unit of privacy: it is "
        "the baseline that DP-LoRA has to beat.",
        utility, plot_utility,
    ),
    "epsilons": (
        "Epsilon claimed and measured",
        "A lower bound at 95 % confidence from canaries in one full-batch step (Steinke, Nasr and "
        "Jagielski, 2023). Above the claim it proves a bug; below it nothing. Bugs are planted at "
        "the claim where the bound is sharpest: k right guesses of k prove no more than "
        "log(k / 3), so at a large epsilon half the noise cannot be told.",
        epsilons, plot_epsilons,
    ),
    "one-run": (
        "A whole federated run",
        "The clients of a federation have canaries among their rows, each by a fair coin; the "
        "server reads every update (rounds) or the final model alone (final). How many canaries, "
        "how many guesses and at what confidence is on disk before the run. The run fails where "
        "the lower bound on epsilon is above what its clients claimed.",
        partial(plain, part="one-run"), None,
    ),
    "power": (
        "What that audit can find",
        "The bound on a run whose epsilon is this, simulated: a claim below it would be refuted.",
        partial(plain, part="power"), None,
    ),
    "models": (
        "Membership, from models",
        "AUC 0.5 is guessing. Shadow models train on a random half of a small pool, each in turn "
        "the target: the strongest case. Below them the loss threshold on the federations' own "
        "final models, one client's rows against unseen ones.",
        models, plot_models,
    ),
    "seats": (
        "Membership, from the server's seat",
        "Cosine of a row's gradient, at the model the client was sent, with the client's single "
        "update, over the columns that were sent. AUC within an update, averaged over updates.",
        seats, plot_seats,
    ),
    "inversions": (
        "Gradient inversion",
        "Part of one sentence's (token, position) pairs that are read from one upload by the span "
        "test; the worst case a strategy allows, with adapters on the first query layer and one "
        "SGD step on one example. Rank at or above the number of tokens gives the text away.",
        inversions, plot_inversions,
    ),
    **{k: (title, note, partial(plain, part=k), None) for k, (title, note) in NOTES.items()},
}  # fmt: skip

SMOKE = (
    "A smoke test, --quick: every part runs, at sizes too small for any figure here to say how "
    "private anything is."
)
BODY = """<pre><code>{{ command }}</code></pre>
<p>{{ setting }}</p>
{% for key, part, note, (heads, body) in parts %}<h2>{{ part }}</h2>
<p>{{ note }}</p>
{{ table(heads, body) }}
{% if key in plots %}{{ figure(part, plots[key]) }}{% endif %}
{% endfor %}
"""


def setting(lab: Lab) -> str:
    """What is compared, in one sentence; of a smoke test, that no figure says anything."""
    c, smoke = lab.config, f"{SMOKE} " if lab.size.cut else ""
    return (
        f"{smoke}{c.model.path} on {c.data.path}, {c.clients.count} clients, "
        f"{c.run.rounds} rounds; example-level DP at delta = {c.privacy.delta:g}, one budget over "
        f"the whole run; seeds {', '.join(map(str, lab.seeds))}."
    )


def write(lab: Lab, command: str) -> Path:
    """privacy.html, privacy.md and plots/ of what has been measured so far."""
    parts = [(k, title, note, table(lab)) for k, (title, note, table, _) in PARTS.items()]
    parts = [p for p in parts if p[3][1]]
    draws = {key: partial(draw, lab) for key, (_, _, _, draw) in PARTS.items() if draw}
    plots = drawn(draws)
    for key, png in plots.items():
        write_atomically(lab.out / "plots" / f"{key}.png", png)
    title = f"Privacy lab: {lab.config.run.name}{' (smoke test)' if lab.size.cut else ''}"
    text = render(BODY, plots, title=title, command=command, setting=setting(lab), parts=parts)
    lines = [f"# {title}", "", f"    {command}", "", setting(lab)]
    for _, part, note, (heads, body) in parts:
        lines += ["", f"## {part}", "", note, "", *markdown(heads, body)]
    write_atomically(lab.out / "privacy.md", ("\n".join(lines) + "\n").encode())
    path = lab.out / "privacy.html"
    write_atomically(path, text.encode())
    return path
