"""Did all members of a secure sum agree on the whole base that each trains on?"""

from collections.abc import Collection

from fedlora.errors import PrivacyError
from fedlora.strategies.base import Version


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
