"""The documentation says what the code does: its pages, tables, links, and the code on them."""

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml
from typer.main import get_command

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.strategies import STRATEGIES, server_optimizers
from tests.strategies.test_contract import COSTS
from tests.support.doc_tables import DOCS, hook, load, table
from tests.support.strategy_federation import fitting, play
from tests.support.tiny_federation import ROOT

PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "simulations/README.md",
    *PAGES,
)
YES = {True: "yes", False: "no"}
WORKED = DOCS / "extend" / "write-a-strategy.md"

every_strategy = pytest.mark.parametrize("name", STRATEGIES)


generator = load(DOCS / "generate_configuration.py", "docs_generate_configuration")


def fenced(page: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of each fenced block."""
    found = re.finditer(r'^```\w*(?: title="(.+?)")?\n(.*?)^```$', page.read_text(), re.M | re.S)
    yield from ((m[1] or "", m[2]) for m in found)


def docstring(name: str) -> str:
    return inspect.getdoc(sys.modules[STRATEGIES[name].__module__]) or ""


# -- strategies ---------------------------------------------------------------------------------


@every_strategy
def test_every_strategy_has_a_page_that_says_what_it_needs_and_promises(name: str) -> None:
    page, cls = DOCS / "strategies" / f"{name}.md", STRATEGIES[name]
    assert page.exists(), f"write docs/strategies/{name}.md"
    assert f'`strategy.name = "{name}"`' in page.read_text()
    (said,) = table(page, "promise")
    assert said == {
        "promise": cls().promise,
        "ranks may differ": YES[not cls().needs().equal_ranks],
        "base moves": YES[cls().needs().moving_base],
        "client memory": YES[cls().needs().client_memory],
    }


@every_strategy
def test_the_equations_of_a_page_are_those_on_top_of_the_file(name: str) -> None:
    text = (DOCS / "strategies" / f"{name}.md").read_text()
    equations = text[text.index("## Equations") : text.index("## What travels")]
    blocks = re.findall(r"^```\n(.*?)^```$", equations, re.M | re.S)
    head = {" ".join(line.split()) for line in docstring(name).splitlines()}
    assert blocks
    for line in "".join(blocks).splitlines():
        said = " ".join(line.split())
        assert any(said in known for known in head), f"{name}: {line!r} is not in its file"


@every_strategy
def test_a_page_lists_every_option_with_its_default(name: str) -> None:
    page = DOCS / "strategies" / f"{name}.md"
    start = f"strategy.{name}."
    options = {k.removeprefix(start): v for k, v in Config().flat().items() if k.startswith(start)}
    if not options:
        assert "## Options\n\nNone.\n" in page.read_text()
        return
    said = {row["option"].strip("`"): row["default"].strip("`") for row in table(page, "option")}
    assert said.keys() == options.keys()
    for key, value in options.items():
        if isinstance(value, bool | str):
            assert said[key] == (f'"{value}"' if isinstance(value, str) else str(value).lower())
        else:
            assert float(said[key]) == value


def test_the_overview_says_of_every_strategy_what_its_code_says() -> None:
    rows = {row["strategy"]: row for row in table(DOCS / "strategies" / "index.md", "strategy")}
    assert list(rows) == list(STRATEGIES)
    for name, cls in STRATEGIES.items():
        row = rows[name]
        assert row["promise"] == cls().promise
        assert row["ranks may differ"] == YES[not cls().needs().equal_ranks]
        assert row["base moves"] == YES[cls().needs().moving_base]
        assert row["client memory"] == YES[cls().needs().client_memory]
        sizes = {"d": 1024, "k": 1024, "r": 8, "m": 8, "t": 0}
        for way, formula in zip(("up", "down"), COSTS[name], strict=True):
            assert row[way].removeprefix("from ") == f"{4 * eval(formula, sizes):,}", (name, way)


@every_strategy
def test_what_is_sent_once_is_what_the_overview_says(name: str) -> None:
    rows = {row["strategy"]: row for row in table(DOCS / "strategies" / "index.md", "strategy")}
    strategy = STRATEGIES[name]()
    first, second = play(strategy, fitting(strategy), [(0, 1, 2), (0, 1, 2)])
    formula = {"0": "0", "32,768": "r * k", "65,536": "r * (d + k)"}[rows[name]["once"]]
    for new, back in zip(first.visits, second.visits, strict=True):
        layers = new.upload.client.layers.values()
        once = sum(eval(formula, {"d": x.d, "k": x.k, "r": x.rank}) for x in layers)
        more = sum(new.sent_down[c] - back.sent_down[c] for c in "ABR") + new.sent_down["base"]
        assert max(0, more) == once  # florist's rank may grow from round to round


def test_what_goes_with_what_is_what_the_code_refuses() -> None:
    rows = {row["strategy"]: row for row in table(DOCS / "extend" / "composing.md", "strategy")}
    assert list(rows) == list(STRATEGIES), "rows in the order of STRATEGIES"
    for name, cls in STRATEGIES.items():
        needs = cls().needs()
        assert (
            rows[name].pop("late updates") in YES.values()
        )  # tests/federation/test_buffered.py holds it
        assert rows[name] == {
            "strategy": name,
            "server optimiser": YES[server_optimizers.problem(cls()) is None],
            "robust aggregation": YES[cls().promise != "shared"],
            "LEGEND": YES[not needs.client_memory],
            "quantised base": YES[not needs.moving_base],
        }, name


# -- the worked example -------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ModuleType, ModuleType]:
    """The strategy of write-a-strategy.md, registered as the page says: its name, its module, and
    the contract tests as they are with it."""
    blocks = dict(fenced(WORKED))
    path = tmp_path / "zero_pad.py"
    path.write_text(blocks["fedlora/strategies/zero_pad.py"])
    full = "fedlora.strategies.zero_pad"
    spec = importlib.util.spec_from_file_location(full, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, full, module)
    spec.loader.exec_module(module)
    (line,) = (text for title, text in fenced(WORKED) if not title and '": ZeroPad' in text)
    ((name, cls),) = eval("{" + line + "}", vars(module)).items()
    monkeypatch.setitem(STRATEGIES, name, cls)
    contract = load(ROOT / "tests" / "strategies" / "test_contract.py", "contract_of_the_page")
    contract.COSTS |= eval("{" + blocks["COSTS in tests/strategies/test_contract.py"] + "}")
    return name, module, contract


def cases(test: Callable[..., None], name: str) -> Iterator[dict[str, Any]]:
    """The arguments that pytest would call a contract test with for one strategy."""
    marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
    if not any({"strategy", "name"} & set(inspect.signature(test).parameters) for _ in marks):
        return
    choices = []
    for mark in marks:
        names = [mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])
        values, ids = list(mark.args[1]), mark.kwargs.get("ids")
        if isinstance(ids, dict):
            mine = [v for v, i in zip(values, ids, strict=True) if re.match(rf"{name}\b", i)]
        else:
            mine = [name] if names == ["name"] and name in values else values
        choices.append([dict(zip(names, v if len(names) > 1 else [v], strict=True)) for v in mine])
    for chosen in product(*choices):
        yield {key: value for part in chosen for key, value in part.items()}


def run_contract(contract: ModuleType, name: str, tmp_path: Path) -> list[str]:
    """Every contract test on one strategy; the names of those that had something to test."""
    ran = []
    for title, test in vars(contract).items():
        if title.startswith("test_"):
            for n, given in enumerate(cases(test, name)):
                if "tmp_path" in inspect.signature(test).parameters:
                    given["tmp_path"] = tmp_path / f"{title}-{n}"
                    given["tmp_path"].mkdir()
                test(**given)
                ran.append(title)
    return ran


def test_the_strategy_of_the_page_passes_the_contract_tests(
    example: tuple[str, ModuleType, ModuleType], tmp_path: Path
) -> None:
    name, module, contract = example
    ran = run_contract(contract, name, tmp_path)
    whole = {t for t in vars(contract) if t.startswith("test_")}
    not_its = {t for t in whole - set(ran) if re.search("refusal|under_an_exact|memory_is", t)}
    assert whole - set(ran) - not_its == {"test_the_sizes_of_this_federation_are_all_different"}
    assert len(ran) > 2 * len(whole) - 12
    head = ast.get_docstring(ast.parse(inspect.getsource(module))) or ""
    for part in ("https://arxiv.org/abs/", "Differs from the paper", "Deviation from (E)", "Costs"):
        assert part in head


@pytest.mark.parametrize("bug", ["uniform", "in place", "zeroed"])
def test_the_contract_tests_see_what_the_page_says_they_see(
    example: tuple[str, ModuleType, ModuleType], tmp_path: Path, bug: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from dataclasses import replace

    name, module, contract = example
    true = module.mean_ranks

    def planted(uploads: Any, before: Any, absent: Any) -> Any:
        uploads = list(uploads)
        if bug == "uniform":
            return true((replace(u, num_examples=1) for u in uploads), before, absent)
        after = true(uploads, before, absent)
        if bug == "in place":
            for m, A in after.A.items():
                before.A[m].copy_(A)
        if bug == "zeroed":
            top = {m: max(u.sent.A[m].shape[0] for u in uploads if m in u.sent.A)
                   for m in after.A if any(m in u.sent.A for u in uploads)}  # fmt: skip
            for m, r in top.items():
                after.A[m][r:], after.B[m][:, r:] = 0, 0
        return after

    monkeypatch.setattr(module, "mean_ranks", planted)
    with pytest.raises(AssertionError):
        run_contract(contract, name, tmp_path)


def test_the_tests_of_the_page_pass(
    example: tuple[str, ModuleType, ModuleType], tmp_path: Path
) -> None:
    path = tmp_path / "of_the_page.py"
    path.write_text(dict(fenced(WORKED))["tests/strategies/test_zero_pad.py"])
    found = [f for t, f in vars(load(path, "of_the_page")).items() if t.startswith("test_")]
    assert len(found) >= 3
    for test in found:
        test()


# -- commands, keys, links ----------------------------------------------------------------------


def commands(group: click.Group, path: str = "fedlora") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_command_and_option_is_in_the_reference() -> None:
    text = (DOCS / "use" / "commands.md").read_text()
    group = get_command(app)
    found = list(commands(group))  # type: ignore[arg-type]
    assert len(found) > 10
    for name, command in found:
        assert re.search(rf"{name}\b", text), name
        for parameter in command.params:
            options = [o for o in parameter.opts if o.startswith("-") and o != "--help"]
            spelt = [*options, *parameter.secondary_opts]
            assert not options or any(f"{o}" in text for o in spelt), f"{name} {options[0]}"


def test_the_configuration_page_is_the_one_that_is_generated() -> None:
    """Else: python docs/generate_configuration.py."""
    assert generator.page() == generator.PAGE.read_text()


def test_the_picture_of_the_rooms_is_the_one_that_the_imports_draw() -> None:
    """Else: python docs/draw_rooms.py."""
    rooms = load(DOCS / "draw_rooms.py", "docs_draw_rooms")
    assert rooms.draw() == rooms.PICTURE.read_text()


def test_the_configuration_page_has_every_key_and_what_the_code_says_of_it() -> None:
    text, section, found = generator.page(), "", set()
    for line in text.splitlines():
        if heading := re.match(r"#+ \[(.+)\]", line):
            section = heading[1]
        elif key := re.match(r"\| `([\w-]+)` \|", line):
            found.add(f"{section}.{key[1]}")
    assert found | {"strategy.name"} == set(Config().flat())
    assert "Dirichlet concentration: small is skewed." in text
    assert "Rank the residual is cut to; 0 keeps all of it." in text


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as markdown's toc makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    plain = (
        re.sub(r"[^\w\s-]", "", x).strip().lower() for x in re.findall(r"^#+ (.+)$", text, re.M)
    )
    return {re.sub(r"[-\s]+", "-", x) for x in plain}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in slugs(target), f"{page.name}: {link}"


# -- the site -----------------------------------------------------------------------------------

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_every_page_is_in_the_nav_and_those_that_come_go_where_a_pattern_says() -> None:
    nav = list(hook.expanded(SITE["nav"], set(hook.named(SITE["nav"]))))
    found = list(hook.named(x for x in nav if x))
    assert sorted(found) == sorted(p.relative_to(DOCS).as_posix() for p in PAGES)
    assert all((DOCS / page).exists() for page in found)


def test_a_result_that_is_added_is_listed_and_quoted(tmp_path: Path) -> None:
    page = tmp_path / "new.md"
    page.write_text(
        "# New\n\n## at one rank\n\n| seed | strategy |\n|---|---|\n| 1 | `ffa` |\n| 2 | fedex |\n"
        "\n| other |\n|---|\n| ffa |\n"
    )
    assert list(hook.listed([page])) == ["- [New](new.md)"]
    (quoted,) = hook.rows_of("ffa", [page])
    assert quoted.startswith("[New](../results/new.md), at one rank:")
    assert "| 1 | `ffa` |" in quoted
    assert "fedex" not in quoted
    assert not list(hook.rows_of("fedavg", [page]))
    assert list(hook.rows_of("fedavg", hook.results()))


def test_the_site_asks_no_other_server_for_anything() -> None:
    assert SITE["theme"]["font"] is False
    assert not {"extra_javascript", "repo_url"} & SITE.keys()
    assert all((DOCS / sheet).exists() for sheet in SITE["extra_css"])
    assert SITE["strict"] is True
    for page in PAGES:
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(img|script|link|iframe)\b", page.read_text())
