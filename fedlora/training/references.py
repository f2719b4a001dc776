"""What the untouched model makes of a process's rows, computed once a row and kept on disk.

The untouched model is the policy as it stood before round 1: W0, without what a strategy has since
moved into the base and without what an initialisation takes out of it (PiSSA, LoftQ), and with no
adapter. So it is not "adapters off": that would leave a base that has moved.

    <root>/references-<digest>.safetensors     values (n, k) float32, and the rows' digests (n, 32)

A row is known by a digest of its token ids and of what of them is scored; the file, by one of the
base, the precision and the task. A run that goes on, or a process that lives for one message, finds
what was computed. It is the node's own and never leaves it.

Under example-level DP each row goes through the model by itself: it is part of the row's loss, and
in a batch it would change with who stands beside it (privacy/microbatch.py).
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.lora.tree_file import write_atomically
from fedlora.training.data.batches import Encoded, eval_batches, eval_order
from fedlora.training.model.model import Model
from fedlora.training.precision import autocast, resolved
from fedlora.training.tasks.base import Referring
from fedlora.training.tasks.outputs import at_once

log = logging.getLogger(__name__)


def referred(model: Model, rows: Encoded, config: Config, root: Path | None) -> Encoded:
    """The rows with what the untouched model makes of each; as they are, of a task without.

    root: where that is kept; None: nowhere.
    """
    if not isinstance(model.task, Referring) or not len(rows):
        return rows
    keys = [_digest(rows, i) for i in range(len(rows))]
    file = root / f"references-{_name(model, config)}.safetensors" if root else None
    known = _read(file) if file else {}
    lacking = [i for i, key in enumerate(keys) if key not in known]
    if lacking:
        some = rows.select(torch.tensor(lacking))
        found = _computed(model, model.task, some, config)
        known |= {keys[i]: x for i, x in zip(lacking, found, strict=True)}
        if file:
            _write(file, known)
    return replace(rows, targets=torch.stack([known[key] for key in keys]))


@torch.no_grad()
def _computed(model: Model, task: Referring, rows: Encoded, config: Config) -> Tensor:
    """(n, k), in the rows' order."""
    model.peft.eval()
    precise = autocast(config.train.precision, model.device)
    with model.base.untouched(), model.peft.disable_adapter(), precise:
        size = 1 if config.privacy.by_example else at_once(config)
        parts = [task.refer(model, b) for b in eval_batches(rows, size)]
    return torch.cat(parts)[eval_order(rows).argsort()].float()


def _digest(rows: Encoded, i: int) -> bytes:
    found = hashlib.sha256()
    for side in (rows, rows.other) if rows.other is not None else (rows,):
        ids = side.ids[side.starts[i] : side.starts[i + 1]]
        asked = -1 if side.prompts is None else int(side.prompts[i])
        found.update(f"{len(ids)} {asked} ".encode() + ids.numpy().tobytes())
    return found.digest()


def _name(model: Model, config: Config) -> str:
    how = resolved(config.train.precision, model.device)
    said = f"{model.fingerprint} {how} {model.device.type} {model.task.name}"
    said += " alone" * config.privacy.by_example  # which the others are not
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _write(file: Path, known: Mapping[bytes, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    digests = torch.tensor([list(key) for key in known], dtype=torch.uint8)
    write_atomically(file, save({"rows": digests, "values": torch.stack([*known.values()])}))


def _read(file: Path) -> dict[bytes, Tensor]:
    """What is on disk; nothing where that is damaged, since all of it can be computed again."""
    try:
        found = load(file.read_bytes())
        keys = [bytes(row) for row in found["rows"].tolist()]
        return dict(zip(keys, found["values"].float(), strict=True))
    except FileNotFoundError:
        return {}
    except (SafetensorError, KeyError, ValueError) as e:
        log.warning("%s is damaged (%s): computed anew", file, e)
        return {}
