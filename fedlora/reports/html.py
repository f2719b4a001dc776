"""Pages, tables, figures and intervals, for the reports of comparisons and the privacy lab."""

import base64
import io
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fedlora.reports.axes import BLUE, GREEN, ORANGE, OTHERS, RED, STYLE

COLOURS = (BLUE, ORANGE, GREEN, RED, *OTHERS)

PAGE = """{% macro table(head, body, mark="") %}<div class="wide"><table>
<tr>{% for h in head %}<th>{{ h }}</th>{% endfor %}</tr>
{% for cells in body %}<tr>{% for c in cells %}
<td{% if mark and c.endswith(mark) %} class="bad"{% endif %}>{{ c }}</td>
{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% macro figure(title, png, kind="") %}
<img{% if kind %} class="{{ kind }}"{% endif %} alt="{{ title }}"
src="data:image/png;base64,{{ png }}">{% endmacro %}
<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; margin: 2rem auto; max-width: 72rem;
       padding: 0 1rem }
h1, p, li, pre { overflow-wrap: anywhere }
p { max-width: 46rem }
pre { white-space: pre-wrap; color: #475569 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right }
th:first-child, td:first-child { text-align: left }
.bad { color: #b42318 }
img { max-width: 100%; width: 40rem; display: block; margin: 1.5rem 0 }
img.narrow { width: 27rem }
</style>
<h1>{{ title }}</h1>
"""


def render(content: str, plots: Mapping[str, bytes], **given: Any) -> str:
    """One self-contained page.

    content: a jinja2 template below the heading, which has `table(head, rows)` (cells that end with
    a third argument are red), `figure(title, plots[name])` and what else is given; `title` must be.
    """
    from jinja2 import Environment

    inline = {name: base64.b64encode(png).decode() for name, png in plots.items()}
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE + content + "</html>\n")
    return page.render(plots=inline, **given).lstrip()


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table's lines."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for cells in body:
        yield "| " + " | ".join(cells) + " |"


def drawn(figures: Mapping[str, Callable[[], Figure | None]]) -> dict[str, bytes]:
    """The figures that there is data for, as PNG, by name."""
    found = {}
    with mpl.rc_context(dict(STYLE)):
        for name, draw in figures.items():
            if (figure := draw()) is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=130)
                found[name] = buffer.getvalue()
    return found


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return float(t.ppf(0.975, len(values) - 1)) * spread
