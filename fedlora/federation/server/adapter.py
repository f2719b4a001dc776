"""The run's own adapter/, limited in size, and the model card of any directory with its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.lora.adapter import Adapter, Factors
from fedlora.lora.lowrank import stack
from fedlora.reports.model_card import CardFacts, card
from fedlora.reports.run_files import read
from fedlora.training.data.seam import end_mark
from fedlora.training.model.load_script import base_of, load_script
from fedlora.training.model.model import Model
from fedlora.training.model.peft_directory import fitted

LIMIT = 64 * 2**20
"""Bytes up to which adapter/ is exact. A longer run's stacked changes may hold more numbers than
the weights that they change; past the limit no module's may."""


def limited(adapter: Adapter, limit: int = LIMIT) -> tuple[Adapter, float]:
    """The adapter, or past the limit the nearest one that is no larger than the dense weights.

    A module (d, k) has at most the rank d k / (d + k) then. And the relative error of that.
    """
    if 4 * sum(p.numel() for p in adapter.values()) <= limit:
        return adapter, 0.0
    sizes: Mapping[str, tuple[int, int]] = {m: p.shape for m, p in adapter.items()}
    return fitted(adapter, {m: max(1, d * k // (d + k)) for m, (d, k) in sizes.items()})


def hold(model: Model, adapter: Adapter, factors: Factors) -> None:
    """Load the base that was named with this adapter, and what else was trained, into the model.

    What the run started from is in the model's base: so less that. Modules that it alone adapts
    stay as they are.
    """
    model.rebase("an adapter alone", ())
    start = model.start.pairs
    adapter = {m: stack([p, start[m]], [1.0, -1.0]) if m in start else p
               for m, p in adapter.items() if m in model.shapes}  # fmt: skip
    model.load(
        Factors(
            {m: p.scale for m, p in adapter.items()},
            {m: p.A for m, p in adapter.items()},
            {m: p.B for m, p in adapter.items()},
            other=factors.other,
        )
    )


def write_card(
    run: Path,
    directory: Path,
    model: Model,
    checked: Sequence[str],
    merged: bool = False,
    client: int | None = None,
) -> None:
    """Write the README.md of a directory that holds the run's model: its model card.

    checked: sentences on how it was checked, with the figures.
    """
    config = model.config
    mark = end_mark(model.tokenizer, config.data.chats) if not model.labels else None
    script, use = load_script(config, model.labels, merged, mark)
    facts = CardFacts(
        base=base_of(config),
        merged=merged,
        labels=model.labels,
        load=script,
        use=use,
        checked=checked,
        end="" if mark is None else str(model.tokenizer.convert_ids_to_tokens(mark)),
        client=client,
    )
    (directory / "README.md").write_text(card(read(run), facts), "utf-8")


def checked(truncation: float, excess: float | None) -> list[str]:
    """What a card says of a change that was cut, and of its modules: see `certified`."""
    cut = f"It is cut to a lower rank: {truncation:.2%} of the change (Frobenius norm) is left out."
    told = [cut] if truncation else []
    if excess is None:
        return [*told, "It was not loaded again: there was no memory for a second base."]
    whose = "those of the model that was cut" if truncation else "the federated model's"
    return [
        *told,
        "It was loaded by plain libraries, and its modules' outputs on the certificate's inputs "
        f"are {whose}, within {excess:.2g} of what rounding explains (above 1 would be an error).",
    ]
