"""What CONTRIBUTING promises of this code, read off the code itself."""

import ast
import io
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedlora.errors import FedLoraError
from fedlora.lora import tree_file
from fedlora.strategies import STRATEGIES
from tests.support.tiny_federation import ROOT

PACKAGES = ("fedlora", "server_app", "client_app")
SOURCES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted(p for d in ("benchmarks", "docs") for p in (ROOT / d).glob("*.py"))
TREES = {p: ast.parse(p.read_text(encoding="utf-8")) for p in SOURCES}
FORBIDDEN_NAMES = {
    "utils",
    "util",
    "common",
    "helper",
    "helpers",
    "manager",
    "misc",
    "core",
    "process",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that a tree imports at its top level; in functions they may wait."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for a in node.names:
                full = f"{node.module}.{a.name}"
                is_module = (ROOT / (full.replace(".", "/") + ".py")).exists()
                yield full if is_module else node.module


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def where(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_file_is_named_for_nothing() -> None:
    parts = {part for p in SOURCES for part in p.relative_to(ROOT).with_suffix("").parts}
    assert not parts & FORBIDDEN_NAMES


def test_no_two_classes_share_a_name() -> None:
    """But for the strategies' `State`, whose name is on disk."""
    classes = Counter(
        node.name
        for path, tree in TREES.items()
        if "fedlora" in path.relative_to(ROOT).parts
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, n in classes.items() if n > 1} == {"State"}


def test_every_room_stands_in_the_page_about_the_house() -> None:
    rooms = {p.stem for p in (ROOT / "fedlora").iterdir() if p.is_dir() or p.suffix == ".py"}
    text = (ROOT / "docs" / "internals.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
    assert rooms - {"__init__", "__pycache__"} == told


def test_every_room_has_its_tests() -> None:
    """A folder of fedlora/ has one of the same name in tests/, and this has no other."""
    rooms = {p.name for p in (ROOT / "fedlora").iterdir() if (p / "__init__.py").exists()}
    tested = {p.parent.name for p in (ROOT / "tests").glob("*/test_*.py")}
    assert tested - {"house"} == rooms


def test_strategies_know_tensors_only() -> None:
    allowed = {
        "torch",
        "fedlora",
        "math",
        "hashlib",
        "collections",
        "dataclasses",
        "typing",
        "functools",
        "itertools",
        "inspect",
        "difflib",
    }
    finds = {"registry.py": {"re", "importlib"}, "__init__.py": {"types"}}  # those of others
    for path, tree in TREES.items():
        if "strategies" in path.parts:
            found = {m.split(".")[0] for m in imports(tree)} - finds.get(path.name, set())
            assert found <= allowed, path.name


SEEDS = {
    "torch.manual_seed",
    "torch.default_generator.manual_seed",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
}
GLOBAL_DRAWS = ("random.random", "random.choice", "random.shuffle", "random.sample", "np.random.")


def test_the_global_generators_are_seeded_only_where_they_are_put_back() -> None:
    for path, tree in TREES.items():
        safe = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
            for inner in ast.walk(node)
        }
        for name, call in calls(tree):
            assert name not in SEEDS or id(call) in safe, where(path, call)


def test_nothing_is_drawn_from_a_global_generator() -> None:
    """But for a free port, which is not to be the same twice."""
    for path, tree in TREES.items():
        if "deploy" in path.parts:
            continue
        for name, call in calls(tree):
            own = name in ("np.random.default_rng", "np.random.Generator", "np.random.PCG64")
            assert own or not name.startswith(GLOBAL_DRAWS), where(path, call)
            if name in (
                "torch.randn",
                "torch.rand",
                "torch.randint",
                "torch.randperm",
                "torch.bernoulli",
                "torch.multinomial",
            ):
                given = {k.arg for k in call.keywords}
                assert "generator" in given, where(path, call)


def test_nothing_is_pickled() -> None:
    risky = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for path, tree in TREES.items():
        named = {
            a.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for a in node.names
        } | {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
        }
        assert not named & risky, path.name
        for name, call in calls(tree):
            assert name not in ("torch.load", "torch.save", "np.load", "numpy.load"), where(
                path, call
            )


def test_a_message_is_read_by_its_keys() -> None:
    """Flower's views of a record refer to it in a circle, which keeps a whole payload for long."""
    views = {"array_records", "config_records", "metric_records"}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Attribute) and node.attr in views), where(path, node)


class Bomb:
    """Leaves a trace where anything unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


CAUGHT = re.compile(r"(Error|Exception|Spent)\b")
JUDGES = {"startswith", "endswith", "find", "index", "count", "search", "match", "fullmatch"}


def errors_of(scope: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, where it is bound) of the errors caught in a tree or given to its functions."""
    for node in ast.walk(scope):
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for a in (*node.args.args, *node.args.kwonlyargs):
                if a.annotation and CAUGHT.search(ast.unparse(a.annotation)):
                    yield a.arg, node


def says(node: ast.AST, name: str, texts: set[str]) -> bool:
    """Is there the text of the error in it?"""
    for x in ast.walk(node):
        match x:
            case ast.Call(func=ast.Name(id="str" | "repr" | "format"), args=[ast.Name(id=n), *_]):
                if n == name:
                    return True
            case ast.FormattedValue(value=ast.Name(id=n)) if n == name:
                return True
            case ast.Attribute(value=ast.Name(id=n), attr="args") if n == name:
                return True
            case ast.Attribute(attr="reason") | ast.Subscript(slice=ast.Constant(value="reason")):
                return True
            case ast.Name(id=n) if n in texts:
                return True
    return False


def judged(tree: ast.AST) -> Iterator[ast.expr]:
    """Where the words of an error decide something: they are compared, searched or matched."""
    for name, scope in [*errors_of(tree), ("", tree)]:
        texts = {
            target.id
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign) and says(node.value, name, set())
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(scope):
            if isinstance(node, ast.Compare) and says(node, name, texts):
                yield node
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = [node.func.value, *node.args]
                if node.func.attr in JUDGES and any(says(x, name, texts) for x in given):
                    yield node


def test_the_words_of_an_error_decide_nothing() -> None:
    """Its type does, or the code that came with it: anybody can say anything."""
    for path, tree in TREES.items():
        found = [where(path, node) for node in judged(tree)]
        assert not found, f"the words of an error decide at {', '.join(found)}"


@pytest.mark.parametrize(
    "body",
    [
        "if 'spent' in str(e): pass",
        "if SPENT not in str(e): raise",
        "stop = f'{e}' == SPENT",
        "if str(e).startswith('spent'): pass",
        "if re.search('spent', str(e)): pass",
        "if e.args[0] == 'spent': pass",
        "said = str(e).lower()\n    if 'spent' in said: pass",
        "if 'spent' in reply.error.reason: pass",
        "if str(reply.error.reason).count('spent'): pass",
        "said = reply.error.reason\n    if 'spent' in said: pass",
        "done = all('spent' in f['reason'] for f in received.failures)",
    ],
)
def test_a_decision_by_the_words_of_an_error_is_seen(body: str) -> None:
    assert list(judged(ast.parse(f"try:\n    f()\nexcept E as e:\n    {body}\n")))


@pytest.mark.parametrize(
    "body",
    [
        "say(f'stopped: {e}')",
        "if isinstance(e, BudgetSpent): pass",
        "if e.errno == ENOSPC: pass",
        "if reply.error.code == SPENT: pass",
        "reason = str(e) or 'no reason given'",
        "if 'x' in found: say(str(e))",
    ],
)
def test_an_error_that_is_told_or_judged_by_its_type_is_not(body: str) -> None:
    assert not list(judged(ast.parse(f"try:\n    f()\nexcept E as e:\n    {body}\n")))


def test_no_loader_opens_a_pickle(tmp_path: Path) -> None:
    from fedlora.federation.client.memory import ClientMemory
    from fedlora.reports.run_files import read

    trace = tmp_path / "trace"
    zipped = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, zipped)
    for data in (pickle.dumps(Bomb(trace)), zipped.getvalue()):
        file = tmp_path / "file"
        file.write_bytes(data)
        with pytest.raises(FedLoraError):
            tree_file.load(file)
        memory = ClientMemory(tmp_path, 0, "run")
        memory.own.mkdir(parents=True, exist_ok=True)
        (memory.own / "round-00001.safetensors").write_bytes(data)
        with pytest.raises(FedLoraError):
            memory.recall(1)
        (tmp_path / "rounds.jsonl").write_bytes(data + b"\n{}\n")
        with pytest.raises((FedLoraError, KeyError)):
            read(tmp_path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # the bomb does go off where it is unpickled


def test_a_strategys_name_is_compared_nowhere() -> None:
    """One dict names them; what else depends on a strategy asks the strategy."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                flat = [
                    e
                    for s in sides
                    for e in (s.elts if isinstance(s, ast.Tuple | ast.List | ast.Set) else [s])
                ]
                named = {e.value for e in flat if isinstance(e, ast.Constant)} & set(STRATEGIES)
                assert not named, f"{where(path, node)} compares with {named}"
            if isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
                assert node.value.value not in STRATEGIES, f"{path.name}:{node.lineno}"


def asked_beyond_its_protocol(text: str) -> Iterator[int]:
    """Lines that ask a strategy for an attribute it need not have, or silence mypy about one."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[of, *_]):
                if ast.unparse(of).split(".")[-1].lower() == "strategy":
                    yield node.lineno
    for n, line in enumerate(text.splitlines(), 1):
        if "strategy" in line.lower() and "type: ignore[attr-" + "defined]" in line:
            yield n


def test_a_strategy_has_no_undeclared_switches() -> None:
    """`needs()` says what it asks for, and strategies/base.py declares each method."""
    texts = {p: p.read_text(encoding="utf-8") for p in [*SOURCES, *TESTS, *SCRIPTS]}
    found = {p: [*asked_beyond_its_protocol(t)] for p, t in texts.items() if "attr" in t}
    assert not {p: asked for p, asked in found.items() if asked}


def test_an_undeclared_switch_is_seen() -> None:
    silenced = "setting.strategy.finish(x)  # type: ignore[attr-" + "defined]"
    for text in ('getattr(strategy, "x", 0)', 'hasattr(self.strategy, "x")', silenced):
        assert list(asked_beyond_its_protocol(text))


def test_source_is_ascii() -> None:
    lines = [
        (path, n, line)
        for path in [*SOURCES, *TESTS]
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]
    assert not [(path, n) for path, n, line in lines if not line.isascii()]


def test_a_module_says_what_it_is_and_stays_short() -> None:
    longest = {"fedlora.federation.server.loop": 560}  # the round in one place
    for path, tree in TREES.items():
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(tree), f"{path}: a docstring on top"
        assert len(text.splitlines()) <= longest.get(name_of(path), 400), path


def test_a_function_fits_on_one_screen() -> None:
    for path, tree in TREES.items():
        for f in functions(tree):
            length = (f.end_lineno or f.lineno) - f.lineno + 1
            assert length <= 60, f"{where(path, f)} {f.name}: {length} lines"


def test_public_functions_say_their_result() -> None:
    """Module-level ones of more than a few lines; what is two lines long says it itself."""
    for path, tree in TREES.items():
        for f in ast.iter_child_nodes(tree):
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"):
                length = (f.end_lineno or f.lineno) - f.lineno + 1
                assert length <= 8 or ast.get_docstring(f), f"{where(path, f)} {f.name}"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategys_file_begins_with_its_paper(name: str) -> None:
    module = STRATEGIES[name].__module__
    doc = ast.get_docstring(TREES[ROOT / (module.replace(".", "/") + ".py")]) or ""
    assert "https://arxiv.org/abs/" in doc or "https://openreview.net/" in doc
    assert "Differs from the paper" in doc
    assert "Deviation from (E)" in doc
    assert "Costs" in doc
