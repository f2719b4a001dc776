"""Batches of inputs that are no tokens: whoever counts examples counts labels."""

import re
from pathlib import Path

import torch

import fedlora
from fedlora.training.data.batches import alone, examples_in, inputs_of, tokens_in
from fedlora.training.train import microbatches

PICTURES = {"pixel_values": torch.arange(5 * 3 * 2 * 2.0).view(5, 3, 2, 2),
            "labels": torch.arange(5)}  # fmt: skip


def test_a_batch_without_tokens_is_counted_by_its_labels_and_cut_into_parts() -> None:
    assert examples_in(PICTURES) == tokens_in(PICTURES) == 5
    parts = [*microbatches(PICTURES, 2)]
    assert [examples_in(part) for part in parts] == [2, 2, 1]
    for key, x in PICTURES.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), x)
    assert inputs_of(PICTURES).keys() == {"pixel_values"}


def test_an_example_without_a_mask_is_alone_as_it_is() -> None:
    one = alone(PICTURES, 3)
    assert torch.equal(one["pixel_values"], PICTURES["pixel_values"][3:4])
    assert one["labels"].tolist() == [3]


def test_nobody_counts_a_batchs_examples_by_its_tokens() -> None:
    files = Path(fedlora.__file__).parent.rglob("*.py")
    counts = re.compile(r"""len\(\w+(\[0\])?\[["']input_ids["']\]\)""")
    assert not [file.name for file in files if counts.search(file.read_text("utf-8"))]
