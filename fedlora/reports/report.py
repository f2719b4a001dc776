"""A run as a person reads it: figures, one self-contained page, and a table for the terminal.

    write(Path("runs/quickstart"))  ->  runs/quickstart/report.html, plots/*.svg, tables/*

The page needs nothing but itself: no script, no font, no request. Every word that came from
outside (a client's reason for failing, a label, a name) is escaped.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.reports import certificate, changed, rows, table_files, tables, trust
from fedlora.reports.ends import ends
from fedlora.reports.outcome import finite, said
from fedlora.reports.page import CAPTIONS, PAGE, STYLE
from fedlora.reports.run_files import RunFiles, certificates, read
from fedlora.reports.table_files import TextTable
from fedlora.reports.units import duration, percent, size, tiny
from fedlora.reports.within import TITLE, within

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RunFiles", "closing", "read", "render", "summary_table", "write"]


def write(run_dir: Path, plots: bool = True) -> Path:
    """Write report.html of a run, plots/*.svg, and each table in tables/; return the page's path.

    Works on a run that is still going or was cut short. Without plots, the page has its tables.

    Raises:
        FedLoraError: the directory holds no run, or a file of it is damaged.
    """
    run = read(run_dir)
    figures = _draw(run) if plots else {}
    table_files.write(run.directory / "tables", tables_of(run))
    page = run.directory / "report.html"
    part = page.with_suffix(".part")
    part.write_text(render(run, figures), encoding="utf-8")
    part.replace(page)
    return page


def render(run: RunFiles, figures: Mapping[str, bytes]) -> str:
    """The page, with the figures, SVG or PNG by the name of their file, inside it."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from fedlora.reports import parts  # matplotlib

    other = changed.changed(run)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(PAGE).render(
        run=run,
        summary=run.summary,
        style=Markup(STYLE),
        captions=CAPTIONS,
        figures={Path(name).stem: inline(name, data) for name, data in figures.items()},
        status=tables.status(run),
        tiles=list(tables.tiles(run)),
        bars=tables.bars(run),
        verdict=tables.verdict(run),
        rate=tables.rate(run),
        scale_and_start=tables.scale_and_start(run),
        ends=ends(run),
        rounds=tables.rounds(run),
        within=within(run),
        within_title=TITLE,
        clients=tables.clients(run),
        sources=rows.sources(run),
        account=list(rows.account(run)),
        failures=tables.failures(run),
        proof=trust.proof(run),
        layers=trust.layers(run),
        certificate=list(certificate.certificate(run)),
        start=[text for r in run.rounds[:1] for text in (r.get("start") or {}).get("lines", ())],
        starts=certificate.starts(run),
        silent=certificate.silent(run),
        modules=trust.modules(run),
        left=list(trust.left(run)),
        privacy=trust.privacy(run),
        insecure=bool(run.config.get("privacy.insecure-reproducible-noise")),
        parts_told=list(parts.told(run)),
        part_scores=parts.scores(run),
        samples=parts.samples(run),
        sample_heads=parts.SAMPLES,
        changed=changed.first(run, other),
        config=changed.sections(run, other),
    )


def inline(name: str, data: bytes) -> str:
    """A picture as an address that holds it. An SVG in an <img> runs no script."""
    kind = "svg+xml" if name.endswith(".svg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def tables_of(run: RunFiles) -> dict[str, TextTable]:
    """Every table of the page, by the name of its files; empty ones without rows."""
    from fedlora.reports import parts

    other = changed.changed(run)
    facts, by_client = trust.privacy(run)
    grids = {
        "ends": ends(run),
        "test-labels": parts.scores(run),
        "rounds": tables.rounds(run),
        "within-rounds": within(run),
        "clients": tables.clients(run),
        "sources": rows.sources(run),
        "modules": trust.layers(run),
        "starts": certificate.starts(run),
        "privacy-clients": by_client,
        "config-changed": changed.first(run, other),
    }
    config = changed.sections(run, other)
    keys = [(f"{s}.{key}", text) for s, entries in config.items() for key, text, _ in entries]
    words = {
        "baselines": TextTable(("model", run.metric.key), [bar[:2] for bar in tables.bars(run)]),
        "samples": TextTable(parts.SAMPLES, parts.samples(run)),
        "rows": TextTable(("what became of them", "rows"), list(rows.account(run))),
        "not-certified": TextTable(("what", "in rounds"), certificate.silent(run)),
        "left": TextTable(("what", "how much of it"), list(trust.left(run))),
        "privacy": TextTable(("what holds", "value"), facts),
        "failures": TextTable(("round", "client", "reason"), tables.failures(run)),
        "config": TextTable(("key", "value"), keys),
    }
    return {name: TextTable.of(grid) for name, grid in grids.items()} | words


def summary_table(run_dir: Path) -> "Table":
    """The run in a dozen lines for a terminal: the result and its baselines, then what it cost.

    How many things speak against the run is its first row, in red; `closing` says which.
    """
    from rich.markup import escape
    from rich.table import Table

    run = read(run_dir)
    s = run.summary
    table = Table(title=escape(f"{s['name']}: {s['strategy']}"), title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    if s["warnings"]:
        table.add_row("warnings", str(len(s["warnings"])), style="bold red")
    for what, value in _summary_rows(run):
        table.add_row(escape(what), escape(value))
    return table


def closing(run_dir: Path, page: Path) -> None:
    """Print a run's results: its table, what speaks against it in one line, where its page is.

    The line is never folded, so that a log can be searched for it.
    """
    from rich.console import Console

    console = Console()
    console.print(summary_table(run_dir))
    if warnings := read(run_dir).summary["warnings"]:
        line = said(warnings)
        console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)


def _summary_rows(run: RunFiles) -> Iterator[tuple[str, str]]:
    s, metric = run.summary, run.metric
    if s["final"]:
        yield f"final {metric.title}", metric.text(s["final"].get(metric.key))
    answers = "exact_match" in (s["final"] or {})  # which no baseline gives
    if (answers or not metric.share) and metric.key in run.untuned:
        yield f"untuned {metric.title}", metric.text(run.untuned[metric.key])
    if answers:
        yield "final exact match", percent(finite(s["final"], "exact_match"))
        yield "untuned exact match", percent(finite(run.untuned, "exact_match"))
        if how := s.get("generation"):
            stop = "no end mark" if how["stops_at"] is None else how["stops_at"]
            n = how["tokens"]
            most = f"{n} tokens at most" if n >= 0 else "as many tokens as the longest response"
            yield "answers", f"greedy, {most}, up to {stop}"
    for end in run.ends:
        score = metric.text(finite(end.get("final"), metric.key))
        yield f"{metric.title} at its end after round {end.get('rounds')}", score
    yield from tables.chosen(run)
    if s["best"]:
        yield f"best, in round {s['best']['round']}", metric.text(s["best"].get(metric.key))
    for name, value in run.baselines().items():
        yield f"baseline: {name}", metric.text(value)
    if worst := run.worst_client():
        yield f"worst client: {worst['client']}", metric.text(finite(worst["final"], metric.key))
    yield "rounds", str(s["rounds"])
    if rate := tables.rate(run):
        yield "lr", rate
    yield "bytes down", size(s["bytes"].get("down"))
    yield "bytes up", size(s["bytes"].get("up"))
    if s["max_deviation"] is not None:
        yield f"largest deviation ({s['promise']})", tiny(s["max_deviation"])
    if certificates(run.rounds):
        told = [] if s["max_certificate"] is None else [tiny(s["max_certificate"])]
        what = f"certificate ({s['promise'] or 'approximate'})"
        yield what, ", ".join([*told, *tables.remarks(run)])
    yield "time", duration(s["seconds"])
    yield "failures", str(s["failures"])
    if s["stopped"]:
        yield "stopped", s["stopped"]


def _draw(run: RunFiles) -> dict[str, bytes]:
    """The figures, also written to plots/. One that an earlier report left there is removed."""
    from fedlora.reports.plots import FIGURES, draw

    folder = run.directory / "plots"
    folder.mkdir(exist_ok=True)
    drawn = draw(run)
    for path in (folder / f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")):
        if path.name in drawn:
            path.write_bytes(drawn[path.name])
        else:
            path.unlink(missing_ok=True)
    return drawn
