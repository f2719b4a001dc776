"""Tiny models and data made on the spot: no hub, no download, seconds for a whole federation."""

import gc
import json
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import pytest
import torch

torch.set_num_threads(1)

WORDS = (
    "red green blue cat dog bird one two three up down left right what who where is the".split()  # noqa: SIM905
)
LABELS = ("colour", "animal", "number")
CUES = {
    "colour": ["red", "green", "blue"],
    "animal": ["cat", "dog", "bird"],
    "number": ["one", "two", "three"],
}


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS, *LABELS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    fast.save_pretrained(str(directory))


def write_model(kind: str, directory: Path) -> Path:
    """A tiny model whose adapted layers are not square."""
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if kind == "bert":
            config = BertConfig(
                vocab_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=40, max_position_embeddings=64,
            )  # fmt: skip
            model = BertModel(config)
        elif kind == "gpt2":
            config = GPT2Config(
                vocab_size=32, n_positions=64, n_embd=24, n_layer=2, n_head=2, n_inner=40,
                bos_token_id=2, eos_token_id=2,
            )  # fmt: skip
            model = GPT2LMHeadModel(config)
        elif kind == "vit":
            model = tiny_vit(directory)
        else:
            config = LlamaConfig(
                vocab_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64,
                bos_token_id=2, eos_token_id=2,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
    model.save_pretrained(str(directory))
    if kind != "vit":
        write_tokenizer(directory)
    return directory


def tiny_vit(directory: Path):
    """A body of pictures of 16 x 16 pixels in four patches; its image processor is written."""
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(str(directory))
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def pytest_collection_finish() -> None:
    """What is there by now stays, so that no test's garbage collection goes over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of tiny "bert", "gpt2", "llama" and "vit" models and of "rows", a JSONL of 150
    questions."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def write_tiny(root: Path) -> dict[str, str]:
    """What the fixture `tiny` gives, below this directory."""
    paths = {kind: str(write_model(kind, root / kind)) for kind in ("bert", "gpt2", "llama", "vit")}
    chance = random.Random(3)
    rows = []
    for n in range(150):
        label = LABELS[n % 3]
        words = [chance.choice(WORDS) for _ in range(chance.randint(2, 6))]
        words.insert(chance.randint(0, len(words)), chance.choice(CUES[label]))
        text = f"{' '.join(words)} {WORDS[n % 18]} {WORDS[n // 18]}"
        rows.append({"text": text, "label": label, "response": f" {label}"})
    paths["rows"] = str(root / "rows.jsonl")
    Path(paths["rows"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture(autouse=True, scope="session")
def no_power_cuts() -> Iterator[None]:
    """Nothing waits for the disk: what fsync adds only a power cut could show, and none comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


TARGETS = {
    "bert": "query,value,intermediate.dense",
    "gpt2": "c_attn,c_fc",
    "llama": "q_proj,v_proj",
    "vit": "q_proj,v_proj,fc1",
}


@pytest.fixture(params=("float32", "bfloat16"))
def precision(request: pytest.FixtureRequest) -> str:
    """train.precision, forced: a test that uses this runs in both, whatever the processor has."""
    found: str = request.param
    return found


@pytest.fixture
def settings(tiny: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest):
    """A run config of a tiny federation: `settings("gpt2", **{"run.rounds": 2})`.

    In float32, but for tests that use `precision`.
    """
    given = "float32"
    if "precision" in request.fixturenames:
        given = request.getfixturevalue("precision")
    return partial(tiny_settings, tiny, tmp_path, given)


def tiny_settings(
    tiny: dict[str, str], out: Path, precision: str, kind: str = "bert", **changes: object
) -> dict[str, object]:
    """What the fixture `settings` gives, for fixtures of a wider scope."""
    given: dict[str, object] = {
        "run.out": str(out),
        "run.name": "run",
        "run.rounds": 3,
        "model.path": tiny[kind],
        "model.task": "classification" if kind == "bert" else "causal-lm",
        "data.path": tiny["rows"],
        "data.prompt": "" if kind == "bert" else "text",
        "data.test-size": 30,
        "data.partition": "iid",
        "clients.count": 4,
        "clients.ranks": "2,3,5",
        "lora.target-modules": TARGETS[kind],
        "train.batch-size": 8,
        "train.lr": 0.05,
        "train.precision": precision,
        "train.optimizer": "adamw",
        "model.pooling": "default",
        "lora.layers": "",
        "evaluate.baselines": False,
        "evaluate.generate-tokens": 0,
        "output.plots": False,
        "simulate.workers": 1,
    }
    return {**given, **changes}


@pytest.fixture
def cards():
    """Two pretend accelerators, which this machine has for the length of the test."""
    from tests.support import pretend_device

    if os.environ.get(TEST_CARD, pretend_device.NAME).split(":")[0] != pretend_device.NAME:
        pytest.skip(f"of the pretend cards alone, and {TEST_CARD} names a real one")
    with pretend_device.cards() as found:
        yield found
        forget_cards()


TEST_CARD = "FEDLORA_TEST_CARD"
"""In the environment: a card of this machine, "cuda:0", for tests that ask for `card`."""


@pytest.fixture
def card(request: pytest.FixtureRequest):
    """The name of a card that this machine has for the length of the test: a real one where
    FEDLORA_TEST_CARD names it, else a pretend one."""
    given = os.environ.get(TEST_CARD, "pretend:1")
    if given.startswith("pretend:"):
        request.getfixturevalue("cards")
    yield given
    forget_cards()


def forget_cards() -> None:
    """Let go of what the caches keep of a test on a card."""
    from fedlora.training import cache

    cache._model.key = cache._model.value = None
    cache.encoded.cache_clear()
    gc.collect()


@pytest.fixture(scope="session")
def plain_process():
    """A process without fedlora that is started once."""
    from tests.support.plain_process import PlainProcess

    return PlainProcess()


@pytest.fixture(autouse=True)
def exports_reload_in_one_process(monkeypatch: pytest.MonkeyPatch, request):
    """Exports are checked in a process without fedlora, one for all tests of a worker.

    `@pytest.mark.fresh`: in a new one each, as users have it.
    """
    if request.node.get_closest_marker("fresh") is None:
        from fedlora.launch import fresh_process

        served = request.getfixturevalue("plain_process")
        monkeypatch.setattr(fresh_process, "run_script", served)
