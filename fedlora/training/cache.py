"""The model and the data that a process loads once and all its clients share."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.config.reader import Config
from fedlora.strategies.forms import fixed_rank
from fedlora.training.data.batches import Encoded
from fedlora.training.data.corpus import ClientRows, Corpus, load_node
from fedlora.training.data.corpus import load as load_corpus
from fedlora.training.devices import chosen, prepare, release
from fedlora.training.model.decoder import as_read
from fedlora.training.model.layers import places_of
from fedlora.training.model.model import Model
from fedlora.training.model.own_tuner import place
from fedlora.training.model.start_adapter import stamp
from fedlora.training.packing_check import check_packing
from fedlora.training.quiet import quiet_libraries
from fedlora.training.references import referred
from fedlora.training.tasks import task_of
from fedlora.training.user_code import identity


class _Once:
    """The last result of a costly call, kept while its key stays the same."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make, self.key, self.value = make, None, None

    def __call__(self, key: Any, *args: Any) -> Any:
        if self.key != key:
            self.key = self.value = None  # let go of the old one before the new one is made
            self.value, self.key = self.make(*args), key
        return self.value


def _load_model(config: Config, labels: tuple[str, ...]) -> Model:
    quiet_libraries()  # whichever process this is: what they would say, no user can act on
    found = Model(config, labels)
    if config.train.packing:
        check_packing(found)
    return found


_model = _Once(_load_model)
_corpus = _Once(load_corpus)
_node = _Once(load_node)


def model(config: Config, labels: tuple[str, ...]) -> Model:
    """The process's model: loaded at first use, shared by all its clients and the server."""
    key = _key(config, labels)
    prepare(chosen(config.simulate.devices), config.train.deterministic)  # before it is loaded:
    found: Model = _model(key, config, labels)  # what wraps a base may compute with it already
    return found


def _key(config: Config, labels: tuple[str, ...]) -> Any:
    """Of all that decides what a model is."""
    return (config.model, config.lora, config.run.seed, config.train.gradient_checkpointing,
            config.train.prefix_cache, config.train.packing, labels, config.ranks.policy,
            identity(config), config.simulate.devices, config.train.compile,
            fixed_rank(config.lora.form, config.clients.ranks), stamp(config.model))  # fmt: skip


def placed(model: Model, config: Config, labels: tuple[str, ...]) -> None:
    """Let this model train at the config's lora.places. The process's own then is the config's."""
    place(model, config, places_of(config))
    if _model.value is model:
        _model.key = _key(config, labels)


def loaded() -> Model | None:
    """The process's model, where it has one now."""
    found: Model | None = _model.value
    return found


def forget_model() -> None:
    """Let go of the model and give its device's memory back; who asks for it next loads it anew.

    What a driver keeps for a process that has computed on its card stays until the process ends.
    """
    if (held := loaded()) is None:
        return
    devices = held.devices
    del held
    _model.key = _model.value = None
    gc.collect()  # modules and their hooks hold each other
    for device in devices:
        release(device)


def corpus(config: Config) -> Corpus:
    """The simulated federation's data, split as the config says."""
    key = (config.data, task_of(config.model.task), config.clients.count, config.run.seed,
           config.privacy.by_example)  # fmt: skip
    found: Corpus = _corpus((*key, identity(config)), *key)
    return found


CENTRAL = {"central": "test", "central validation": "validation"}
"""The server's own rows, and what a corpus calls them."""


@functools.lru_cache(maxsize=4096)
def encoded(part: str, client: int, config: Config, labels: tuple[str, ...]) -> Encoded:
    """Token ids of a client's "train", "test" or "validation" rows, or of the "central" test rows
    or the "central validation" rows."""
    if part in CENTRAL:
        rows = getattr(corpus(config), CENTRAL[part])
    else:
        rows = getattr(client_rows(client, config, labels), part)
    loaded = model(config, labels)
    longest = loaded.longest(config.data.max_length)
    found = loaded.task.encode(rows, loaded.tokenizer, labels, config.data, longest)
    return referred(loaded, as_read(loaded, found), config, _kept(part, config))


def _kept(part: str, config: Config) -> Path | None:
    """Where what is computed once of these rows is kept: the server's, or the clients' own. Nowhere
    before there is a run."""
    run, own = Path(config.run.out, config.run.name), config.output.client_memory
    if own and part not in CENTRAL:
        return Path(own)
    return (run if part in CENTRAL else run / "clients") if run.exists() else None


def client_rows(client: int, config: Config, labels: tuple[str, ...]) -> ClientRows:
    """This client's rows, without those of units that have withdrawn."""
    found, gone = all_client_rows(client, config, labels), config.data.withdrawn
    return ClientRows(*(part.without(gone) for part in found.parts))


def all_client_rows(client: int, config: Config, labels: tuple[str, ...]) -> ClientRows:
    """Its part of the simulated federation, or its node's own file; whoever has withdrawn."""
    if config.data.node_path:
        key = (config.data, task_of(config.model.task), labels, config.run.seed, client,
               config.privacy.by_example)  # fmt: skip
        found: ClientRows = _node((*key, identity(config)), *key)
        return found
    return corpus(config).client(client)


def forget_data() -> None:
    """Read the data anew when it is next asked for: files may have changed since."""
    encoded.cache_clear()
    for once in (_corpus, _node):
        once.key = once.value = None
