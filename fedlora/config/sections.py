"""Every key of a run, with its type, its default and its meaning: one class for each section.

`fedlora.config.reader` reads them from TOML and from Flower's flat run config;
docs/use/configuration.md is written from this file.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fedlora.config.fields import (
    CODE,
    Digests,
    Indices,
    Names,
    Ranks,
    Renames,
    Section,
    amount,
    share_of_steps,
)
from fedlora.config.metric_names import known as known_metrics
from fedlora.config.privacy_sections import PrivacyConfig as PrivacyConfig  # under its old place
from fedlora.config.privacy_sections import SecureConfig as SecureConfig
from fedlora.config.run_section import RunConfig as RunConfig
from fedlora.config.sites import SEPARATOR, Sites
from fedlora.config.stop_section import StopConfig as StopConfig
from fedlora.config.task_names import known
from fedlora.config.train_section import TrainConfig as TrainConfig
from fedlora.moved import attribute_of


def __getattr__(name: str) -> Any:
    """A section under its name of version 0.1, which lacked "Config"."""
    return attribute_of(__name__, __name__, name, f"{name}Config")


class ModelConfig(Section):
    path: str = ""
    """Must be set: a hub id, a directory, "pkg:package/path" inside an installed package, or
    "py:package.module:function", a function of yours: docs/use/python.md."""
    adapter: str = ""
    """A directory with a PEFT adapter (plain LoRA) to start from, or of a finished run: it is then
    a part of the base, and of what is exported. A node's policy names its own copy."""
    tokenizer: Annotated[str, Field(pattern=CODE)] = ""
    """"py:package.module:function" that returns the tokenizer; empty: the one beside the model."""
    task: Annotated[str, AfterValidator(known)] = "classification"
    """classification, multi-label, regression, token-classification, causal-lm, seq2seq,
    preference, image-classification, or one registered: docs/use/tasks.md."""
    pooling: Literal["auto", "default", "mean"] = "auto"
    """How a classifier reads the encoder: as the model's own class does, or the mean over tokens
    and a zero-initialised linear head. auto: default, and mean under example-level DP."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "8bit", "4bit", "int8"] = "none"
    """8bit, 4bit: as bitsandbytes stores weights; int8: as torchao does."""
    merge: Literal["auto", "into-base", "keep-as-adapter"] = "auto"
    """Where a moving base's changes go: into the weights, or beside them as a frozen adapter."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """As transformers names them. flash_attention_2: a card, and the package flash-attn."""
    liger: bool = False
    """Liger's Triton kernels for the base's norms, rotations and products: a card alone."""
    device_map: Literal["none", "auto"] = "none"
    """auto: one base over all of simulate.devices, some of its layers on each."""
    dropout: Annotated[float, Field(ge=-1, lt=1)] = -1.0
    """Of every dropout layer of the base; -1 leaves them as the model has them, and is 0 with
    model.task = "preference", whose reference knows none."""
    revision: str = ""
    trust_remote_code: bool = False


class DataConfig(Section):
    path: str = ""
    """Must be set, or clients, or test-path: a JSONL, CSV, TSV, Parquet or text file (in .gz, .xz,
    .bz2 or .zip as well), a directory of `datasets` or of pictures, a hub id, "pkg:", or
    "py:package.module:function" that returns a client's rows, of None the central test rows."""
    clients: Sites = ()
    """In place of path and partition: a table a client (path, text, text-pair, image, label,
    label-separator, prompt, response, rejected, messages, map, separator, encoding, rank), or a
    directory or a pattern ("sites/*.csv") of one file a client."""
    line_pattern: str = r"(?P<label>[A-Z]+):(?P<subtype>\S+) (?P<text>.+)"
    """For text files: a regular expression over each line whose named groups are the columns."""
    separator: Annotated[str, Field(pattern=SEPARATOR)] = ""
    """What stands between a table's columns: one character, or "tab". Empty: found, of , ; tab |,
    in .csv and .tsv; any other text file is a table with a header where this is set."""
    encoding: str = "utf-8"
    """Of text files, where no byte-order mark says it."""
    split: str = "train"
    """Which split of a `datasets` data set."""
    subset: str = ""
    """Which configuration of a hub data set that has several."""
    text: str = "text"
    """The column of the text; for token-classification, of a list of words."""
    image: str = "image"
    """For image-classification: the column of pictures."""
    text_pair: str = ""
    """A second column of text, where a label is of a pair of texts."""
    label: str = "label"
    """The column of what is to be predicted: a class, a list of labels or of tags, a number."""
    label_separator: str = ""
    """For multi-label, where a cell is one text and no JSON list: what stands between labels."""
    prompt: str = ""
    """For tasks that write: the prompt column, or a template with {column} names; for seq2seq what
    the encoder reads. Empty: no prompt."""
    response: str = "response"
    """For causal-lm and seq2seq: the column whose tokens are trained and scored; for preference
    the chosen."""
    rejected: str = "rejected"
    """For preference: the column of the answer that is not preferred."""
    messages: str = ""
    """For causal-lm, in place of prompt and response: the column of conversations, each a list of
    messages of a role and a content. Through the chat template; the assistant's are trained. For
    preference: the chosen ones, in place of response."""
    labels: Names = ()
    """The labels of a classification, in order. Empty: the data's own numbered classes, else those
    that there are, numbers by size and texts by the alphabet."""
    map: Renames = ()
    """New names, "HUM=person,LOC=place", for values of the label, or of causal-lm's and seq2seq's
    response."""
    chat_template: bool = False
    """For causal-lm: send prompt and response through the tokenizer's chat template."""
    max_length: Annotated[int, Field(gt=0)] = 128
    """Tokens of an example; the text, or for causal-lm the response, is cut there; for seq2seq
    each of the two."""
    long_texts: Literal["cut", "windows"] = "cut"
    """For causal-lm without a prompt: cut a text at max-length, or make each stretch of that many
    tokens an example of its row."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Use at most this many rows (0: all), test rows among them, chosen by the seed."""
    dedupe: bool = True
    """Drop rows of equal text, or of equal prompt and response, before anything is split, so that
    no test row was trained on."""
    test_path: str = ""
    """A source of central test rows, read as path is; the clients then have none of its rows."""
    test_size: Annotated[int, Field(ge=0)] = 500
    """Rows of the central test set, taken before the clients' rows, where no test-path is given."""
    client_test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of each client's rows, held out to evaluate on its own distribution."""
    validation_path: str = ""
    """A source of central validation rows, read as path is. What equals one of them trains no
    client, and what equals a test row validates nothing."""
    validation_size: Annotated[float, Field(ge=0), AfterValidator(amount)] = 0.0
    """Rows of the central validation set, taken after the test rows and before the clients', where
    no validation-path is given: a number of rows, or below 1 a share of those that are left."""
    client_validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what a client's own test leaves it, held out to validate: what [stop] reads where there
    are no central validation rows. A node's directory has them in validation.jsonl."""
    partition: Literal["iid", "dirichlet", "pathological", "natural"] = "dirichlet"
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Dirichlet concentration: small is skewed."""
    classes_per_client: Annotated[int, Field(gt=0)] = 2
    """For pathological."""
    natural_column: str = ""
    """For natural: each of its values is a client."""
    unit_column: str = ""
    """What one unit of example-level privacy is: all rows with one value of this column, one
    person's; rows without a value are left out. Empty: each row, as read, is its own."""
    withdrawn: Digests = ()
    """Units whose rows are left out, by digest: a node's policy names them."""
    node_path: str = ""
    """A deployed node's own data file (usually from its node config); overrides the partition."""

    @property
    def validates(self) -> bool:
        """Are there central validation rows?"""
        return bool(self.validation_path or self.validation_size)

    @property
    def fewest(self) -> int:
        """Rows that a client needs: one to train on, and one of each that it holds out."""
        return 1 + bool(self.client_test_fraction) + bool(self.client_validation_fraction)

    @property
    def chats(self) -> bool:
        """Do rows go through the tokenizer's chat template?"""
        return self.chat_template or bool(self.messages)


class ClientsConfig(Section):
    count: Annotated[int, Field(gt=0)] = 8
    per_round: Annotated[int, Field(ge=0)] = 0
    """Clients sampled each round; 0 takes all."""
    ranks: Ranks = (4, 8, 16)
    """Cycled over the clients: "4,8,16" gives client 3 rank 4."""


class RankPolicyConfig(Section):
    """Which modules a client adapts, and at which rank: federation/server/ranks.py."""

    policy: Literal["list", "share", "capability", "legend", "adaptive"] = "list"
    """list: clients.ranks cycled. share: by ranks.shares. capability: what a node says it can.
    legend: the last layers, as many as the client's measured speed allows. adaptive: by module,
    what the client's rank costs shared out by how much each module's last change held."""
    shares: Names = ("4:0.5", "8:0.3", "16:0.2")
    """For share: rank:share of the clients, dealt out by the seed."""
    per_core: Annotated[int, Field(gt=0)] = 4
    """For capability: rank a core, where a node states no rank itself."""
    cap: Annotated[int, Field(ge=0)] = 0
    """For capability: the highest rank; 0: none."""
    low: Annotated[int, Field(gt=0)] = 4
    """For legend: the first layer's rank."""
    step: Annotated[float, Field(ge=0)] = 1.0
    """For legend: what each layer's rank has over the one before."""
    budget: Annotated[int, Field(ge=0)] = 0
    """For legend: the most that a client's layers' ranks may sum to; 0: no limit."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """For legend: how much of the times known so far each round's measurement leaves."""
    quantile: Annotated[float, Field(ge=0, le=1)] = 0.0
    """For legend: the share of the clients that may miss the deadline; 0 is the fastest's time."""
    absent: Literal["fold", "leave-out"] = "fold"
    """A module that a client does not adapt: the federation's current change of it is folded
    into the client's base for the round, or is left out, which saves its bytes."""


class DevicesConfig(Section):
    """A device model with a virtual clock, for simulation: federation/server/devices.py."""

    classes: Names = ()
    """name:compute:Mbit/s[:layers], "fast:1:100,slow:0.2:5". Empty: off."""
    gflops: Annotated[float, Field(gt=0)] = 50.0
    """Billions of operations a second of a device of compute 1."""
    jitter: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of the logarithm of a device's speed over the rounds."""
    deadline: Annotated[float, Field(ge=0)] = 0.0
    """Virtual seconds after which a reply does not count; 0: every reply does."""


class LoraConfig(Section):
    alpha: Annotated[float, Field(ge=0)] = 0.0
    """An adapter's scale is alpha / rank, or alpha / sqrt(rank) with use-rslora. 0: the strategy's
    default, which is 16 where it declares no other."""
    target_modules: Annotated[Names, Field(min_length=1)] = ("auto",)
    """Module names as PEFT takes them: last names, or "all-linear". auto: PEFT's choice for the
    architecture, or else the linear modules of its attention blocks."""
    target_parameters: Names = ()
    """Stacked experts of a mixture, which are no modules, as PEFT takes them: the ends of their
    paths, "mlp.experts.gate_up_proj, mlp.experts.down_proj". Empty: none."""
    layers: Indices = ("auto",)
    """Indices of the transformer layers to adapt; empty: all. "-2,-1" are the last two. auto: all,
    and the last one under example-level DP."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    modules_to_save: Names = ()
    """Modules trained whole besides the head of a classifier."""
    init: str = "auto"
    """How A and B begin: default, gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq, eva,
    corda, lora_ga. auto: the strategy's default, which is default where it declares no other."""
    rank_pattern: Renames = ()
    """Every client's rank in the modules that a regular expression matches to their end, in place
    of clients.ranks: "value=8, layer.0.*=2"; the first that matches counts."""
    calibration: str = ""
    """For eva, corda and lora_ga: rows that are no client's, read by the server as data.path is."""
    form: str = "lora"
    """The adapter form: lora, dora, vera, ... (`fedlora forms` lists them)."""
    invocation: str = ""
    """For alora: the text from whose last place in a row on the adapters act, which every prompt
    must have, such as the head of the assistant's turn."""
    options: Renames = ()
    """PEFT's own settings of a form, "scaling=100, random_loc_seed=3"; lora and dora have none."""
    places: Renames = ()
    """Written, not set: by module the places that losia or smt trains, where its option "choice" is
    "gradient" and the clients' first gradients chose them."""

    @property
    def by_gradient(self) -> bool:
        """Does its form train where the clients' first gradients are largest?"""
        return any(re.fullmatch(r"choice\s*=\s*[\"']?gradient[\"']?", x) for x in self.options)


class RoundConfig(Section):
    deadline: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds from sending until late replies no longer count."""
    min_replies: Annotated[int, Field(gt=0)] = 1
    """Fewer accepted replies than this stop the run, with its checkpoint intact."""
    wait_for_clients: Annotated[float, Field(ge=0)] = 120.0
    """Seconds to wait before round 1 for `clients.count` nodes; later, for one that went away."""
    max_examples: Annotated[int, Field(gt=0)] = 1_000_000
    """An update that claims more examples is refused: its weight in the mean is its claim."""
    max_norm: Annotated[float, Field(ge=0)] = 0.0
    """Refuse an update whose adapter, or whose other tensors, are larger than this; 0: any."""
    norm_bound: Annotated[float, Field(ge=0)] = 4.0
    """An update whose change is longer than so many times the round's median does not count:
    federation/server/bounds.py. 0: any."""
    count_bound: Annotated[float, Field(ge=0)] = 4.0
    """An update of more examples than so many times the round's median counts as that many. 0: as
    it claims."""
    buffer: Annotated[int, Field(ge=0)] = 0
    """A round ends with so many updates, of whichever round's model:
    federation/server/asynchronous.py. 0: it waits for all that it asked."""
    max_staleness: Annotated[int, Field(ge=0)] = 10
    """With a buffer: updates of a model older than so many rounds do not count; 0: all do."""
    staleness_exponent: Annotated[float, Field(ge=0)] = 0.5
    """With a buffer: an update of a model that is n rounds old counts (1 + n)^-this."""
    quarantine_after: Annotated[int, Field(ge=0)] = 5
    """A client that sent so many bad updates in a row is asked no more; 0: never."""


class EvaluateConfig(Section):
    every: Annotated[int, Field(ge=0)] = 1
    """Central evaluation after every so many rounds; the last round always; 0: never."""
    clients: bool = True
    """Clients evaluate on their own test rows, before and after their training."""
    steps: Annotated[float, Field(ge=0, le=1), AfterValidator(share_of_steps)] = 0.0
    """Clients score the loss on their own validation rows after each such share of a round's steps,
    and before them: 0.25, five times a round; 0: never. It changes nothing that they learn."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    metrics: Annotated[Names, AfterValidator(known_metrics)] = ()
    """Further scores, by name: docs/use/tasks.md. One may be "py:package.module:function" of
    (logits, labels), for causal-lm and seq2seq of (answers, responses), that returns some."""
    rouge_tokenizer: Literal["english", "stems", "words", "characters"] = "english"
    """Of the ROUGE metrics. english: rouge-score's own, of the letters a to z and digits; stems:
    its words without their endings; words: letters and digits of any script."""
    bleu_tokenizer: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    """Of bleu, as sacrebleu names them; zh is of Chinese."""
    baselines: bool = True
    """Majority class, TF-IDF with logistic regression, and the same model with a trained head."""
    generate_tokens: Annotated[int, Field(ge=-1)] = -1
    """For causal-lm and seq2seq: tokens of an answer, written greedily to score it; -1: as many as
    the longest response has; 0: none is."""


class WireConfig(Section):
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """How factors travel. Narrow ones carry a scale a row; uploads are rounded stochastically."""
    error_feedback: bool = True
    """Of int8 and int4: what an upload lost to rounding is added to the client's next."""


class ProofConfig(Section):
    probes: Annotated[int, Field(gt=0)] = 4
    """Random inputs each round's aggregation is recomputed on."""
    enforce: bool = True
    """Stop the run where a strategy that promises (E) misses it."""


class ServerConfig(Section):
    """The server optimiser, which steps from a round's mean: strategies/server_optimizers.py."""

    optimizer: Literal["none", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = "none"
    lr: Annotated[float, Field(gt=0)] = 1.0
    """1 with fedavgm; 0.001 to 0.1 with the adaptive ones."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Added to the adaptive ones' denominator."""


class RobustConfig(Section):
    """Robust aggregation: which updates count, by their products B A: strategies/robust.py."""

    method: Literal["none", "norm-bound", "krum", "multi-krum", "trimmed", "afa", "median"] = "none"
    """norm-bound: shorten what is too long. krum, multi-krum: keep those with close neighbours.
    afa: drop those that point elsewhere than the rest, if any do (adaptive federated averaging).
    trimmed: drop those farthest from the geometric median. median: weigh by the median."""
    bound: Annotated[float, Field(ge=0)] = 0.0
    """For norm-bound: the longest change of the adapter, and of what trains beside it; 0 takes the
    round's median length of each."""
    byzantine: Annotated[int, Field(gt=0)] = 1
    """For krum and multi-krum: how many faulty clients to withstand."""
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """For trimmed: the share of the updates to drop."""


class PersonalizeConfig(Section):
    """Personalisation: after the last round, each client trains on its own rows for itself."""

    epochs: Annotated[float, Field(ge=0)] = 0.0
    """Fine-tune the final model for so many epochs and evaluate it; 0: do not."""
    lr: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Learning rate of that; 0: train.lr."""
    alone: bool = False
    """Train each client by itself as well, with the budget of the whole run, to compare with."""


class OutputConfig(Section):
    keep_updates: bool = False
    """Write each accepted update to updates/round-NNN/client-<id>.safetensors."""
    plots: bool = True
    client_memory: str = ""
    """Directory of the clients' own memory; empty: clients/ in the run's directory. A deployed
    node names its own in its node config."""
    log: Literal["text", "json"] = "text"
    """json: one JSON object an event on standard output, beside the text."""
    metrics_port: Annotated[int, Field(ge=0, lt=65536)] = 0
    """Serve the run's figures to Prometheus on this port of the server's loopback; 0: off."""
    tracker: Literal[
        "none", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml",
        "dvclive", "swanlab",
    ] = "none"  # fmt: skip
    """An experiment tracker, through accelerate.tracking; its files go to the run's directory."""


class SimulateConfig(Section):
    workers: Annotated[int, Field(ge=0)] = 0
    """Workers of `fedlora simulate`; 0: one a core, or a card; 1: the server's process alone."""
    devices: Annotated[str, Field(pattern=r"^[a-z]+(:\d+(,\d+)*)?$")] = "auto"
    """auto (an accelerator, if there is one), cpu, cuda, "cuda:0,1", mps, xpu: docs/gpu.md."""
