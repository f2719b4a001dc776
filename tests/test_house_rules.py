"""What CONTRIBUTING promises of this code, read off the code itself."""

import ast
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_federation import ROOT

from fedlora import checkpoint
from fedlora.errors import FedLoraError
from fedlora.strategies import STRATEGIES

PACKAGES = ("fedlora", "server_app", "client_app", "simulations")
SOURCES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
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

# Which modules may import which: each only from its own level's names or from those below.
LEVELS = (
    ("fedlora.errors", "fedlora.units"),
    ("fedlora.adapter",),
    ("fedlora.lowrank",),
    ("fedlora.strategies",),
    ("fedlora",),
    ("server_app", "client_app"),
    ("simulations", "fedlora.cli"),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module: str) -> int:
    """The level of the longest name in LEVELS that the module lies under."""
    found = [
        (len(name), n)
        for n, names in enumerate(LEVELS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(found)[1]


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


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    mine = level(name_of(path))
    upward = [m for m in imports(TREES[path]) if m.split(".")[0] in PACKAGES and level(m) > mine]
    assert not upward, f"{name_of(path)} imports {upward} from above"


def test_no_two_modules_import_each_other() -> None:
    graph = {
        name_of(p): {m for m in imports(t) if m.split(".")[0] in PACKAGES} for p, t in TREES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph.get(module, set()) - {module}:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


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
    }
    for path, tree in TREES.items():
        if "strategies" in path.parts:
            assert {m.split(".")[0] for m in imports(tree)} <= allowed, path.name


SEEDS = {"torch.manual_seed", "random.seed", "np.random.seed", "numpy.random.seed"}
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


class Bomb:
    """Leaves a trace where anything unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_no_loader_opens_a_pickle(tmp_path: Path) -> None:
    from fedlora.memory import ClientMemory
    from fedlora.run_files import read

    trace = tmp_path / "trace"
    zipped = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, zipped)
    for data in (pickle.dumps(Bomb(trace)), zipped.getvalue()):
        file = tmp_path / "file"
        file.write_bytes(data)
        with pytest.raises(FedLoraError):
            checkpoint.load(file)
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


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda p: p.name)
def test_source_is_ascii(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    odd = [(n, c) for n, line in enumerate(text.splitlines(), 1) for c in line if ord(c) > 127]
    assert not odd, odd[:3]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_says_what_it_is_and_stays_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(TREES[path]), "a docstring on top"
    longest = {"fedlora.server": 560}  # the round in one place
    assert len(text.splitlines()) <= longest.get(name_of(path), 400)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_fits_on_one_screen(path: Path) -> None:
    for f in functions(TREES[path]):
        length = (f.end_lineno or f.lineno) - f.lineno + 1
        assert length <= 60, f"{where(path, f)} {f.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_functions_say_their_result(path: Path) -> None:
    """Module-level ones of more than a few lines; what is two lines long says it itself."""
    for f in ast.iter_child_nodes(TREES[path]):
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
