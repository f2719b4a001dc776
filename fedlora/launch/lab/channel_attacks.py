"""The lab's attacks on what goes beside an update: the secure sum's messages, the certificate."""

import torch

from fedlora.launch.lab import secure_server
from fedlora.launch.lab.attacks import FAILS, HOLDS, one_round, rows_of
from fedlora.launch.lab.leaks import played
from fedlora.launch.lab.plan import Lab, Row
from fedlora.launch.lab.seat import Seat
from fedlora.privacy.training import PrivacyPlan


def secure(_: Lab, story: str, helpers: int) -> Row:
    """Does a server that tells this story read one client of a secure sum?"""
    found, expected = secure_server.read(story, helpers), (story, helpers) in secure_server.BROKEN
    said = {True: "yes", False: "no"}
    verdict = HOLDS if found == expected else FAILS
    return {"one client is read": said[found], "must be": said[expected], "verdict": verdict}


def leaks(lab: Lab, fields: str) -> Row:
    """Do these fields say whether one row was there?"""
    n, trials = lab.size.rows[0], lab.size.games
    private = lab.at(lab.strategies[0], min(e for e in lab.epsilons if e))
    rows = rows_of(lab, 4 * n + 1)
    sigma = PrivacyPlan.of(private, max(n, 2)).sigma
    seat = Seat(lab.at(lab.strategies[0], 0.0), 3)
    parts = [rows.select(x) for x in torch.arange(4 * n).split(n)]
    seat.warm(parts[:3])
    changes = {"privacy.sample-rate": 1.0, "train.steps": 1, "train.grad-clip": 0.0}
    noise = {"privacy.noise-multiplier": 1e-6 if fields == "planted" else sigma}
    config = one_round(private, n, {**changes, **noise})
    more = rows.select(torch.tensor([4 * n]))
    found = played(seat, config, fields, parts[3], more, trials)
    seen = {True: "yes", False: "no"}
    expected = fields == "planted"
    verdict = HOLDS if found.seen == expected else FAILS
    return {"rows": n, "trials": trials, "advantage": found.value, "+-": found.half,
            "seen": seen[found.seen], "must be": seen[expected], "verdict": verdict}  # fmt: skip
