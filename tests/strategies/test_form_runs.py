"""Every form under every strategy that goes with it, in a whole federation, proved each round."""

from collections.abc import Callable

import pytest

from fedlora.strategies import STRATEGIES, forms
from fedlora.strategies.forms import FORMS
from tests.strategies.test_forms import given
from tests.support.tiny_federation import QUICK, federate

Settings = Callable[..., dict[str, object]]
CELLS = [(form, name) for form, x in FORMS.items() for name, cls in STRATEGIES.items()
         if not forms.problem(x, cls())]  # fmt: skip
FEW = {(form, "fedsa") for form in FORMS}
"""Where a side is shared alone, which no other strategy does; the rest is long."""

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch, for SHiRA


@pytest.mark.parametrize(
    ("form", "name"),
    [pytest.param(*x, marks=() if x in FEW else pytest.mark.slow, id="-".join(x)) for x in CELLS],
)
def test_a_form_is_trained_proved_and_certified_under_a_strategy(
    settings: Settings, form: str, name: str
) -> None:
    own = {"train.lr": 0.01, "ranks.policy": "list"} if form == "alora" else {"train.lr": 0.01}
    ran = federate(given(settings, form, name, **{**QUICK, **own}))
    promise = forms.guarantee(FORMS[form], STRATEGIES[name]())
    assert len(ran.rounds) == 3
    for round in ran.rounds[1:]:
        assert not round["failures"]
        assert round["proof"]["norm"] > 0
        assert len(round["certificate"]["start"]) == 3
        assert round["certificate"]["start_excess"] < 1
        if promise != "approximate":
            assert round["proof"]["deviation"] < round["proof"]["bound"]
            assert round["certificate"]["excess"] < 1
            assert round["certificate"]["layers"]
