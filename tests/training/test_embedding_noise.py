"""NEFTune: which embeddings get noise, of what size, from which stream, and when not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.lora.adapter import Factors
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.rehearsal import check_private
from fedlora.privacy.training import Payments, private_fit
from fedlora.strategies.base import Download
from fedlora.training import embedding_noise, train
from fedlora.training.data.batches import collate, inputs_of
from fedlora.training.embedding_noise import embeddings, noised
from fedlora.training.evaluate import evaluate
from fedlora.training.training_check import check_training
from tests.support.private_setting import Setting
from tests.support.task_rows import task_settings

Settings = Callable[..., dict[str, object]]
ALPHA = 5.0


def setting(settings: Settings, case: str, tmp_path: Any, **more: object) -> Setting:
    given = {"train.neftune-noise-alpha": ALPHA, "model.dropout": 0.0, **more}
    return Setting(task_settings(settings, case, tmp_path, **given))


def without(config: Config) -> Config:
    train = config.train.model_copy(update={"neftune_noise_alpha": 0.0})
    return config.model_copy(update={"train": train})


def what_is_read(s: Setting, batch: Any) -> list[torch.Tensor]:
    """What each embedding of tokens gives the model in one pass, noise and all."""
    found: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda *call: found.append(call[-1].detach()))
        for m in embeddings(s.model.peft.get_base_model())
    ]
    s.model.run(**inputs_of(batch))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("case", "halves"), [("causal-lm", 1), ("classification", 1), ("seq2seq", 2), ("bart", 2)]
)
def test_noise_is_uniform_within_alpha_over_the_root_of_l_d_and_seeded_by_round_and_client(
    settings, tmp_path, case, halves
):
    """The numbers that the stream of (seed, round, client) gives, in the order of
    reading; T5's and BART's own modules, which `get_input_embeddings` does not name, too."""
    s = setting(settings, case, tmp_path)
    batch = collate(s.rows, torch.arange(8))
    plain = what_is_read(s, batch)
    with train.training(s.model, s.config, 2, 0):
        there = what_is_read(s, batch)
    with train.training(s.model, s.config, 2, 0):
        stream = torch.default_generator.get_state()
    assert len(plain) == len(there) == halves
    generator = torch.Generator()
    generator.set_state(stream)
    for e, noisy in zip(plain, there, strict=True):
        _, L, d = e.shape
        m = ALPHA / math.sqrt(L * d)
        u = (noisy - e).double()
        assert float(u.abs().max()) <= m * (1 + 1e-6)
        assert float(u.abs().max()) > 0.9 * m
        assert float(u.square().mean()) == pytest.approx(m * m / 3, rel=0.2)
        drawn = torch.zeros_like(e).uniform_(-m, m, generator=generator)
        torch.testing.assert_close(u, drawn.double(), rtol=1e-6, atol=1e-6)
    with train.training(s.model, s.config, 3, 0):
        assert not torch.equal(what_is_read(s, batch)[0], there[0])
    with train.training(s.model, s.config, 2, 1):
        assert not torch.equal(what_is_read(s, batch)[0], there[0])


def test_where_transformers_puts_it_t5_would_read_no_noise(settings, tmp_path):
    """The counterexample: the module that Trainer hooks is never called."""
    s = setting(settings, "seq2seq", tmp_path)
    batch, base = collate(s.rows, torch.arange(4)), s.model.peft.get_base_model()
    plain = what_is_read(s, batch)
    s.model.peft.train()
    hook = activate_neftune(base, ALPHA)
    theirs = what_is_read(s, batch)
    deactivate_neftune(base, hook)
    s.model.peft.eval()
    assert all(torch.equal(a, b) for a, b in zip(plain, theirs, strict=True))


def test_scores_and_what_follows_training_are_without_noise(settings, tmp_path):
    s = setting(settings, "causal-lm", tmp_path)
    before = evaluate(s.model, s.rows, without(s.config))
    assert evaluate(s.model, s.rows, s.config) == before
    with train.training(s.model, s.config, 1, 0):
        assert evaluate(s.model, s.rows, s.config) == before  # while a client trains
        s.model.peft.train()
    assert all(not m._forward_hooks for m in embeddings(s.model.peft.get_base_model()))
    assert not hasattr(embeddings(s.model.peft.get_base_model())[0], "neftune_noise_alpha")


def test_a_client_trains_with_noise_and_the_same_the_second_time(settings, tmp_path):
    """Its training check has passed first, on the same noise before and after a change."""
    s = setting(settings, "causal-lm", tmp_path, **{"train.steps": 2})
    s.model.peft.float()
    check_training(s.model, s.rows, s.columns, s.config, 1, 0)
    home, quiet = s.model.read(), without(s.config)
    found = []
    for config in (s.config, s.config, quiet):
        s.model.load(home)
        train.fit(s.model, s.rows, s.columns, config, 1, 0)
        found.append(s.model.read().B)
    one, again, plain = found
    assert all(torch.equal(x, again[m]) for m, x in one.items())
    assert not any(torch.equal(x, plain[m]) for m, x in one.items())


DP = {"privacy.noise-multiplier": 1.0, "train.epochs": 1.0}


def test_a_private_client_trains_with_noise_that_no_seed_of_the_run_tells(settings, tmp_path):
    """With noise on the gradients from a seed, for once, what is left is that on embeddings."""
    s = setting(settings, "causal-lm", tmp_path, **DP)
    s.model.peft.float()
    download = Download(Factors(), s.columns)
    check_private(s.model, download, s.config, 1, 0)  # the plain step and the private one
    reads, real = list[torch.Tensor](), embedding_noise.neftune_post_forward_hook
    stack = pytest.MonkeyPatch()
    stack.setattr(embedding_noise, "neftune_post_forward_hook",
                  lambda *a: reads.append(real(*a) - a[-1]))  # fmt: skip
    plan_of = {"train.max-steps": 1, "privacy.sample-rate": 1.0}
    config = Config.read({**s.config.flat(), **plan_of})
    for round in (1, 1):
        ledger = Ledger(tmp_path / f"{len(reads)}")
        private_fit(s.model, s.rows, s.columns, config, round, 0, None, Payments(ledger))
    stack.undo()
    assert reads
    assert len(reads) % 2 == 0
    half = len(reads) // 2
    assert not torch.equal(reads[0], reads[half])
    assert all(float(u.abs().max()) <= ALPHA / math.sqrt(u[0].numel()) * 1.001 for u in reads)


def test_a_model_without_embeddings_of_tokens_is_refused():
    with pytest.raises(ModelError, match="has no table of embeddings"), noised(torch.nn.Tanh(), 1):
        pass
