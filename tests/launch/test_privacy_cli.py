"""`fedlora privacy`: what it prints of a ledger."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Spend
from fedlora.privacy.charges import Charge
from fedlora.privacy.ledger import Ledger


def test_a_ledger_prints_its_charges_and_what_they_come_to(tmp_path: Path) -> None:
    for noise in ("system", "reproducible"):
        Ledger(tmp_path).reserve(Charge(Spend(1.0, 5.0, 4), 0.3, 1e-5, noise=noise))
    done = CliRunner().invoke(app, ["privacy", "ledger", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "epsilon spent of the units that had most, delta = 1e-05" in done.output
    assert "REPRODUCIBLE NOISE" in done.output


def test_a_directory_without_ledgers_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["privacy", "ledger", str(tmp_path)])
    assert isinstance(done.exception, PrivacyError)
    with pytest.raises(PrivacyError, match="no privacy ledger"):
        raise done.exception
