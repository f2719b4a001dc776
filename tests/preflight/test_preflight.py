"""What cannot run: the run and the doctor refuse it alike, before anything is sent."""

import ast
import json
import re
import socket
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tomli_w
import torch
from flwr.app import Message, RecordDict

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, FedLoraError, RoundError
from fedlora.federation.server import admission
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.wire.codes import Code
from fedlora.federation.wire.job import Job
from fedlora.launch import client_reply
from fedlora.launch.client_app import answer
from fedlora.launch.client_app import app as client_app
from fedlora.launch.doctor import examine
from fedlora.launch.simulate.grid import LocalGrid, _name
from fedlora.preflight import hardware, tasks, together
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Client, Layer
from tests.support.doc_tables import DOCS, table
from tests.support.tiny_federation import ROOT, directory_of, federate, python, quick

Settings = Callable[..., dict[str, object]]
Changes = Mapping[str, object]

FOURIER = {"lora.form": "fourierft", "clients.ranks": "3"}
ALORA = {"lora.form": "alora", "lora.invocation": "is", "clients.ranks": "3"}
CENTRAL = {"privacy.level": "client", "privacy.noise-multiplier": 1.0}
DP = {"privacy.epsilon": 3.0}
NAMED = {"model.path": "m", "data.path": "d"}
PICTURES = {"model.task": "image-classification"}
PREFERENCE = {"model.task": "preference", "data.prompt": "text"}
ANSWERED = {"evaluate.metrics": "bleu", "evaluate.generate-tokens": 2}
SEQ2SEQ = {"model.task": "seq2seq"}
SECURE = {"secure.aggregation": True, "clients.count": 5}
PLAIN = {"data.prompt": "", "data.long-texts": "windows"}
LEGEND = {"ranks.policy": "legend"}
ADAPTIVE = {"ranks.policy": "adaptive"}
RANKED = {"data.path": "", "data.clients": '[{"path": "x.csv", "rank": 2}]'}
EXPERTS = {"lora.target-parameters": "experts.down_proj"}
A2_SERVER = {"strategy.lora-a2.choice": "server"}
HOST = {"simulate.devices": "cpu"}
APPLE = {"simulate.devices": "mps"}
ASIDE = {"evaluate.steps": 0.5, "data.client-validation-fraction": 0.2}
PACKED = {"train.packing": True}
COMPILED = {"train.compile": True}
SPREAD = {"model.device-map": "auto"}
STOPS = {"stop.patience": 2, "data.validation-size": 5}
OWN_ROWS = {"stop.patience": 2, "data.client-validation-fraction": 0.2}
SKETCHED = {"strategy.fedsb.init-from": "update-approx"}
PLACED = {"lora.form": "losia", "clients.ranks": "4", "lora.options": "choice=gradient"}

SUMS = table(DOCS / "privacy" / "index.md", "ranks")
"""Which strategies go on sums, of which ranks."""

BY_CONFIG: list[tuple[str, str, Changes, str]] = [
    # of which strategy, on which model, with which settings, in which words
    ("fedavg", "bert", {"model.path": ""}, "model.path is not set"),
    ("fedavg", "bert", {"data.path": ""}, "data.path is not set"),
    ("fedavg", "bert", {"data.validation-size": 5, "data.validation-path": "x"}, "leave out the s"),
    ("fedavg", "bert", {"data.path": "", "data.test-path": "x", "data.validation-size": 0.1},
     "no rows but its test to draw them from"),
    ("fedavg", "bert", {"train.warmup-steps": 4}, "all steps of a round have one rate"),
    ("fedavg", "bert", {**DP, "train.gradient-accumulation-steps": 2}, "is one random sample"),
    ("fedavg", "bert", {"model.task": "regression", "train.label-smoothing": 0.1}, "deals a label"),
    ("fedavg", "bert", {"train.label-smoothing": 0.1, "train.loss": "py:a:b"}, "the loss is your"),
    ("fedavg", "bert", {"evaluate.steps": 0.5}, "evaluate.steps = 0.5: clients hold no rows asid"),
    ("fedavg", "bert", {**ASIDE, **SECURE}, "clients' scores stay with them; set it to 0"),
    ("fedavg", "bert", {**ASIDE, **CENTRAL}, "no noise covers what clients say of their valid"),
    ("fedavg", "bert", {"train.packing": True}, "it is of causal-lm alone, whose attention"),
    ("fedavg", "gpt2", {**PACKED, **DP, "clients.ranks": "3"}, "would be one unit"),
    ("fedavg", "gpt2", {**PACKED, "train.loss": "py:a:b"}, "your own loss reads one row"),
    ("fedavg", "gpt2", {**PACKED, "train.prefix-cache": 8}, "is an example's in a row of its own"),
    ("fedavg", "gpt2", {**PACKED, **ALORA}, "the adapter begins at one place in a row"),
    ("fedavg", "gpt2", {**PACKED, **COMPILED}, "steps differ in their number of rows"),
    ("fedavg", "bert", {"train.neftune-noise-alpha": 5.0, "train.prefix-cache": 8}, "same noise"),
    ("fedavg", "bert", {**PICTURES, "train.neftune-noise-alpha": 5.0}, "and pictures have none"),
    ("fedavg", "bert", {"stop.patience": 2}, "there are no validation rows to choose by"),
    ("fedavg", "bert", {"stop.min-delta": 0.1}, "choose nothing: set stop.patience or stop.best"),
    ("fedavg", "bert", {**STOPS, "stop.metric": "mcc"}, "write which way is better, '+mcc' for"),
    ("fedsa", "bert", {**STOPS, "strategy.fedsa.average-at-end": False}, "so that only they can"),
    ("fedsa", "bert", {**OWN_ROWS, "stop.best": True}, "of that only the last round's is there"),
    ("fedavg", "bert", {**OWN_ROWS, **SECURE}, "stop with secure.aggregation: the clients' scor"),
    ("fedavg", "bert", {**OWN_ROWS, "round.buffer": 2}, "stop with round.buffer: a client that"),
    ("fedavg", "bert", {**OWN_ROWS, **DP}, "stop with privacy: the clients' scores on their own"),
    ("fedavg", "bert", {"data.long-texts": "windows"}, "a label is of a whole text"),
    ("fedavg", "gpt2", {"data.long-texts": "windows"}, "a response is learned behind its prompt"),
    ("fedavg", "gpt2", {**PLAIN, **DP, "clients.ranks": "3"}, "it protects a row"),
    ("fedavg", "gpt2", {**PLAIN, "data.max-length": 1}, "must be 2 or more"),
    ("fedavg", "bert", {**FOURIER, "lora.init": "pissa"}, "begins as PEFT begins it"),
    ("fedavg", "bert", {"lora.init": "mica"}, "it freezes B for good"),
    ("fedavg", "bert", {"lora.init": "piza"}, "must be default, gaussian"),
    ("fedavg", "bert", {"lora.form": "dora", "lora.init": "pissa"}, "norm DoRA divides by"),
    ("fedavg", "gpt2", {**ALORA, "lora.init": "pissa"}, "takes s B A out of the base on every"),
    ("fedavg", "bert", {"lora.calibration": "x.jsonl"}, "only lora.init = eva, corda, lora_ga"),
    ("fedavg", "bert", {"lora.init": "eva"}, "looks at rows, and the clients' stay with them"),
    ("fedavg", "bert", {"lora.init": "eva", "lora.calibration": "x", "data.test-path": "x"},
     "these rows train or test the model"),
    ("fedavg", "bert", {"lora.init": "eva", "lora.calibration": "x", "personalize.alone": True},
     "a client alone has no calibration rows"),
    ("fedavg", "bert", {"lora.init": "lora_ga", "lora.calibration": "x",
                        "model.quantization": "8bit"}, "quantised weights have no gradient"),
    ("fedavg", "bert", {"lora.places": "m=1 2"}, "written by a run whose form chooses by gradient"),
    ("fedavg", "bert", {"lora.form": "fourierf"}, "did you mean 'fourierft'"),
    ("fedavg", "bert", {"lora.form": "boft"}, "compiles CUDA where it can"),
    ("fedavg", "bert", {**FOURIER, "lora.rank-pattern": "value=2"}, "gives LoRA's factors their"),
    ("fedex", "bert", {**FOURIER, "lora.form": "loha"}, "is about LoRA's A and B, and this form"),
    ("fedsa", "bert", FOURIER, "shares LoRA's A alone, and this form has none"),
    ("ffa", "bert", {**FOURIER, "lora.form": "moslora"}, "more trains than its two sides"),
    ("fedavg", "bert", {**FOURIER, "train.rule": "riemann"}, "is of LoRA's A and B of a module"),
    ("fedex", "bert", {**DP, "train.rule": "coto"}, "private step has a loop of its own"),
    ("fedex", "bert", {"train.rule": "dylora", "train.precision": "float16"}, "is left out"),
    ("fedex", "bert", {"train.rule": "preconditioned", "train.lr-ratio-b": 2.0}, "one rate for"),
    ("fedavg", "bert", {**FOURIER, "robust.method": "median"}, "judges updates by their products"),
    ("fedavg", "bert", {"lora.init": "pissa", "wire.dtype": "int8"}, "use wire.dtype = 'float32'"),
    ("fedavg", "bert", {"lora.options": "scaling=100"}, "PEFT's own settings of a form"),
    ("fedavg", "bert", {"lora.form": "ia3", "clients.ranks": "3"}, "has one size, of which"),
    ("fedavg", "bert", {**FOURIER, "clients.ranks": "2,3"}, "every client has the same tensors"),
    ("fedavg", "bert", {**FOURIER, "lora.use-rslora": True}, "is the scale of LoRA's factors"),
    ("fedavg", "bert", {"lora.invocation": "is"}, "lora.invocation: is alora's"),
    ("fedavg", "bert", ALORA, "what a classifier reads is no continuation"),
    ("fedavg", "gpt2", {**ALORA, "lora.invocation": ""}, "needs lora.invocation"),
    ("ffa", "gpt2", {**ALORA, "clients.ranks": "2,3"}, "would be folded into its base"),
    ("lora-a2", "gpt2", {**ALORA, **A2_SERVER}, "or ranks folded into the base"),
    ("fedavg", "bert", {"lora.init": "loftq", "model.quantization": "8bit"}, "is of 4 bits"),
    ("fedavg", "bert", {"lora.form": "dora", "model.quantization": "4bit"}, "this form reads W0"),
    ("fedavg", "bert", {"model.adapter": "x", "lora.form": "dora", "clients.ranks": "3"},
     "both changes are exported as one adapter of plain LoRA"),
    ("fedavg", "bert", {"model.adapter": "x", "lora.init": "loftq", "model.quantization": "4bit",
                        "clients.ranks": "3"}, "LoftQ reads the whole base once more"),
    ("fedavg", "bert", {"model.merge": "into-base", "model.quantization": "4bit"},
     "quantised weights cannot take a change"),
    # experts of a mixture
    ("fedavg", "gpt2", {**EXPERTS, "lora.form": "dora"}, "PEFT has LoRA alone for experts"),
    ("fedavg", "gpt2", {**EXPERTS, **FOURIER}, "PEFT has LoRA alone for experts"),
    ("fedavg", "gpt2", {**EXPERTS, **ALORA}, "PEFT has LoRA alone for experts"),
    ("fedavg", "gpt2", {**EXPERTS, "lora.dropout": 0.1}, "which have no inputs to drop"),
    ("fedavg", "gpt2", {**EXPERTS, "lora.init": "eva", "lora.calibration": "x"},
     "looks at each layer's inputs, and an expert's"),
    ("fedavg", "gpt2", {**EXPERTS, "model.quantization": "4bit"}, "that it could quantise"),
    ("fedavg", "gpt2", {**EXPERTS, "model.dtype": "bfloat16"}, "set model.merge = 'into-base'"),
    ("fedex", "gpt2", {**EXPERTS, "model.merge": "keep-as-adapter"}, "no output of its own"),
    ("fedsb", "gpt2", EXPERTS, "has more than A and B, and PEFT's code for experts"),
    ("lora-a2", "gpt2", {**EXPERTS, **A2_SERVER}, "has more than A and B, and PEFT's code for"),
    ("fedex", "gpt2", {**EXPERTS, **LEGEND}, "PEFT holds adapters of one set of experts"),
    ("fedavg", "gpt2", {**EXPERTS, **DP}, "sees tokens of all examples mixed"),
    # privacy
    ("fedavg", "bert", {**DP, "privacy.noise-multiplier": 1.0}, "set one of them to 0"),
    ("fedavg", "bert", {"privacy.level": "client"}, "needs privacy.epsilon or"),
    ("fedavg", "bert", {"privacy.insecure-reproducible-noise": True}, "there is no noise"),
    ("fedavg", "bert", {**CENTRAL, "privacy.max-epsilon": 2.0}, "is this node's limit"),
    ("fedsb", "bert", {**DP, **SKETCHED}, "this initialisation sends gradients without noise"),
    ("fedavg", "bert", {**CENTRAL, **PLACED}, "sends each client's first gradient without noise"),
    ("ravan", "bert", {**CENTRAL, "strategy.ravan.choice": "gradient"}, "where its gradient is"),
    ("ravan", "bert", {**DP, "strategy.ravan.head-scales": "trained"}, "have no per-example grad"),
    ("fedavg", "bert", {**DP, "lora.form": "dora"}, "have per-example gradients"),
    ("fedavg", "bert", {**DP, "privacy.clip-quantile": 0.5}, "adaptive clipping is for"),
    ("fedavg", "bert", {**CENTRAL, "privacy.delta": 0.5}, "must be below 1 / clients.count"),
    ("fedsa", "bert", CENTRAL, "collects at the end what clients kept, without noise"),
    ("fedavg", "bert", {**CENTRAL, "output.keep-updates": True}, "as it came, un-noised"),
    ("fedavg", "bert", {**CENTRAL, "robust.method": "median"}, "which no clipping bounds"),
    ("fedavg", "bert", {**CENTRAL, "privacy.microbatch": 4}, "privacy.microbatch: is for"),
    ("fedavg", "bert", {**CENTRAL, "privacy.sample-rate": 0.5, "clients.per-round": 2}, "set one"),
    # secure aggregation
    ("fedavg", "bert", {**SECURE, "clients.count": 2}, "must be 3 at least"),
    ("fedavg", "bert", {**SECURE, "secure.num-shares": 9}, "must be 3 to 5"),
    ("fedavg", "bert", {**SECURE, "secure.num-shares": 4}, "must be odd"),
    ("fedavg", "bert", {**SECURE, "secure.reconstruction-threshold": 2}, "more than half of both"),
    ("fedavg", "bert", {**SECURE, "secure.colluding": 2}, "secure.colluding = 2 takes 7 clients"),
    ("fedavg", "bert", {**SECURE, "secure.max-weight": 10**9}, "does not fit into"),
    ("fedavg", "bert", {**SECURE, **CENTRAL}, "the server clips each client's update"),
    ("fedavg", "bert", {**SECURE, **DP, "privacy.release-metrics": True}, "keeps those on the"),
    ("fedavg", "bert", {**SECURE, "robust.method": "median"}, "it judges single updates"),
    ("fedavg", "bert", {**SECURE, "round.max-norm": 1.0}, "cannot take the norm of one"),
    ("fedavg", "bert", {**SECURE, "output.keep-updates": True}, "no update reaches the server"),
    ("fedex", "bert", {**SECURE, **LEGEND}, "needs each client's steps and times"),
    ("fedex", "bert", {**SECURE, "devices.classes": "fast:1:100"}, "devices.classes: it needs"),
    ("fedsa", "bert", SECURE, "collects at the end what clients kept, in the clear"),
    ("fedsb", "bert", {**SECURE, **SKETCHED}, "sends each client's first gradient in the clear"),
    ("fedavg", "bert", {**SECURE, **PLACED}, "use choice=weight in lora.options"),
    # what goes around any strategy
    ("fedavg", "bert", {"data.clients": "x.csv"}, "each client has its own file; leave out"),
    ("fedex", "bert", {**RANKED, "ranks.policy": "share"}, "gives the ranks, and so does data.cl"),
    ("fedavg", "bert", {**FOURIER, **RANKED}, "leave out each site's rank in data.clients"),
    ("fedex", "bert", {"lora.rank-pattern": "value=none"}, "'=' and a positive rank"),
    ("fedex", "bert", {"ranks.policy": "share", "ranks.shares": "4"}, "must be rank:share"),
    ("fedex", "bert", {"devices.classes": "slow:0:5"}, "must be name:compute:Mbit/s"),
    ("fedex", "bert", {"devices.classes": "slow:1:1:1"}, "limits how many layers a class trains"),
    ("flora", "bert", {**LEGEND, "strategy.flora.reinit": "keep-A"}, "flora keeps a part of each"),
    ("fedex", "bert", {**LEGEND, **DP}, "lives on times that clients report"),
    ("fedavg", "bert", {"round.buffer": 9}, "the clients that train at a time"),
    ("fedavg", "bert", {**SECURE, "round.buffer": 2}, "a masked sum needs all of its clients"),
    ("fedavg", "bert", {**CENTRAL, "round.buffer": 2}, "which the accounting does not cover"),
    ("fedavg", "bert", {**ADAPTIVE, "clients.ranks": "4"}, "so it needs one rank for all"),
    ("flexlora", "bert", {**ADAPTIVE, "clients.ranks": "4", "strategy.flexlora.max-rank": 6},
     "use at least the highest rank, 8"),
    ("lora-a2", "bert", ADAPTIVE, "with lora-a2 each chooses its own"),
    ("lora-a2", "bert", {**ADAPTIVE, **A2_SERVER}, "keeps more than A and B"),
    ("fedsa", "bert", ADAPTIVE, "keeps more than A and B"),
    ("fedex", "bert", {**ADAPTIVE, "lora.form": "dora"}, "its ranks are LoRA's"),
    ("fedex", "bert", {**ADAPTIVE, **SECURE}, "which secure.aggregation keeps back"),
    ("fedex", "bert", {**ADAPTIVE, **CENTRAL}, "calibrated to what clients train"),
    ("fedex", "bert", {**ADAPTIVE, "round.buffer": 2}, "changes a client's layers while"),
    ("fedex", "bert", {**LEGEND, "round.buffer": 2}, "changes a client's layers while"),
    ("fedsa", "bert", {"robust.method": "median"}, "keeps a factor on its clients"),
    ("fedavg", "bert", {"robust.method": "krum"}, "needs at least 5 clients a round"),
    ("fedex", "bert", {"server.optimizer": "fedadam"}, "keeps its model in the base"),
    ("fedavg", "bert", {"personalize.alone": True}, "set evaluate.clients = true"),
    ("fedavg", "bert", {**DP, "personalize.epochs": 1.0, "evaluate.clients": True},
     "set privacy.release-metrics = true"),
    ("fedavg", "bert", {"round.min-replies": 9}, "no more than 3 clients train in a round"),
    ("fedavg", "bert", {"round.min-replies": 3, "clients.per-round": 2}, "no more than 2 clients"),
    # the user's own code
    ("fedavg", "bert", {"train.loss": "py:live:x", "simulate.workers": 2}, "simulate.workers = 1"),
    ("fedavg", "bert", {"train.loss": "py:live:x", "run.resume": True}, "whether it is the one"),
    ("fedavg", "bert", {"model.path": "py:a:b"}, "has no tokenizer beside it"),
    ("fedavg", "bert", {"model.path": "py:a:b", "model.quantization": "4bit"}, "as it is to be"),
    ("fedavg", "bert", {"model.path": "py:a:b", "model.pooling": "mean"}, "has its head already"),
    ("fedavg", "gpt2", {"model.pooling": "mean"}, "one output a text"),
    ("fedavg", "gpt2", {"data.text-pair": "b"}, "data.text-pair with model.task"),
    ("fedavg", "bert", {"data.label-separator": "|"}, "is read by multi-label alone"),
    ("fedavg", "bert", {"model.task": "token-classification"}, "are made by seqeval, which is not"),
    ("fedavg", "bert", {"model.task": "regression", "data.map": "a=b"}, "it renames labels"),
    ("fedavg", "gpt2", {"data.labels": "a,b"}, "it chooses from no labels"),
    ("fedavg", "bert", {"data.messages": "m"}, "by causal-lm and preference alone"),
    ("fedavg", "gpt2", {"data.messages": "m"}, "a conversation has its own prompts"),
    ("fedavg", "gpt2", {"data.rejected": "b"}, "is read by preference alone"),
    ("fedavg", "gpt2", {**PREFERENCE, "data.prompt": ""}, "compares answers to a prompt"),
    ("fedavg", "gpt2", {**PREFERENCE, "train.loss": "py:a:b"}, "its loss is of two answers"),
    ("fedavg", "gpt2", {**PREFERENCE, "evaluate.metrics": "py:a:b"}, "nothing is generated"),
    ("fedavg", "gpt2", {**PREFERENCE, "data.map": "a=b"}, "it renames labels, and there are none"),
    ("fedavg", "bert", {"data.image": "b"}, "is read by image-classification alone"),
    ("fedavg", "bert", {**PICTURES, "model.tokenizer": "py:a:b"}, "the image processor is read"),
    ("fedavg", "bert", {**PICTURES, "lora.form": "alora"}, "no picture has an invocation"),
    ("fedavg", "bert", {**PICTURES, "devices.classes": "a:1:9"}, "its clock counts tokens"),
    ("fedavg", "gpt2", {"evaluate.metrics": "py:a:b"}, "evaluate.generate-tokens = 0"),
    ("fedavg", "bert", {"evaluate.metrics": "bleu"}, "'bleu' is none of model.task = 'classifi"),
    ("fedavg", "gpt2", ANSWERED, "they are made by sacrebleu, which is not installed; pip install"),
    ("fedavg", "bert", {"model.task": "seq2seq"}, "'seq2seq' reads it, and writes data.response"),
    ("fedavg", "gpt2", {**SEQ2SEQ, "data.chat-template": True}, "text and its response are apart"),
    ("fedavg", "gpt2", {**SEQ2SEQ, "train.prefix-cache": 8}, "hangs on two texts; set it to 0"),
    # what needs a card, or a package that is not here
    ("fedavg", "bert", {"model.quantization": "4bit"}, "needs bitsandbytes, which is not install"),
    ("fedavg", "bert", {"model.quantization": "int8"}, "needs torchao, which is not installed"),
    ("fedavg", "bert", {"train.optimizer": "adamw_8bit"}, "or set it to 'adamw'"),
    ("fedavg", "bert", {**HOST, "train.optimizer": "paged_adamw_8bit"}, "to 'adamw_8bit' or 'adam"),
    ("fedavg", "bert", {**APPLE, "train.optimizer": "adamw_8bit"}, "no kernels of 8-bit states"),
    ("fedavg", "bert", {**APPLE, "train.gradient-checkpointing": True}, "draws other dropout"),
    ("fedavg", "bert", {**HOST, "model.attention": "flash_attention_2"}, "set it to 'sdpa'"),
    ("fedavg", "bert", {"model.attention": "flash_attention_2"}, "computes in 16 bits alone"),
    ("fedavg", "bert", {**HOST, "model.liger": True}, "model.liger = true: is for an accelerator"),
    ("fedavg", "bert", {"model.path": "py:a:b", "model.liger": True}, "makes the model as it is"),
    ("fedavg", "bert", {**HOST, **COMPILED}, "on the host torch needs a C++ compiler"),
    ("fedavg", "bert", {**COMPILED, "model.path": "py:a:b"}, "which of its modules are layers"),
    ("fedavg", "bert", {**COMPILED, **DP}, "a compiled backward pass does not run"),
    ("fedavg", "bert", {**COMPILED, "train.prefix-cache": 8}, "stands in for a layer"),
    ("fedavg", "bert", {**COMPILED, "model.quantization": "4bit"}, "not tried; set it to false"),
    ("fedex", "bert", {**COMPILED, **LEGEND}, "would be compiled again and again"),
    ("fedavg", "bert", {**HOST, "model.device-map": "auto"}, "simulate.devices = 'cpu' is one"),
    ("fedavg", "bert", {**SPREAD, "model.path": "py:a:b"}, "the model as it is to be; set it to"),
    ("fedavg", "bert", {**SPREAD, "train.prefix-cache": 8}, "what it remembers lies on one card"),
    ("fedavg", "bert", {**SPREAD, "simulate.workers": 2}, "each would have a base of its own"),
    ("fedavg", "bert", {**DP, "train.precision": "float16"}, "follows all examples of the steps"),
    ("fedavg", "bert", {**DP, "model.quantization": "8bit"}, "the columns that it leaves unround"),
]  # fmt: skip
BY_CLIENTS: list[tuple[str, str, Changes, str]] = [
    ("fedavg", "bert", {"clients.ranks": "2,3"}, "one rank for all"),
    ("fedavg", "bert", {"ranks.policy": "share", "ranks.shares": "2:0.5,3:0.5"}, "one rank for"),
    ("fedavg", "bert", LEGEND, ""),
    ("fedex", "bert", {"strategy.fedex.rank": -1}, "must be 0 (the exact residual)"),
    ("fedsb", "bert", {"clients.ranks": "30"}, "needs ranks of at most min(d, k)"),
    ("flexlora", "bert", {"strategy.flexlora.max-rank": 1}, "use at least the highest rank"),
    ("hetlora", "bert", {"strategy.hetlora.gamma": 2.0}, "must be in (0, 1]"),
    ("lora-fair", "bert", {"clients.ranks": "2,3"}, "corrects one B for all ranks"),
    ("ravan", "bert", {"clients.ranks": "3"}, ""),
    ("fedavg", "bert", {**SECURE, "strategy.name": "fedsa", "clients.ranks": "2,2,2,2,3",
                        "strategy.fedsa.average-at-end": False}, "is the only one of rank 3"),
]  # fmt: skip
BY_MEASURE: list[tuple[str, str, Changes, str]] = [
    ("flexlora", "bert", {"lora.init": "pissa"}, "begins with factors of its own"),
    ("fedex", "bert", {**CENTRAL, "clients.ranks": "3"}, "does not aggregate through the mean"),
    ("fedex", "bert", {**CENTRAL, "clients.ranks": "2,3"}, "start the round from different"),
    ("fedavg", "bert", {"privacy.level": "client", "privacy.epsilon": 0.001}, "no noise keeps"),
    ("fedex", "bert", {"round.buffer": 2}, "cannot take a late update"),
    ("fedex", "bert", {**SECURE, "clients.ranks": "3"}, "learns sums only"),
    ("fedavg", "bert", {**DP, "privacy.delta": 0.5}, "must be below 1/n"),
    ("fedavg", "bert", {"lora.rank-pattern": "nothing=2"}, "is the first match of no adapted"),
    ("fedavg", "bert", {"lora.target-modules": "nothing"}, "matches no linear module"),
    ("fedavg", "bert", {"lora.layers": "9"}, "must be indices from -2 to 1"),
    ("fedavg", "bert", {**FOURIER, "lora.options": "scalling=1"}, "has no 'scalling'"),
    ("fedavg", "bert", {**FOURIER, "lora.dropout": 0.1}, "lora.dropout: fourierft has none"),
    ("fedavg", "bert", {"data.text": "words"}, "words"),
    ("fedavg", "bert", {"clients.count": 500}, "there are only"),
    ("fedavg", "bert", {"output.tracker": "wandb"}, "is not installed"),
]  # fmt: skip
ALGEBRA = [BY_CLIENTS[0], BY_CLIENTS[-1], *BY_MEASURE[1:3], *BY_MEASURE[4:6]]
"""What no model has to be there for: fedlora/preflight/together.py."""
REFUSED = [*BY_CONFIG, *(c for c in BY_CLIENTS if c[3]), *BY_MEASURE]


@pytest.fixture(autouse=True)
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package of an extra is here, whatever this machine has."""
    monkeypatch.setattr(hardware, "find_spec", lambda _: None)
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    monkeypatch.setattr(hardware, "which", lambda _: None)
    real = hardware.chosen
    monkeypatch.setattr(
        hardware, "chosen", lambda x: torch.device(x) if x == "mps" else real(x)
    )  # as on a machine that has Apple's


def given_of(settings: Settings, name: str, kind: str, changes: Changes) -> dict[str, object]:
    return settings(kind, **quick(name, **changes))


def begun(given: Mapping[str, object]) -> list[int]:
    """Rounds after the first evaluation that the run has on record."""
    path = directory_of(given) / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [n for line in lines if (n := json.loads(line)["round"])]


def doctored(given: Mapping[str, object], file: Path, capsys: Any, monkeypatch: Any) -> str:
    """What the doctor says of an experiment that it finds a problem in."""
    monkeypatch.setenv("COLUMNS", "2000")
    file.write_text(tomli_w.dumps(dict(given)))
    capsys.readouterr()
    assert examine(file, {}) == 1
    said: str = capsys.readouterr().out
    assert "problem " in said
    return said


@pytest.mark.parametrize(
    ("name", "kind", "changes", "words"), REFUSED, ids=[f"{c[0]}-{c[3]}" for c in REFUSED]
)
def test_what_the_run_refuses_before_round_1_the_doctor_refuses_in_the_same_words(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    changes: Changes,
    words: str,
) -> None:
    given = given_of(settings, name, kind, changes)
    assert words in doctored(given, tmp_path / "x.toml", capsys, monkeypatch)
    with pytest.raises(FedLoraError) as caught:
        federate(given)
    assert words in str(caught.value)
    assert begun(given) == []


def test_what_runs_the_doctor_lets_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fedavg", "fedex", "fedsb"):
        given = given_of(settings, name, "bert", {"run.name": name})
        (file := tmp_path / "x.toml").write_text(tomli_w.dumps(given))
        assert examine(file, {}) == 0
        federate(given)
        assert begun(given) == [1, 2]


def test_a_run_that_is_there_and_a_port_that_is_taken_are_found_by_both(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = given_of(settings, "fedavg", "bert", {})
    federate(given)
    assert "holds a run already" in doctored(given, tmp_path / "x.toml", capsys, monkeypatch)
    with pytest.raises(FedLoraError, match="holds a run already"):
        federate(given)
    changed = {**given, "run.resume": True, "train.lr": 0.5}
    assert "train.lr: was 0.05" in doctored(changed, tmp_path / "x.toml", capsys, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = {**given, "run.name": "other", "output.metrics-port": port}
        said = doctored(other, tmp_path / "x.toml", capsys, monkeypatch)
        assert f"output.metrics-port = {port}: Address already in use; choose another" in said
        with pytest.raises(ConfigError, match=f"output.metrics-port = {port}: Address already"):
            federate(other)


def test_a_budget_that_other_runs_have_spent_is_found_before_the_run_ends_at_it(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = {"privacy.level": "client", "privacy.epsilon": 3.0, "privacy.delta": 0.01,
              "privacy.ledger": str(tmp_path / "shared")}  # fmt: skip
    federate(given_of(settings, "fedavg", "bert", shared))
    next_ = given_of(settings, "fedavg", "bert", {**shared, "run.name": "next"})
    ledger = tmp_path / "shared" / "ledgers" / "clients" / "charges.jsonl"
    before = ledger.read_bytes()
    said = doctored(next_, tmp_path / "x.toml", capsys, monkeypatch)
    assert "the privacy budget is spent" in said
    assert ledger.read_bytes() == before, "to ask costs nothing"
    assert "the privacy budget is spent" in str(federate(next_).summary)
    assert begun(next_) == []


PAGED = {"train.optimizer": "paged_adamw_8bit"}
FLASH = {"model.attention": "flash_attention_2", "train.precision": "bfloat16"}


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"train.optimizer": "adamw_8bit"}, "8-bit states"),
        (PAGED, "paged states"),
        (FLASH, "flash-attn"),
        ({"model.liger": True}, "liger-kernel"),
        ({"model.quantization": "4bit"}, ""),
        ({"model.dropout": 0.0, "train.gradient-checkpointing": True}, ""),
        ({"train.compile": True}, ""),
    ],
)
def test_what_apples_cards_have_no_kernels_for_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, changes: Changes, lacking: str
) -> None:
    """Whatever is installed; what they have kernels for is let run, compiled without triton."""
    monkeypatch.setattr(hardware, "find_spec", lambda name: None if name == "triton" else object())
    config = Config.read({**NAMED, **APPLE, **changes})
    said = [*hardware.problems(config)]
    if lacking:
        assert f"no kernels of {lacking} for this process's device, mps" in said[0]
    assert len(said) == bool(lacking)
    monkeypatch.setattr(hardware, "chosen", lambda _: torch.device("cuda"))
    assert not [x for x in hardware.problems(config) if "no kernels" in x]


def test_all_that_is_wrong_is_said_at_once_each_with_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        preflight.read({**NAMED, "strategy.name": "fedsa", **CENTRAL, "robust.method": "median",
                        "round.buffer": 2, "lora.init": "piza"})  # fmt: skip
    assert len(caught.value.problems) == 5
    assert caught.value.problems == [*preflight.problems(Config.read(
        {**NAMED, "strategy.name": "fedsa", **CENTRAL, "robust.method": "median",
         "round.buffer": 2, "lora.init": "piza"}))]  # fmt: skip


# -- the list, whole ---------------------------------------------------------------------------

HERE = [*sorted((ROOT / "fedlora" / "preflight").glob("*.py")), Path(admission.__file__)]


def yields(path: Path) -> Iterator[tuple[str, range]]:
    """Where a file says a problem: its lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield | ast.YieldFrom):
            yield str(path), range(node.lineno, (node.end_lineno or node.lineno) + 1)


def clients(ranks: tuple[int, ...]) -> list[Client]:
    return [Client(i, {"m": Layer(24, 40, r, 1.0)}) for i, r in enumerate(ranks)]


def test_the_table_holds_every_refusal_of_the_list(settings: Settings) -> None:
    """Each place in it that says a problem is reached by a case above."""
    hit: set[tuple[str, int]] = set()
    mine = {str(p) for p in HERE}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in mine:
            return None
        if event == "line":
            hit.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    configs = [Config.read(given_of(settings, *case[:3])) for case in REFUSED]
    alora = Config.read(settings("gpt2", **quick("ffa", **ALORA)))
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        said = [[*preflight.problems(c)] for c in configs]
        [[*together.problems(c, c.build_strategy())] for c in configs[len(BY_CONFIG) :]]
        uneven = [*preflight.problems(alora, clients((2, 3)))]
        [*preflight.problems(Config.read({**SECURE, "strategy.name": "ffa"}), clients((2, 2, 3)))]
    finally:
        sys.settrace(before)
    assert all(said[: len(BY_CONFIG)])
    assert any("give all clients one rank" in p for p in uneven)
    missed = [f"{Path(path).name}:{lines.start}" for file in HERE for path, lines in yields(file)
              if not any((path, n) in hit for n in lines)]  # fmt: skip
    assert not missed, f"no case of the table reaches {', '.join(missed)}"


@pytest.mark.parametrize("case", ALGEBRA, ids=[c[3] for c in ALGEBRA])
def test_what_ranks_cannot_do_together_is_said_before_a_model_is_there(
    case: tuple[str, str, Changes, str],
) -> None:
    """Of any model: none is named here that there is."""
    name, _, changes, words = case
    given = {**NAMED, "clients.count": 3, "strategy.name": name, **changes}
    with pytest.raises(ConfigError, match=re.escape(words)):
        preflight.read(given)


@pytest.mark.parametrize("name", STRATEGIES)
def test_which_sums_a_run_refuses_is_known_from_its_ranks_alone(name: str) -> None:
    """Of one rank and of three, as the table of docs/privacy/index.md has it."""
    keeps = {"strategy.fedsa.average-at-end": False} if name == "fedsa" else {}
    sums = {**NAMED, **keeps, "strategy.name": name, "secure.aggregation": True}
    refused = {}
    for which, ranks in (("one", "8"), ("any", "4,8,16")):
        config = Config.read({**sums, "clients.count": 9, "clients.ranks": ranks})
        refused[which] = bool([*together.problems(config, config.build_strategy())])
    said = {row["ranks"].split()[0] for row in SUMS if f"`{name}`" in row["strategies"]}
    assert refused == {"one": not said & {"one", "any"}, "any": "any" not in said}


def test_what_nodes_may_say_otherwise_is_left_to_them() -> None:
    """The counterexample: ranks of the nodes' cores, or by a pattern of modules, are not known."""
    sums = {**NAMED, **SECURE, "strategy.name": "fedex", "clients.ranks": "4,8"}
    for more in ({"ranks.policy": "capability"}, {"lora.rank-pattern": "value=2"}):
        config = Config.read({**sums, **more})
        assert not [*together.problems(config, config.build_strategy())]


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_says_of_the_clients_is_in_the_list_and_in_the_servers(name: str) -> None:
    config = Config.read({**NAMED, "strategy.name": name})
    for ranks in ((2, 3, 5), (30, 30, 30)):
        own = [*config.build_strategy().problems(clients(ranks))]
        assert [*preflight.problems(config, clients(ranks))] == own
        assert [*admission.problems(config, config.build_strategy(), clients(ranks))] == own


# -- who asks ----------------------------------------------------------------------------------

BELOW = ("lora", "strategies", "config", "training", "privacy", "reports", "federation")


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names)


def test_nothing_below_preflight_asks_it() -> None:
    """What it asks cannot ask it back: neither in functions nor for types."""
    for room in BELOW:
        for path in (ROOT / "fedlora" / room).rglob("*.py"):
            found = [m for m in imported(path) if m.startswith("fedlora.preflight")]
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_the_config_knows_no_combinations() -> None:
    """It parses keys: what imports it can be asked of nothing that it imports."""
    for path in (ROOT / "fedlora" / "config").rglob("*.py"):
        ours = {m for m in imported(path) if m.startswith("fedlora.")}
        allowed = ("fedlora.config.", "fedlora.strategies", "fedlora.errors", "fedlora.moved")
        assert all(m.startswith(allowed) for m in ours), path.name
    assert Config.read({**SECURE, **CENTRAL, "lora.form": "boft"}).lora.form == "boft"


def asked(kind: str, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Message:
    grid = LocalGrid(client_app, 1, {})
    digest = Config.read(run_config).identity()
    job = Job(1, "run", "start", 0, {}, 0, 0, "", (), config=digest).record()
    message = Message(RecordDict({"job": job}), 1000, "train" if kind == "train" else "query")
    _name(message)
    context = grid.contexts[1000]
    context.run_config, context.node_config = dict(run_config), dict(node_config)
    return answer(kind, message, context)


def test_to_be_told_what_cannot_run_imports_no_model_library() -> None:
    code = "import sys, fedlora.preflight as p; [*p.problems(p.Config())]; print(*sys.modules)"
    loaded = python(code).stdout.split()
    assert "fedlora.preflight" in loaded
    assert not {"transformers", "peft", "opacus", "flwr"} & set(loaded)


def test_a_node_refuses_what_its_own_settings_make_impossible() -> None:
    """Its limit on epsilon under a run whose noise is the server's: before the handler."""
    limited = {"partition-id": 0, "max-epsilon": 2.0}
    reply = asked("train", Config.read(CENTRAL).flat(), limited)
    assert reply.error.code == Code.FAILED
    assert str(reply.error.reason).startswith("ConfigError: ")
    assert "privacy.max-epsilon" in str(reply.error.reason)
    whole = asked("train", Config.read(CENTRAL).flat(), {**limited, "own-machine": True})
    assert "is this node's limit" in str(whole.error.reason)
    other = asked("train", Config.read(DP).flat(), limited)
    assert "privacy.max-epsilon" not in str(other.error.reason)


def test_a_node_says_who_it_is_whatever_its_config() -> None:
    reply = asked("query", Config.read(CENTRAL).flat(), {"partition-id": 7, "max-epsilon": 2.0})
    assert reply.content.config_records["facts"]["client"] == 7


def test_a_config_is_checked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(preflight, "problems", lambda c: calls.append(c) or iter(()))
    run_config = Config.read({"run.seed": 77}).flat()
    for _ in range(3):
        asked("train", run_config, {"partition-id": 0})
    assert len(calls) == 1
    client_reply._problems.cache_clear()


def test_a_server_that_does_not_ask_gets_nothing_from_a_node_that_does(settings: Settings) -> None:
    config = Config.read(given_of(settings, "fedavg", "bert", {**CENTRAL,
                                  "output.keep-updates": True}))  # fmt: skip
    grid = LocalGrid(client_app, 3, config.flat(), 1)
    with grid, pytest.raises(RoundError, match="as it came, un-noised"):
        FederatedLora(config).start(grid)


@pytest.mark.parametrize("more", [{}, {"ranks.policy": "share", "ranks.shares": "2:0.5,3:0.5"}])
def test_a_great_many_clients_take_no_more_memory_to_check_than_a_few(
    settings: Settings, more: dict[str, object]
) -> None:
    tracemalloc.start()
    preflight.read({**settings(**quick("fedex")), **more, "clients.count": 10**6})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6, "bytes"
