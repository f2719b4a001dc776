"""Whether an exported adapter is the model that a run ended with, by its answers."""

from pathlib import Path

import torch

from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.run import load
from fedlora.launch.export import export_run
from fedlora.training.export_certificate import load_exported


def check_exports(server: FederatedLora, out: Path) -> None:
    """Of a finished run, as PEFT's LoRA in out/False and merged in out/True."""
    setting = server.setting
    load(setting, server.session, server.run, server.run.state)
    ids = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 20, 3]])
    with torch.no_grad():
        want = setting.model.peft.eval()(input_ids=ids).logits
        for merged in (False, True):
            at = out / str(merged)
            assert export_run(setting.journal.directory, at, merged=merged).deviation < 1e-5
            got = load_exported(setting.config, setting.labels, at, merged)(input_ids=ids).logits
            assert float((got - want).abs().max() / want.abs().max()) < 1e-5
