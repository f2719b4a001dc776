"""A run that goes on beyond the end it had: `fedlora simulate --resume RUN --rounds N`.

A checkpoint is of the state before the finishing steps (what clients kept is collected, scores are
taken, the adapter is written), which change no checkpoint. So an extension resumes the last one,
under a config that says where the end was: `run.extended`. The summary of an earlier end stays,

    summary-00002.json     of the end after round 2

and the finishing steps run again at the new end.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config.reader import Config
from fedlora.training.schedule import learning_rate

ROUNDS, EXTENDED = "run.rounds", "run.extended"


def before_extension(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config must have been for a run of this one: `now`, or what it extends.

    So only a config that names the end of `was` as the place where it was extended may have more
    rounds.
    """
    old, new = (str(x.get(EXTENDED, "")).replace(" ", "") for x in (was, now))
    named = {f"{old},".lstrip(",") + f"{was.get(ROUNDS)}:{how}" for how in ("restart", "hold")}
    if any(f"{new},".startswith(f"{x},") for x in named):
        return {**now, ROUNDS: was.get(ROUNDS), EXTENDED: was.get(EXTENDED, "")}
    return dict(now)


def more_rounds_change_nothing(config: Config) -> bool:
    """Are the first rounds of a longer run those of a shorter one, whatever run.rounds is?"""
    train, privacy = config.train, config.privacy
    scheduled = train.follows_rounds or train.rule in ("coto", "dylora")
    return not scheduled and not (privacy.epsilon and not privacy.noise_multiplier)


def put_away(directory: Path, rounds: int) -> None:
    """Keep the summary of an earlier end beside the place of the new one's."""
    path = directory / "summary.json"
    try:
        ended = json.loads(path.read_bytes())["rounds"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    if isinstance(ended, int) and ended < rounds:
        os.replace(path, directory / f"summary-{ended:05}.json")


def told(config: Config, done: int) -> list[str]:
    """What a run that goes on from the end it had says of it."""
    if not config.run.extended or not config.run.extended[-1].startswith(f"{done}:"):
        return []
    end, _, how = config.run.extended[-1].partition(":")
    added = config.run.rounds - int(end)
    held = "stay as they were in the last round" if how == "hold" else "begin anew over these"
    rate = f"train.lr is {learning_rate(config, done + 1):g} in round {done + 1}"
    by_step = "each step has a rate of its own"
    return [
        f"extended after round {end} by {added}, to round {config.run.rounds}; its schedules "
        f"{held}: {rate if config.train.lr_per == 'round' else by_step}"
    ]
