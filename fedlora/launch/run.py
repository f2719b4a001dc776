"""A run's directory as an object: its figures as tables, its model ready to use."""

import tempfile
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config.reader import Config
from fedlora.launch.experiment_file import of_run
from fedlora.reports.run_files import RunFiles, read

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    from torch import Tensor

    from fedlora.launch.export import Exported


class Run:
    """One run, finished or cut short, as it lies on disk.

    >>> from fedlora import Run
    >>> run = Run("runs/taste")
    >>> run
    Run('runs/taste': fedex, 2 rounds, accuracy ...)
    >>> list(run.rounds[["round", "evaluation.accuracy"]].columns)
    ['round', 'evaluation.accuracy']
    >>> sorted(run.clients["client"])
    [0, 1]
    >>> run.summary["strategy"]
    'fedex'
    >>> run.config.run.rounds
    2
    """

    def __init__(self, directory: Path | str) -> None:
        """
        Raises:
            FedLoraError: there is no run in the directory.
        """
        self.directory = Path(directory)
        self._read()

    def _read(self) -> RunFiles:
        """Anew each time: the run may still be going."""
        return read(self.directory)

    def __repr__(self) -> str:
        told = ", ".join(value for _, value in _told(self._read()))
        return f"Run({str(self.directory)!r}: {told})"

    def _repr_html_(self) -> str:
        """For notebooks: the same, and the warnings of a run that did not go well."""
        files = self._read()
        lines = [("run", str(self.directory)), *_told(files)]
        lines += [("warning", why) for why in files.summary["warnings"]]
        rows = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in lines)
        return f"<table>{''.join(rows)}</table>"

    @property
    def config(self) -> Config:
        """What the run was started with."""
        at = self.directory
        at = at.resolve() if at.name in ("", "..") else at
        return of_run(at / "config.toml", {"run.out": str(at.parent), "run.name": at.name})

    @property
    def rounds(self) -> "pandas.DataFrame":
        """One row a round, 0 being the model before any training; columns as in rounds.jsonl, those
        of a table within it with a dot: "evaluation.accuracy", "bytes.up"."""
        return _table(dict(_columns(r, skip=("clients",))) for r in self._read().rounds)

    @property
    def clients(self) -> "pandas.DataFrame":
        """One row a client, with columns as in clients.jsonl: "rank", "final.accuracy"."""
        return _table(dict(_columns(c)) for c in self._read().clients)

    @property
    def summary(self) -> Mapping[str, Any]:
        """What summary.json holds; of a run that was cut short, what its rounds say of it."""
        return self._read().summary

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names of a classifier, in the order of its logits."""
        from fedlora.training import cache

        return cache.corpus(self.config).labels

    def adapter(self) -> "dict[str, Tensor]":
        """The whole change of the model as one LoRA adapter, under PEFT's names.

        >>> from fedlora import open_run
        >>> [name for name in open_run("runs/taste").adapter() if "lora_A" in name][0]
        'base_model.model....lora_A.weight'
        """
        from safetensors.torch import load_file

        with self._exported() as directory:
            tensors: dict[str, Tensor] = load_file(Path(directory) / "adapter_model.safetensors")
            return tensors

    def model(self) -> Any:
        """The fine-tuned model in evaluation mode, as transformers and PEFT load it.

        >>> from fedlora import open_run
        >>> run = open_run("runs/taste")
        >>> batch = run.tokenizer()(["What is love?"], return_tensors="pt")
        >>> run.model()(**batch).logits.shape
        torch.Size([1, 6])
        """
        from fedlora.training.export_certificate import load_exported

        with self._exported() as directory:
            return load_exported(self.config, self.labels, Path(directory), merged=False)

    def tokenizer(self) -> Any:
        """The tokenizer that goes with `model`."""
        from fedlora.training.model.loading import load_tokenizer

        return load_tokenizer(self.config.model)

    def _exported(self) -> Any:
        """The model of the last checkpoint as a PEFT directory, compared with it: temporary."""
        from fedlora.launch.export import export_run

        made = tempfile.TemporaryDirectory(prefix="fedlora-")
        export_run(self.directory, Path(made.name), fresh=False)
        return made


def open_run(directory: Path | str) -> Run:
    """The run in this directory.

    >>> from fedlora import open_run
    >>> open_run("runs/taste").directory.name
    'taste'

    Raises:
        FedLoraError: there is none; says what a run's directory has.
    """
    return Run(directory)


def export(
    run: Run | Path | str,
    out: Path | str,
    merged: bool = False,
    rank: int = 0,
    client: int | None = None,
    target: str = "",
) -> "Exported":
    """Write a run's model to `out`: as a PEFT adapter, or merged into the base.

    merged: the whole model, which needs no PEFT. rank: cut the adapter to it; 0: all of it.
    client: that client's own model, where a strategy leaves parts with the clients. target: who is
    to load it, "peft", "vllm", "llama.cpp" or "merged"; see docs/use/hand-over.md.

    >>> from fedlora import export
    >>> export("runs/taste", "out").deviation < 1e-3
    True

    Raises:
        CheckpointError: the run has no checkpoint.
        ModelError: the target cannot load such a model, `out` holds something else, or what was
            written does not compute what the federated model does: then nothing is written.
    """
    from fedlora.launch.export import export_run

    directory = run.directory if isinstance(run, Run) else Path(run)
    return export_run(directory, Path(out), merged, rank, client, target)


def _told(files: RunFiles) -> Iterator[tuple[str, str]]:
    """(what, value) of a run in a few words: strategy, rounds, final score, whether it ended."""
    yield "strategy", files.summary["strategy"]
    n = files.summary["rounds"]
    yield "rounds", f"{n} round{'' if n == 1 else 's'}"
    key = files.metric.key
    score = (files.summary.get("final") or {}).get(key)
    if isinstance(score, float):
        yield "final", f"{key} {score:.3f}"
    if not files.complete:
        yield "state", "not finished"


def _columns(
    record: Mapping[str, Any], before: str = "", skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """(column, value): a table within the record gives a column for each of its own."""
    for key, value in record.items():
        if key in skip:
            continue
        if isinstance(value, Mapping):
            yield from _columns(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _table(rows: Iterator[dict[str, Any]]) -> "pandas.DataFrame":
    """A frame of rows. Where a row has null for what is a table in others, it has those columns."""
    import pandas

    frame = pandas.DataFrame(list(rows))
    tables = {c[:i] for c in frame.columns for i, x in enumerate(c) if x == "."}
    return frame.drop(columns=[c for c in frame.columns if c in tables and frame[c].isna().all()])
