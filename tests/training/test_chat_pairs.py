"""Preferences between conversations: every form that files have becomes the same examples."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora import check, export, simulate
from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.chat_pairs import NOTHING, UNLIKE, pair_pieces
from fedlora.training.data.rows import Rows
from fedlora.training.tasks import task_of
from tests.support.by_task import load
from tests.support.task_rows import TEMPLATE, task_settings
from tests.training.test_chat import CHATML, FORGETS, INST, tokenizer

Settings = Callable[..., dict[str, object]]
N = 12


def turns(n: int) -> list[dict[str, str]]:
    """What is asked in row n, after a first answer."""
    said = ("user", f"the cat {n}?"), ("assistant", "It is so."), ("user", f"what is the dog {n}?")
    return [{"role": role, "content": text} for role, text in said]


def answers(n: int) -> list[str]:
    return [f"It is red, thus {n}.", f"no, two {n}"]


def told(n: int) -> list[list[dict[str, str]]]:
    return [[*turns(n), {"role": "assistant", "content": x}] for x in answers(n)]


def ultra(n: int) -> dict[str, Any]:
    chosen, rejected = told(n)
    return {"prompt": turns(n)[-1]["content"], "chosen": chosen, "rejected": rejected}


def trl(n: int) -> dict[str, Any]:
    return {"prompt": turns(n), **{k: x[-1:] for k, x in ultra(n).items() if k != "prompt"}}


def sharegpt(n: int) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    sides = ([{"from": names[m["role"]], "value": m["content"]} for m in x] for x in told(n))
    return dict(zip(("chosen", "rejected"), sides, strict=True))


def hh(n: int) -> dict[str, Any]:
    names = {"user": "Human", "assistant": "Assistant"}
    sides = ("".join(f"\n\n{names[m['role']]}: {m['content']}" for m in x) for x in told(n))
    return dict(zip(("chosen", "rejected"), sides, strict=True))


FORMS = {"ultra": (ultra, {}), "trl": (trl, {"prompt": "prompt"}),
         "sharegpt": (sharegpt, {}), "hh": (hh, {})}  # fmt: skip


def rows_of(path: Path, rows: Sequence[Mapping[str, Any]], **more: Any) -> tuple[Rows, DataConfig]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        path=str(path), messages="chosen", partition="iid", test_size=1,
        client_test_fraction=0.0, **more,
    )  # fmt: skip
    return load(data, "preference", 1, 0).clients[0].train, data


@pytest.mark.parametrize("template", [CHATML, INST, FORGETS])
@pytest.mark.parametrize("form", FORMS)
def test_each_side_is_what_serving_sends_and_the_answer_with_its_end_mark(
    tmp_path: Path, form: str, template: str
) -> None:
    made, more = FORMS[form]
    rows, data = rows_of(tmp_path / "rows.jsonl", [made(n) for n in range(N)], **more)
    assert len(rows) == N - 1
    tok = tokenizer(template)
    encoded = task_of("preference").encode(rows, tok, (), data, 200)
    assert len(encoded) == N - 1
    assert encoded.prompts is not None
    assert encoded.other is not None
    for i, asked in enumerate(json.loads(x) for x in rows.text):
        n = int(asked[0]["content"].split()[-1].rstrip("?"))
        assert asked == turns(n)
        sent = tok.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        for side, answer in zip((encoded, encoded.other), answers(n), strict=True):
            text = tok.decode(side.ids[side.starts[i] : side.starts[i + 1]].tolist())
            space, end = (" ", "</s>") if template == INST else ("", "<|im_end|>")
            assert text == f"{sent}{space}{answer}{end}"
        prompt = tok(sent, add_special_tokens=False)["input_ids"]
        assert encoded.prompts[i] in (len(prompt), len(prompt) + (template == INST))


def test_rows_that_are_written_for_a_node_are_read_as_the_same(tmp_path: Path) -> None:
    for form, (made, more) in FORMS.items():
        rows, data = rows_of(tmp_path / f"{form}.jsonl", [made(n) for n in range(N)], **more)
        columns = task_of("preference").written(rows, data)
        lines = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        again, _ = rows_of(tmp_path / f"{form}-node.jsonl", [*lines, made(N)], **more)
        there = {*zip(again.text, again.response, again.second, strict=True)}
        mine = {*zip(rows.text, rows.response, rows.second, strict=True)}
        assert len(mine - there) <= 1, "but for the one row that is the test's"


def test_a_prompt_that_is_a_text_beside_conversations_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.prompt = .* line 1: must be a list of messages, is "
                                        r".*; where both .* leave data\.prompt empty"):  # fmt: skip
        rows_of(tmp_path / "rows.jsonl", [ultra(n) for n in range(N)], prompt="prompt")


def test_rows_that_are_no_pair_are_left_out_and_counted(
    tmp_path: Path,
) -> None:
    odd = ultra(90)
    odd["rejected"][1] = {"role": "assistant", "content": "An earlier turn differs."}
    apart = ultra(91)
    apart["rejected"] = [{"role": "user", "content": "else"}, *apart["rejected"][1:]]
    same = ultra(92) | {"rejected": ultra(92)["chosen"]}
    bare = ultra(93) | {"rejected": []}
    rows = [*(ultra(n) for n in range(N)), odd, apart, same, bare]
    found, data = rows_of(tmp_path / "rows.jsonl", rows)
    assert len(found) == N  # one is the test's, and `same` is left out as its tokens are made
    encoded = task_of("preference").encode(found, tokenizer(CHATML), (), data, 200)
    assert len(encoded) in (N - 1, N)
    corpus = load(data, "preference", 1, 0)
    said = " ".join(corpus.account.lines())
    for why in (UNLIKE, NOTHING, 'with nothing in "rejected"'):
        assert f"1 {why}" in said


@pytest.mark.parametrize("side", [0, 1])
def test_an_answer_without_a_word_is_left_out_by_that_reason(side: int) -> None:
    """And not compared with the turn before it, which is the assistant's as well."""
    both = [json.dumps([{"role": "assistant", "content": x}]) for x in answers(1)]
    both[side] = json.dumps([{"role": "assistant", "content": " "}])
    found = pair_pieces(json.dumps(turns(1)), both, tokenizer(CHATML))
    assert found == "have an answer without a word"


@pytest.fixture
def pairs(settings: Settings, tmp_path: Path) -> dict[str, object]:
    """The settings of a run of HH-RLHF's transcripts."""
    given = task_settings(settings, "preference", tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(hh(n)) + "\n" for n in range(40)))
    model = tmp_path / "with-template"
    shutil.copytree(str(given["model.path"]), model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return {
        **given, "model.path": str(model), "data.path": str(tmp_path / "pairs.jsonl"),
        "data.messages": "chosen", "data.rejected": "rejected", "data.prompt": "",
        "data.response": "response", "clients.count": 2, "data.test-size": 8, "run.rounds": 1,
    }  # fmt: skip


def test_a_run_of_conversations_is_refused_by_nobody(pairs: dict[str, object]) -> None:
    assert not check(pairs)


@pytest.mark.slow
def test_a_run_of_conversations_trains_and_exports(
    pairs: dict[str, object], tmp_path: Path
) -> None:
    run = simulate(pairs)
    assert run.summary["final"]["examples"] == 8
    assert export(run, tmp_path / "out").deviation < 1e-4
