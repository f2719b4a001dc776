"""The keys of how a run ends; the others are in sections.py."""

from typing import Annotated

from pydantic import Field

from fedlora.config.fields import Section


class StopConfig(Section):
    """How a run ends, by validation rows: the central ones, or where there are none the clients'
    own, of which the clients' median counts. Round 0 counts as any other."""

    patience: Annotated[int, Field(ge=0)] = 0
    """The run ends after so many rounds in a row without a better score; 0: it has run.rounds."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Better is better by more than this."""
    metric: Annotated[str, Field(pattern=r"^([+-]?[A-Za-z0-9_./ -]{1,80})?$")] = ""
    """The score's name: "loss", "accuracy"; of another than those a run is judged by with a sign,
    "-mae" where less is better, "+mcc" where more is. Empty: what the run is judged by."""
    best: bool = False
    """The run's result (its final scores, adapter/ and what is exported) is the model of its best
    round, not of its last."""

    @property
    def on(self) -> bool:
        return bool(self.patience or self.best)
