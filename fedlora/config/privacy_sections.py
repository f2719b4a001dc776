"""The keys of differential privacy and secure aggregation; the others are in sections.py."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.config.fields import Section


class PrivacyConfig(Section):
    level: Literal["example", "client"] = "example"
    """What one unit of protection is: an example of a client, or a client with all it has."""
    epsilon: Annotated[float, Field(ge=0, le=200)] = 0.0
    """The budget over all rounds; the noise is calibrated to it. 0: off, or by noise-multiplier.
    Above 200 no privacy is left, so no budget is larger."""
    max_epsilon: Annotated[float, Field(ge=0, le=200)] = 0.0
    """A node's own limit, from its node config: it refuses whatever exceeds it. 0: none."""
    noise_multiplier: Annotated[float, Field(ge=0)] = 0.0
    """Noise over clip-norm, in place of epsilon; then epsilon is counted, without a limit."""
    clip_norm: Annotated[float, Field(gt=0)] = 0.3
    """What one unit can add to a sum at most: C. With clip-quantile, what it starts at."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Must be below 1 over a client's examples, at level client over the clients."""
    sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance of an example to be in a step; 0: 0.1, or train.batch-size over the client's examples
    if that is more.
    At level client, of a client to be in a round; 0: a cohort of fixed size, not amplified."""
    microbatch: Annotated[int, Field(ge=0)] = 0
    """Examples through the model at once; 0: a tenth of those that a step draws, and at most
    train.batch-size. All micro-batches are filled up to it: privacy/microbatch.py."""
    clip_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """At level client: clip-norm follows the norm that this part of the updates stays below."""
    clip_rate: Annotated[float, Field(gt=0)] = 0.2
    """How fast it follows."""
    ledger: str = ""
    """Directory of the ledgers; empty: with the clients' memory. Runs that share it compose."""
    release_metrics: bool = False
    """Send losses, example counts, client evaluations and timings without noise. No guarantee
    covers them; off, they stay on the clients and every client weighs the same."""
    insecure_reproducible_noise: bool = False
    """Noise and samples from run.seed, which the server knows: for experiments, not privacy."""

    @property
    def on(self) -> bool:
        return bool(self.epsilon or self.noise_multiplier)

    @property
    def by_example(self) -> bool:
        return self.on and self.level == "example"

    @property
    def by_client(self) -> bool:
        return self.on and self.level == "client"


class SecureConfig(Section):
    """Secure aggregation, so that the server learns sums only: federation/secure/."""

    aggregation: bool = False
    num_shares: Annotated[int, Field(ge=0)] = 0
    """Pieces of each client's secrets: odd, one for each neighbour and its own; 0: all clients."""
    reconstruction_threshold: Annotated[int, Field(ge=0)] = 0
    """Pieces that put one together, and the fewest clients of a sum; 0: more than half of the
    pieces and `colluding` together."""
    colluding: Annotated[int, Field(ge=0)] = 1
    """Clients that may help the server: takes 3 times as many clients a round, and one."""
    clipping_range: Annotated[float, Field(gt=0)] = 8.0
    """Values outside of +- this are an error of their client, which sends nothing."""
    max_weight: Annotated[int, Field(gt=0)] = 10_000
    """The most examples of one client. The larger, the coarser."""
    modulus_bits: Literal[32, 64] = 32
    """Of each integer that travels: 4 bytes a value, or 8."""
    stage_deadline: Annotated[float, Field(gt=0)] = 120.0
    """Seconds for each of the three stages without training."""
