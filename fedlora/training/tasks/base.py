"""What a task is: how rows become examples, what an example's loss is, and how a model is scored.

One task is one file. A task is a frozen dataclass without fields; it shares by functions, not by
inheritance. It knows rows, tokens and a model's outputs, and nothing of rounds, strategies,
privacy or cards:

    columns of a table -> Columns -> Rows -> Encoded -> Batch -> losses (b,) -> scores by name

Guarantees that tests hold every task to (tests/training/test_every_task.py)
    the loss of a batch is `defined`, row by row, in float64
    an example's loss does not depend on what else is in its batch, nor on the padding's side
    a score of all rows is the same however they are split into batches
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.training.data.batches import SYNTHETIC, Batch, Encoded
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.reading import Columns as Columns
from fedlora.training.data.reading import Needed as Needed
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table

Scores = Mapping[str, float]
"""Numbers by name."""

Features = Callable[[Rows], Tensor]
"""What the frozen model's head sees of each row, (n, width): `features.frozen_features`."""


class Net(Protocol):
    """What a task asks of a model: `fedlora.training.model.model.Model`."""

    config: Config
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    peft: Any

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """What it makes of a batch, in float32, on its device."""
        ...

    def run(self, **inputs: Any) -> Any:
        """One forward pass, and what the model's `forward` gives."""
        ...


@runtime_checkable
class Task(Protocol):
    """The parts of a task, in the order in which they are asked for."""

    name: str
    """model.task, in small letters with hyphens."""
    auto: str
    """transformers' class that loads the model, "AutoModelForCausalLM"."""
    what: str
    """What such a model is called in a message, "sequence classifier"."""
    peft: str
    """PEFT's name of the task in an adapter's files, "SEQ_CLS"; "" where it has none."""
    hub: str
    """The Hub's name of it in a model card, "text-classification"; "" where it has none."""
    headed: bool
    """Is what lies on top of the pretrained body trained whole?"""
    pooled: bool
    """Does one output stand for a whole text, so that model.pooling = "mean" can make it?"""
    generates: bool
    """Does the model write text, and so learns where to end?"""
    answers: bool
    """Are answers generated to be scored, so that evaluate.generate-tokens counts?"""
    pictured: bool
    """Is a row a picture? Then an image processor stands where a tokenizer does."""
    shifted: bool
    """Is each token's label said by the output one place before it? Then the first has none."""

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        """The columns that the task takes of a table, with data.map's values renamed.

        Raises:
            DataError: the table lacks one, or a cell is not what it must be; says which.
        """
        ...

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        """The names to choose from, in order; none where it chooses from no names."""
        ...

    def names(self, rows: Rows) -> Sequence[str]:
        """Those names that the rows have, each as often as they have it."""
        ...

    def mapped(self, rows: Rows) -> Sequence[str]:
        """The values that data.map renames, after it did."""
        ...

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        """The columns of a table, by their names, of which `read` makes these rows."""
        ...

    def encode(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        """Rows as examples of at most `longest` tokens; rows that cannot be are left out, counted.

        Raises:
            DataError: no row can be an example.
        """
        ...

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        """Examples of random tokens of these lengths, nobody's rows: `batches.synthetic`."""
        ...

    def losses(self, net: Net, batch: Batch) -> Tensor:
        """Each example's loss, (b,), in float32, on the net's device; within its precision."""
        ...

    def defined(self, net: Net, batch: Batch) -> Tensor:
        """The same by the definition, (b,), in float64 on the host: slowly, example by example.

        Shares no code with `losses`.
        """
        ...

    def scored(self, encoded: Encoded) -> Tensor:
        """How many numbers each example's loss is a mean of, (n,)."""
        ...

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        """The task's metrics over all the rows; generate: those of generated answers too."""
        ...

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        """What a federated model must beat, by name; features: None where there is no head."""
        ...

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        """What transformers is told as it loads the model: the number and names of labels."""
        ...

    def script(self, data: DataConfig, end: int | None) -> str:
        """Lines of Python that use an export, behind those that load it: model/load_script.py.

        On texts as `data` says that they are: single, in pairs, or conversations. end: the token
        that ends an answer.
        """
        ...


@runtime_checkable
class Referring(Protocol):
    """A task whose loss compares with the untouched model: training/references.py."""

    def refer(self, net: Net, batch: Batch) -> Tensor:
        """What the untouched model makes of each example, (b, n), float32, on the host: it comes
        back as batch["reference"]."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A task of which a report shows more than scores: tasks/parts.py says what."""

    def parts(self, net: Net, rows: Encoded, config: Config) -> Mapping[str, Any]:
        """What the model makes of the rows, in plain values for JSON; keys that `parts.py` does
        not name are kept and not shown."""
        ...
