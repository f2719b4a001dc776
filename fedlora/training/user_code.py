"""The user's own model, tokenizer, data, loss and metrics: functions that the config names.

    model.path        "py:mine:make_model"    make_model(labels) -> nn.Module
    model.tokenizer   "py:mine:make_tok"      make_tok() -> a transformers tokenizer
    data.path         "py:mine:rows"          rows(client) -> datasets.Dataset; None: test rows
    train.loss        "py:mine:my_loss"       my_loss(logits, labels) -> losses, (examples,)
    evaluate.metrics  "py:mine:my_scores"     my_scores(predicted, wanted) -> {"name": 0.5}

A name is "py:package.module:function", so that forked, spawned and deployed processes find the
same one. Where the server's source of a function is not the client's, the client refuses, and so
does a run that is resumed. A node runs only what its own app, or its node config, names.

An object without a name (a model that is there, a lambda) is known to this process alone: fit for
a simulation with one worker, on the CPU.
"""

import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import ConfigError, FedLoraError

if TYPE_CHECKING:  # a client app imports this, and nothing heavy
    from fedlora.config.reader import Config

PREFIX = "py:"
LIVE = "live"
"""In a module's place: the object is one of this process."""

KEYS = ("model.path", "model.tokenizer", "data.path", "train.loss", "evaluate.metrics")
"""The keys that may name code. A node's data.node-path may as well, and is its own affair."""

_live: dict[str, Any] = {}


def is_code(value: str) -> bool:
    """Does a config's value name code?"""
    return value.startswith(PREFIX)


def name_of(x: Any) -> str:
    """What a config says for a function of a module, its name, or an object that is there.

    Raises:
        ConfigError: a text that is no "package.module:function".
    """
    if isinstance(x, str):
        module, _, name = x.removeprefix(PREFIX).partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise ConfigError([f'{x!r}: must be "package.module:function"'])
        return f"{PREFIX}{module}:{name}"
    module, name = getattr(x, "__module__", ""), getattr(x, "__qualname__", "")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is x:
        return f"{PREFIX}{module}:{name}"
    key = f"{getattr(x, '__name__', type(x).__name__).strip('<>')}-{id(x):x}"
    _live[key] = x  # kept, so that no other object gets its id
    return f"{PREFIX}{LIVE}:{key}"


def is_live(value: str) -> bool:
    """Does it name an object that only this process has?"""
    return value.startswith(f"{PREFIX}{LIVE}:")


def find(key: str, value: str) -> Any:
    """The function that the config's `key` names; the live object itself.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    module, _, name = value.removeprefix(PREFIX).partition(":")
    if module == LIVE:
        if name not in _live:
            raise ConfigError([f"{key}: this object is in another process; {INSTEAD}"])
        return _live[name]
    found = _imported(key, value, module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError([f"{key} = {value!r}: module {module} has no function {name}"])
    return found


INSTEAD = 'name a function of a module that returns it: "package.module:function"'


def _imported(key: str, value: str, module: str) -> Any:
    """The module, from where Python looks or from the working directory."""
    path, here = list(sys.path), str(Path.cwd())
    if here not in path and "" not in path:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        why = f"there is no module {e.name}, from {here} and PYTHONPATH"
        raise ConfigError([f"{key} = {value!r}: {why}"]) from e
    except Exception as e:
        why = f"importing {module} fails: {type(e).__name__}: {e}"
        raise ConfigError([f"{key} = {value!r}: {why}"]) from e
    finally:
        sys.path[:] = path


def called(key: str, value: str, kind: type | tuple[type, ...], *args: Any) -> Any:
    """What the function returns; the live object itself where it is of that kind already.

    Raises:
        ConfigError: it cannot be found, fails, or returns something else.
    """
    function = find(key, value)
    if is_live(value) and isinstance(function, kind):
        return function
    try:
        found = function(*args)
    except FedLoraError:
        raise
    except Exception as e:
        where = inspect.getsourcefile(inspect.unwrap(function)) or "?"
        why = f"it fails: {type(e).__name__}: {e} (in {where})"
        raise ConfigError([f"{key} = {value!r}: {why}"]) from e
    if not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        must = " or ".join(k.__name__ for k in kinds)
        raise ConfigError([f"{key} = {value!r}: it gives a {type(found).__name__}, must be {must}"])
    return found


def named(config: "Config") -> Iterator[tuple[str, str]]:
    """(key, value) of what of this config names code."""
    for key in KEYS:
        found = attrgetter(key)(config)
        values = found if isinstance(found, tuple) else (str(found),)
        yield from ((key, value) for value in values if is_code(value))


def sources(config: "Config") -> Mapping[str, str]:
    """Key to a digest of the source of the code that it names: of its whole file.

    Of a notebook's function it is the function's own text; of a live object its name.
    """
    return {key: _digest(value, find(key, value)) for key, value in named(config)}


def identity(config: "Config") -> str:
    """One digest of all that the config names and of its sources; "" where it names none."""
    found = [(key, value, _digest(value, find(key, value))) for key, value in named(config)]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else ""


def _digest(value: str, function: Callable[..., Any]) -> str:
    return hashlib.sha256(value.encode() if is_live(value) else _source(function)).hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _source(function: Callable[..., Any]) -> bytes:
    """Read once of each function: a file that is edited under a run changes no run."""
    try:
        path = inspect.getsourcefile(function)
        if path and Path(path).is_file():
            return Path(path).read_bytes()
        return inspect.getsource(function).encode()
    except (OSError, TypeError):  # a built-in, or typed in at a prompt
        return f"{function.__module__}:{function.__qualname__}".encode()
