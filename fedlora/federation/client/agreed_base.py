"""Did all members of a secure sum agree on the whole model that each trains?

Nothing of it is what an earlier message, which each may have been sent by itself, left on a client:
no change of the base in its memory or its process, no head.
"""

from collections.abc import Collection

from fedlora.errors import PrivacyError
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Version
from fedlora.training.model.model import Model


def check_base(came: Collection[Version], number: int, offset: bool) -> None:
    """Nothing, where the versions that came lead from the first one, or a snapshot, to this number.

    What an earlier message left on this client, of a round with other members, these did not see.
    offset: is what the initialisation takes out of the base there, or nothing is taken?

    Raises:
        PrivacyError: a part of the base came earlier.
    """
    versions = {v.number: v for v in came}
    while number in versions and not versions[number].snapshot:
        number -= 1
    if (number and number not in versions) or not offset:
        raise PrivacyError.public(
            "this client is to train on a base of which a part was sent in other rounds, and not "
            "to all members of this one"
        )


def check_whole(factors: Factors, model: Model) -> None:
    """Nothing, where the factors that were loaded hold every tensor that the model has.

    One that they lack is as the message before left it.

    Raises:
        PrivacyError: there is one.
    """
    sides = set() if model.stacks else {*model.held()} - factors.A.keys()
    if missing := sides | (model.live()["other"].keys() - factors.other.keys()):
        raise PrivacyError.public(
            f"this client is to train a model of which {min(missing)} was not sent, to it or to "
            "the other members of the sum"
        )
