"""What a run chooses by: scores on validation rows, never on test rows.

The central validation rows are scored after every round, round 0 included, whatever evaluate.every
says of the test rows.
"""

from fedlora.federation.server.run import Setting, score


def validated(setting: Setting, number: int) -> dict[str, float] | None:
    """The loaded model on the central validation rows; None where there are none.

    Where clients keep a part to themselves there is no one model to score after a round.
    """
    if not len(setting.corpus.validation) or (number and setting.guarantee == "shared"):
        return None
    return score(setting, "central validation")
