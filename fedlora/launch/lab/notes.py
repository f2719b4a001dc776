"""What the report says of attacks whose rows it shows as they were measured: title and note."""

from collections.abc import Mapping

NOTES: Mapping[str, tuple[str, str]] = {
    "optimised": (
        "Gradient inversion by optimisation",
        "Part of the same sentence's tokens that descent on inputs reads from one upload, with the "
        "model, the label, the number of tokens and the first and last of them known.",
    ),
    "language": (
        "Membership in a language model",
        "A causal language model learns half of a small pool. Scores: the mean loss, the least "
        "likely fifth of a row's tokens, and the fall of the loss below that before training.",
    ),
    "extraction": (
        "Extraction of planted secrets",
        "Exposure in bits of a secret that stood once or several times among the rows; a model "
        "that knows nothing shows 1.44 in the mean.",
    ),
    "secure": (
        "A server that lies in a secure aggregation",
        "Played with the clients' own code. Where more clients help the server than "
        "secure.colluding says, or no node has a list of members, the attack must succeed.",
    ),
    "leaks": (
        "What goes beside an update",
        "An attacker of the fields alone guesses whether one row was there. Half of a 99 % "
        "interval; what is planted, the numbers of a model without noise, must be seen.",
    ),
}
