"""The report's page: a jinja2 template and its style, as strings.

They are Python and not .html and .css because a Flower app bundle carries only some kinds of file.
"""

STYLE = """
:root { --ink: #1f2937; --soft: #64748b; --line: #e3e8ef; --card: #fff; --ground: #f5f7fa;
  --blue: #2563eb; --good: #0b7a5b; --warn: #a15c00; --bad: #b42318; color-scheme: light; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header > div { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { background: var(--card); border-bottom: 1px solid var(--line); padding: 28px 0 22px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; scroll-margin-top: 56px; }
h3 { font-size: 14px; margin: 0 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 0 0 10px; max-width: 78ch; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.about { color: var(--soft); margin: 8px 0 0; display: flex; flex-wrap: wrap; gap: 2px 22px; }
.about b { color: var(--ink); font-weight: 500; overflow-wrap: anywhere; }
.chip { display: inline-block; padding: 2px 10px; border-radius: 99px; font-size: 13px;
  font-weight: 600; background: #eef2f7; color: var(--soft); margin: 0 4px 4px 0; }
.chip.good { background: #e2f5ee; color: var(--good); }
.chip.warn { background: #fff1da; color: var(--warn); }
.chip.bad { background: #fde7e5; color: var(--bad); }
.chip.blue { background: #e5edff; color: #1d4ed8; }
.banner { background: var(--bad); color: #fff; padding: 16px 20px; border-radius: 10px;
  margin: 20px 0 0; font-weight: 600; }
.banner strong { display: block; font-size: 19px; letter-spacing: .02em; }
.stop { border-left: 4px solid var(--bad); background: #fdf0ef; padding: 10px 14px;
  border-radius: 6px; margin: 18px 0 0; overflow-wrap: anywhere; }
.stop.first { margin: 0 0 20px; font-weight: 600; }
nav { position: sticky; top: 0; z-index: 3; background: rgba(245, 247, 250, .94);
  border-bottom: 1px solid var(--line); overflow-x: auto; white-space: nowrap; }
nav div { max-width: 1180px; margin: 0 auto; padding: 9px 20px; }
nav a { color: var(--soft); text-decoration: none; margin-right: 20px; font-size: 14px; }
nav a:hover { color: var(--blue); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(146px, 1fr)); gap: 12px;
  margin: 22px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile span { display: block; color: var(--soft); font-size: 13px; }
.tile b { display: block; font-size: 20px; line-height: 1.4; white-space: nowrap; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile.good b, .good { color: var(--good); } .tile.bad b, .bad { color: var(--bad); }
.bars { padding: 16px 18px; display: grid; gap: 10px; }
.bar { display: grid; grid-template-columns: minmax(110px, 260px) 1fr 74px; gap: 12px;
  align-items: center; }
.bar i { display: block; height: 16px; border-radius: 4px; background: #c3cddb; min-width: 2px; }
.bar.ours i { background: var(--blue); } .bar.ours { font-weight: 650; }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 16px; margin: 0 0 16px; }
figure { margin: 0; padding: 14px 16px 12px; }
figure img { display: block; width: 100%; height: auto; max-width: 560px; margin: 0 auto; }
.picture { max-height: 640px; overflow-y: auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
figcaption b { color: var(--ink); }
.scroll { overflow: auto; max-height: 560px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #f0f3f8; text-align: right; font-weight: 600;
  font-size: 13px; color: var(--soft); white-space: nowrap; z-index: 1; }
th, td { padding: 7px 9px; border-bottom: 1px solid var(--line); }
td { text-align: right; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } tbody tr:hover { background: #f8fafc; }
td.bad { color: var(--bad); font-weight: 650; }
table.words td, table.words th { text-align: left; white-space: normal; vertical-align: top; }
table.words td { overflow-wrap: anywhere; }
table.words td:first-child { white-space: nowrap; overflow-wrap: normal; }
table.samples { table-layout: fixed; min-width: 620px; }
table.samples td { white-space: pre-wrap !important; overflow-wrap: anywhere !important; }
table.first-left td:first-child, table.first-left th:first-child { text-align: left;
  white-space: normal; overflow-wrap: anywhere; min-width: 8em; }
tr.other td { font-weight: 650; } tr.other td:first-child::before { content: "* "; }
.soft { color: var(--soft); font-size: 13px; }
.pad { padding: 16px 18px; } .pad p:last-child { margin: 0; }
.gap { margin-top: 16px; }
details { padding: 12px 18px; } summary { cursor: pointer; font-weight: 600; }
details p { margin-top: 10px; max-width: none; }
.sections { columns: 3 330px; column-gap: 16px; }
.sections .card { break-inside: avoid; margin: 0 0 16px; padding: 12px 14px 6px; }
.sections td { padding: 4px 0; font-size: 13px; white-space: normal; overflow-wrap: anywhere; }
.sections td:first-child { text-align: left; color: var(--soft); padding-right: 14px; }
footer { color: var(--soft); font-size: 13px; padding: 30px 0 50px; }
@media (max-width: 560px) {
  main, header > div, nav div { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 23px; } figure { padding: 10px 6px; } figcaption { padding: 0 8px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } .tile b { font-size: 18px; }
  .bar { grid-template-columns: 1fr 66px; gap: 2px 10px; }
  .bar div { grid-row: 2; grid-column: 1 / -1; } th, td { padding: 6px 9px; }
  .sections { columns: 1; } table.words td:first-child { white-space: normal; }
  table.words td:nth-child(n+4) { min-width: 11em; }
  table.samples { min-width: 0; } table.samples thead { display: none; }
  table.samples tr, table.samples td { display: block; border: 0; padding: 2px 9px; }
  table.samples tr { border-bottom: 1px solid var(--line); padding: 8px 0; }
  table.samples td::before { content: attr(data-head); display: block; font-size: 12px;
    color: var(--soft); }
}
@media print {
  nav { display: none; } .scroll, .picture { max-height: none; }
  body { background: #fff; } .card { break-inside: avoid; }
}
"""

CAPTIONS = {
    "accuracy": ("Score by round", "On the central test rows. Dashed lines are baselines."),
    "loss": (
        "Loss by round",
        "Training: mean over the accepted clients, weighted by their examples.",
    ),
    "clients": (
        "Each client's own test",
        "Best final model on top. The line spans a client's scores from the first model it "
        "received to the last.",
    ),
    "data": ("Data split", "Rows of each client, by label. The more the bars differ, the harder."),
    "bytes": (
        "Traffic by round",
        "Counted where it is sent. Above each round, below the running total.",
    ),
    "deviation": (
        "Aggregation deviation",
        "Relative distance from the weighted mean of the clients' updates, on a log scale.",
    ),
    "confusion": (
        "Confusion matrix",
        "Central test rows: a line a true label, a column what the final model says. Shaded by "
        "the share of the line.",
    ),
    "residuals": (
        "Residuals",
        "Central test rows: by how much each number is above (+) or below (-) the final model's.",
    ),
    "margins": (
        "Margins",
        "Central test rows by their margin: right of 0, the final model prefers the chosen answer "
        "more than the untouched model does.",
    ),
    "timeline": (
        "Who works, who waits",
        "Each node's time to answer, round after round, as if each had a machine of its own. "
        "White is waiting for the slowest. Aggregation and evaluation are left out.",
    ),
}
"""Title and explanation, by the figure's name."""

_MACROS = """
{%- macro figure(name) -%}
{% if name in figures %}
<figure class="card">
<div class="picture">
<img src="{{ figures[name] }}" alt="{{ captions[name][0] }}"></div>
<figcaption><b>{{ captions[name][0] }}.</b> {{ captions[name][1] }}</figcaption>
</figure>
{% endif %}
{%- endmacro -%}
{%- macro grid(table, kind="") -%}
<div class="card scroll"><table class="{{ kind }}">
<thead><tr>{% for head in table.head %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{%- for cell in row -%}
<td{% if cell.tone %} class="{{ cell.tone }}"{% endif %}
{%- if cell.title %} title="{{ cell.title }}"{% endif %}>{{ cell.text }}</td>
{%- endfor -%}
</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro -%}
{%- macro pairs(rows, heads, kind="") -%}
<div class="card scroll"><table class="words {{ kind }}">
<thead><tr>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for text in row %}<td data-head="{{ heads[loop.index0] }}">{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro -%}
"""

_TOP = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ summary.name }} - fedlora</title>
<style>{{ style }}</style>
</head>
<body>
<header><div>
{% if summary.warnings %}
<div class="stop first bad" role="alert">Warning: {{ summary.warnings | join(" ") }}</div>
{% endif %}
<h1>{{ summary.name }}</h1>
<span class="chip {{ status.tone }}">{{ status.text }}</span>
<span class="chip blue">{{ summary.strategy }}</span>
{% if summary.promise %}<span class="chip">promise: {{ summary.promise }}</span>{% endif %}
{% if privacy[0] or privacy[1].rows %}
<span class="chip">differential privacy</span>
{% endif %}
<div class="about">
<span>model <b>{{ summary.model }}</b></span>
<span>data <b>{{ summary.data }}</b></span>
<span>clients <b>{{ run.clients | length }}</b></span>
<span>rounds <b>{{ summary.rounds }}</b></span>
{% if summary.seed is not none %}<span>seed <b>{{ summary.seed }}</b></span>{% endif %}
</div>
{% if insecure %}
<div class="banner" role="alert"><strong>THIS RUN HAS NO PRIVACY</strong>
privacy.insecure-reproducible-noise was set: the noise was drawn from the run's seed, so whoever
knows the seed can take it off again. Every epsilon on this page is void.</div>
{% endif %}
{% if summary.stopped %}<div class="stop"><b>Stopped:</b> {{ summary.stopped }}</div>{% endif %}
<div class="tiles">
{% for tile in tiles %}
<div class="card tile {{ tile.tone }}"><span>{{ tile.title }}</span><b>{{ tile.value }}</b>
<span>{{ tile.detail }}</span></div>
{% endfor %}
</div>
</div></header>
<nav><div><a href="#result">Result</a><a href="#rounds">Rounds</a><a href="#clients">Clients</a>
<a href="#rows">Rows</a><a href="#proof">Aggregation proof</a>
<a href="#left">What left the clients</a>
<a href="#privacy">Privacy</a><a href="#failures">Failures</a><a href="#config">Config</a>
</div></nav>
<main>
"""

_RESULTS = """
<h2 id="result">Result</h2>
{% if verdict %}<p>{{ verdict }}</p>{% endif %}
{% if rate %}<p>Trained at lr {{ rate }}
{%- if scale_and_start %}; {{ scale_and_start }}{% endif %}.</p>{% endif %}
{% if bars %}
<div class="card bars">
{% for bar in bars %}
<div class="bar{{ ' ours' if bar.ours }}"><span>{{ bar.name }}</span>
<div><i style="width: {{ bar.width }}%"></i></div><span>{{ bar.value }}</span></div>
{% endfor %}
</div>
{% elif not verdict %}
<p>The final model was not compared with baselines in this run.</p>
{% endif %}
{% if ends.rows %}<h3 class="gap">Ends of this run</h3>{{ grid(ends) }}{% endif %}
<div class="figures gap">{{ figure("accuracy") }}{{ figure("loss") }}</div>
{% if parts_told or part_scores.rows or samples %}
<h3>The central {{ run.parts.get("of") or "test" }} rows</h3>
{% for text in parts_told %}<p>{{ text }}</p>{% endfor %}
{% endif %}
{% if part_scores.rows %}{{ grid(part_scores, "first-left") }}{% endif %}
<div class="figures gap">
{{ figure("confusion") }}{{ figure("residuals") }}{{ figure("margins") }}</div>
{% if samples %}
{{ pairs(samples, sample_heads, "samples") }}
{% endif %}

<h2 id="rounds">Rounds</h2>
{% for text in start %}<p>{{ text }}</p>{% endfor %}
{% if rounds.rows %}{{ grid(rounds) }}{% else %}<p>No round was finished.</p>{% endif %}
{% if within.rows %}<h3 class="gap">{{ within_title }}</h3>{{ grid(within) }}{% endif %}
<div class="figures gap">{{ figure("bytes") }}{{ figure("timeline") }}</div>

<h2 id="clients">Clients</h2>
{% if clients.rows %}{{ grid(clients) }}{% else %}<p>No client has taken part yet.</p>{% endif %}
<div class="figures gap">{{ figure("clients") }}{{ figure("data") }}</div>

<h2 id="rows">Rows</h2>
{% if sources.rows %}
{{ grid(sources, "words") }}
<div class="gap">{{ pairs(account, ["what became of them", "rows"]) }}</div>
{% else %}
<p>This run's summary does not say what became of its rows.</p>
{% endif %}
"""

_TRUST = """
<h2 id="proof">Aggregation proof</h2>
<div class="figures">
<div class="card pad">
<p><code>W_new = W + sum_i p_i s_i B_i A_i</code></p>
<p class="soft">p_i: client i's share of the examples; s_i: its LoRA scale</p>
{% for text in proof %}<p>{{ text }}</p>{% endfor %}</div>
{{ figure("deviation") }}
</div>
{% if layers.rows %}
<h3>Modules of the largest deviation</h3>
{{ grid(layers, "words") }}
{% endif %}
{% if certificate %}
<h3 class="gap">Certificate</h3>
<div class="card pad">{% for text in certificate %}<p>{{ text }}</p>{% endfor %}</div>
{% endif %}
{% if starts.rows %}
<h3 class="gap">Clients that began farthest from what they were sent</h3>
{{ grid(starts, "words") }}
{% endif %}
{% if silent %}
<h3 class="gap">Not certified</h3>
{{ pairs(silent, ["what", "in rounds"]) }}
{% endif %}

<h2 id="left">What left the clients</h2>
{% if left %}
{{ pairs(left, ["what", "how much of it"]) }}
<p class="gap">No rows of data are in any message. That is no proof of privacy: factors, losses and
counts tell something about the rows they come from, and only differential privacy bounds how
much{% if privacy[0] or privacy[1].rows %}, and only of what it noises: the factors{% endif %}.</p>
{% if modules %}
<details class="card"><summary>The {{ modules | length }} modules whose factors were sent</summary>
<p><code>{{ modules | join(", ") }}</code></p></details>
{% endif %}
{% else %}
<p>Nothing yet: no client has answered.</p>
{% endif %}

<h2 id="privacy">Privacy</h2>
{% if privacy[0] %}{{ pairs(privacy[0], ["what holds", "value"]) }}{% endif %}
{% if privacy[1].rows %}<div class="gap">{{ grid(privacy[1]) }}</div>{% endif %}
{% if not privacy[0] and not privacy[1].rows %}
<p>No differential privacy was asked for, and none is claimed.</p>
{% endif %}

<h2 id="failures">Failures</h2>
{% if failures %}
{{ pairs(failures, ["round", "client", "reason"]) }}
{% else %}
<p>None: every update that was asked for came, and was used.</p>
{% endif %}

<h2 id="config">Config</h2>
{% if changed.rows %}
<h3>Not the default, {{ changed.rows | length }} of {{ run.config | length }} keys</h3>
{{ grid(changed, "words") }}
<h3 class="gap">Every key, those marked * first</h3>
{% endif %}
{% if config %}
<div class="sections">
{% for section, entries in config.items() %}
<div class="card"><h3>[{{ section }}]</h3><table>
{% for key, value, other in entries %}
<tr{% if other %} class="other"{% endif %}><td>{{ key }}</td><td><code>{{ value }}</code></td></tr>
{% endfor %}
</table></div>
{% endfor %}
</div>
{% else %}
<p>The run's directory has no config.toml.</p>
{% endif %}
<footer>Written by fedlora from config.toml, rounds.jsonl, clients.jsonl, summary.json and
parts.json of the run's directory. The page is one file and asks no server for anything.</footer>
</main>
</body>
</html>
"""

PAGE = _MACROS + _TOP + _RESULTS + _TRUST
"""Its variables are the arguments of `fedlora.reports.report.render`."""
