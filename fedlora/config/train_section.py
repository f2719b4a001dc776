"""The keys of local training; the others are in sections.py."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedlora.config.fields import CODE, Section, amount


class TrainConfig(Section):
    loss: Annotated[str, Field(pattern=CODE)] = ""
    """"py:package.module:function" of (logits, labels) that returns each example's loss; empty:
    cross entropy, for causal-lm its mean over an example's tokens."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For classification, token-classification, causal-lm and seq2seq: this part of what a label is
    worth in the training loss is dealt out over all classes, or tokens. Scores are without it."""
    neftune_noise_alpha: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """NEFTune's alpha: in training alone embeddings (b, L, d) get noise of up to alpha / sqrt(L d),
    as by transformers. 5 is usual; 0: none."""
    packing: bool = False
    """For causal-lm: in training, short examples of a batch share rows, kept apart by their
    positions; the steps and their losses stay as they are, with less padding to compute."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=0)] = 0
    """Local steps a round; 0 counts epochs instead."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """The most local steps a round that epochs come to; 0: any number."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    """Batches of one step: its gradient is the mean over the rows of all of them, each row once,
    as of one batch of so many times the size, of which one is in memory at a time."""
    microbatch: Annotated[int, Field(ge=0)] = 0
    """Of a batch, examples in memory at once; 0: all. Out of memory, a client halves its own."""
    lr: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """0: the strategy's default, which its page states. Under example-level DP: 3 over
    privacy.clip-norm, 1 over it at epsilon <= 1; 1e-2 with adamw."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls over the run: training/schedule.py."""
    lr_per: Literal["round", "step"] = "round"
    """round: one rate for all steps of a round. step: each of a client's steps has its own."""
    warmup_steps: Annotated[float, Field(ge=0), AfterValidator(amount)] = 0.0
    """With lr-per = "step": the first steps of a client's in the whole run, in which the rate rises
    to train.lr; below 1 a share of them."""
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1
    """For preference: how far the policy may go from the untouched model; small is far."""
    lr_ratio_b: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """LoRA+: B's rate over A's."""
    optimizer: Literal[
        "auto", "adamw", "sgd", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"
    ] = "auto"
    """auto: adamw, and sgd under example-level DP. The last three are bitsandbytes' AdamW, by
    transformers' names: states in 8 bits, or paged out to the host, from a card alone."""
    rule: Literal["plain", "preconditioned", "riemann", "lora-pro", "allora", "coto", "dylora"] = (
        "plain"
    )
    """What stands between the gradients of LoRA's A and B and the optimiser's step: see
    training/rules.py."""
    momentum: Annotated[float, Field(ge=-1, lt=1)] = -1.0
    """Of sgd. -1: 0, and 0.8 under example-level DP."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Norm the gradient is clipped to; 0 turns it off."""
    prox: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's mu: mu/2 * ||factors - factors received||^2 is added to the loss."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 autocast where torch multiplies it natively, else float32. float16: with a
    gradient scaler."""
    threads: Annotated[int, Field(gt=0, le=1024)] = 1
    """Torch threads a client. Fixed, because sums depend on it: the same bits on every engine."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """The base's layers through torch.compile, each rank profile at its first clients."""
    deterministic: bool = True
    """On an accelerator, torch's deterministic algorithms, for a resumed run of the same bits."""
    prefix_cache: Annotated[int, Field(ge=0)] = 0
    """Megabytes to remember of what enters the first adapted layer, where lora.layers leaves frozen
    ones below it that drop nothing out: training/model/prefix_cache.py. 0: off."""

    @property
    def step_size(self) -> int:
        """Rows of one step, at most."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def at_once(self) -> int:
        """Of those, the most in memory at once; 0: all."""
        return self.microbatch or (self.batch_size if self.step_size > self.batch_size else 0)

    @property
    def follows_rounds(self) -> bool:
        """Does a round's rate depend on how many rounds the run has?"""
        share = self.lr_per == "step" and 0 < self.warmup_steps < 1
        return share or self.lr_schedule != "constant"
