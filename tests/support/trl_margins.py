"""A script, not a module to import: DPO by TRL, in an environment of its own, without fedlora.

    python trl_margins.py JOB.json

The job names directories of a policy and of a reference, rows of texts, betas, and the file to
write: for each beta the tokens that TRL makes of each row, and its loss, rewards, margin and
accuracy of all rows as one batch.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    """Do the job of this file."""
    sys.modules["fedlora"] = None  # type: ignore[assignment]
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    job: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    found = []
    for beta in job["betas"]:
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float32)
            for name in ("policy", "reference")
        )
        args = DPOConfig(
            output_dir=job["out"] + ".d", beta=beta, report_to="none", bf16=False, use_cpu=True,
            gradient_checkpointing=False, per_device_eval_batch_size=len(job["rows"]),
            max_length=None, disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_list(job["rows"])
        trainer = DPOTrainer(
            policy, reference, args, train_dataset=rows, eval_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(job["policy"]),
        )  # fmt: skip
        scores = trainer.evaluate()
        ids = ("prompt_ids", "chosen_ids", "rejected_ids")
        tokens = [{name: row[name] for name in ids} for row in trainer.eval_dataset]
        found.append({"beta": beta, "tokens": tokens, **scores})
    Path(job["out"]).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
