"""Names of version 0.1 still work, and say where they are now."""

import importlib
import subprocess
import sys
import warnings

import pytest

from fedlora.moved import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_an_old_module_is_the_new_one_and_says_so(name: str) -> None:
    old = f"fedlora.{name}"
    if "." in name:  # its package warns for itself, where no test before this one imported it
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(old.rpartition(".")[0])
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[name]}"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MOVED[name])
    assert found.__name__ == MOVED[name]


def test_the_server_of_then_checks_its_config_as_it_did() -> None:
    """Config.read did that, and knows no combinations any more."""
    from fedlora.config.reader import Config
    from fedlora.errors import ConfigError

    sys.modules.pop("fedlora.server", None)
    with pytest.warns(DeprecationWarning, match="is now"):
        from fedlora.server import FederatedLora
    config = Config.read({"privacy.level": "client", "model.path": "nowhere"})
    with pytest.raises(ConfigError, match=r"privacy.level = 'client': needs"):
        FederatedLora(config)


def test_what_config_held_is_still_found_there() -> None:
    from fedlora.config import reader

    with pytest.warns(DeprecationWarning, match=r"is now fedlora.config.reader.Config"):
        from fedlora.config import Config
    assert Config is reader.Config
    with pytest.raises(ImportError):
        from fedlora.config import nothing  # type: ignore[attr-defined]  # noqa: F401


def test_a_section_is_still_found_by_its_name_without_config() -> None:
    from fedlora.config import sections

    with pytest.warns(DeprecationWarning, match=r"sections.Model is now .*sections.ModelConfig"):
        from fedlora.config.sections import Model
    assert Model is sections.ModelConfig
    for never in ("ModelConfigConfig", "Nothing", "Config"):
        with pytest.raises(AttributeError, match=never):
            getattr(sections, never)


@pytest.mark.parametrize("module", ["gate", "node", "worker"])
def test_a_script_that_was_generated_before_still_starts(module: str) -> None:
    command = [sys.executable, "-W", "default", "-m", f"fedlora.deploy.{module}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert f"is now fedlora.launch.deploy.{module}" in done.stderr
