"""`fedlora doctor`: find out before a run what would stop it, on this machine and in its config.

Each check says what it found, and where something is wrong, what to do. What the run refuses before
round 1 is refused here in the same words, by the same functions: fedlora/preflight, and those that
measure a strategy on the run's own model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fedlora.config.reader import Config
from fedlora.errors import ConfigError, FedLoraError
from fedlora.launch.doctor.finding import Finding
from fedlora.launch.doctor.this_machine import machine
from fedlora.launch.experiment_file import load_config
from fedlora.launch.guard import of_system


def check(
    config: Config | Path | str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> list[str]:
    """All that would stop the run before its first round, each with what to do; none: it can run.

    As `fedlora doctor` has it: reads the data, loads the model and asks the strategy.

    >>> from fedlora import check
    >>> check("quickstart", {"strategy.name": "fedsa", "robust.method": "median"})
    ["robust.method = 'median': fedsa keeps a factor on its clients, ...]
    """
    from fedlora.launch.doctor.the_run import experiment

    try:
        given = config if isinstance(config, Config) else load_config(config)
        found, _ = experiment(load_config(given.flat(), overrides))
    except ConfigError as e:
        return [*e.problems]
    except FedLoraError as e:
        return [str(e)]
    except OSError as e:
        if (said := of_system(e)) is None:
            raise
        return [said]
    return [f"{f.what}; {f.do}" if f.do else f.what for f in found if f.level == "problem"]


def examine(path: Path | None, overrides: Mapping[str, Any]) -> int:
    """Print what was found and, for an experiment, the plan. Returns 1 where a problem is."""
    from fedlora.launch.doctor.the_run import experiment
    from fedlora.launch.experiment_file import load
    from fedlora.training.quiet import quiet_libraries

    quiet_libraries()
    console = Console()
    findings = list(machine())
    plan = None
    if path is not None:
        try:
            more, plan = experiment(load(path, overrides))
            findings += more
        except ConfigError as e:
            findings += [Finding("problem", problem) for problem in e.problems]
        except FedLoraError as e:
            findings.append(Finding("problem", str(e)))
        except OSError as e:
            if (said := of_system(e)) is None:
                raise
            findings.append(Finding("problem", said))
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
    for f in findings:
        console.print(marks[f.level], escape(f.what), highlight=False)
        if f.do:
            console.print("     ->", escape(f.do), highlight=False)
    if plan is not None:
        console.print(plan)
    return int(any(f.level == "problem" for f in findings))
