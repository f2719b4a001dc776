"""One label a picture, by a transformer of pictures (ViT, DeiT, Swin, ...).

    loss of an example     cross entropy, with train.label-smoothing: tasks/classes.py
    scores                 accuracy, macro_f1, loss (nats, the mean over examples)

Reads data.image and data.label, or a folder with one folder a class (data/picture_folder.py). What
is read of a picture, and which are left out: data/pictures.py. Labels: data/labels.py.

A picture becomes numbers by the image processor that lies beside the model, alone, as its batch is
made; nothing is drawn at random, so there is no augmentation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.batches import SYNTHETIC, Batch, Encoded, Pixels
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.labels import as_label, labels_of
from fedlora.training.data.pictures import (
    Picture,
    Unreadable,
    as_text,
    looked_at,
    opened,
    pictures_of,
)
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table, column
from fedlora.training.tasks import classes
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.parts import Parts

SMALL = 8
"""Pixels on a side of what the baseline without a model sees."""


@dataclass(frozen=True)
class ImageClassification:
    """See the top of this file."""

    name = "image-classification"
    auto = "AutoModelForImageClassification"
    what = "image classifier"
    peft = ""
    hub = "image-classification"
    headed = pictured = True
    pooled = answers = generates = shifted = False
    predicts = "classes"

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        if table.names == [data.image]:
            raise DataError(
                f"{where} has pictures and no class of any: data.path names the directory in which "
                "each class is a folder"
            )
        read = [as_label(x) for x in column(table, where, "data.label", data.label)]
        label = [renames.get(x, x) for x in read]
        found = pictures_of(table, where, "data.image", data.image)
        digests, left = looked_at(found, where, lambda i: f"{table.unit} {table.lines[i]}")
        there = ["a picture" if picture else "" for picture in found]
        return Columns(
            digests,
            label,
            picture=found,
            unfit=left,
            needed=[Needed(data.image, there), Needed(data.label, label)],
            mapped=read,
        )

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        return labels_of(rows, data)

    def names(self, rows: Rows) -> Sequence[str]:
        return rows.label

    def mapped(self, rows: Rows) -> Sequence[str]:
        return rows.label

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        return {data.image: [as_text(x) for x in rows.picture], data.label: rows.label}

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        """No picture is decoded yet. `tokenizer` is the image processor."""
        index = {label: i for i, label in enumerate(labels)}
        numbers = torch.tensor([index[label] for label in rows.label], dtype=torch.long)
        return _examples(Pixels(rows.picture, partial(_made, tokenizer)), numbers)

    def made_up(
        self,
        tokenizer: Any,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        """As many as there are lengths, of random numbers where pixels would be."""
        shape = _numbers(tokenizer, Image.new("RGB", (32, 32))).shape
        generator = torch.Generator().manual_seed(0)
        found = torch.randn(len(lengths), *shape, generator=generator)
        numbers = torch.randint(max(len(labels), 1), (len(lengths),), generator=generator)
        return _examples(Pixels([*found], lambda x: x), numbers)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        return classes.losses(net, batch)

    def defined(self, net: Net, batch: Batch) -> Tensor:
        return classes.defined(net, batch)

    def scored(self, encoded: Encoded) -> Tensor:
        return torch.ones(len(encoded), dtype=torch.long)

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        return classes.score(net, rows, config)

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        return classes.parts(net, rows, config)

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        from fedlora.training import baselines  # scikit-learn takes a second to import

        small = f"{SMALL} x {SMALL} pixels + logistic regression"
        found: dict[str, Callable[[], Scores]] = {
            "majority class": lambda: baselines.majority(corpus),
            small: lambda: baselines.trained_head(corpus, thumbnails),
        }
        if features is not None:
            found["trained head only"] = lambda: baselines.trained_head(corpus, features)
        return found

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return classes.label_options(labels)

    def script(self, data: DataConfig, end: int | None) -> str:
        return """
from PIL import Image, ImageOps

picture = Image.new("RGB", (64, 48), "green")  # yours: Image.open("picture.jpg")
upright = ImageOps.exif_transpose(picture).convert("RGB")
for row in logits(processor([upright], return_tensors="pt")).softmax(-1):
    print(LABELS[int(row.argmax())], float(row.max()))
"""


def thumbnails(rows: Rows) -> Tensor:
    """Each picture shrunk to SMALL x SMALL pixels, (n, 3 SMALL^2) in 0 to 1."""
    small = [opened(x).resize((SMALL, SMALL), Image.Resampling.BOX) for x in rows.picture]
    found = [torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8) for x in small]
    return torch.stack(found).float() / 255


def _examples(pixels: Pixels, classes: Tensor) -> Encoded:
    n = len(classes)
    none = torch.empty(0, dtype=torch.int32)
    starts = torch.zeros(n + 1, dtype=torch.long)
    return Encoded(none, starts, torch.arange(n), 0, classes=classes, pixels=pixels)


def _made(processor: Any, picture: Picture) -> Tensor:
    """The numbers of an encoded picture that was whole when the rows were read.

    Raises:
        DataError: it is no longer.
    """
    try:
        return _numbers(processor, opened(picture))
    except Unreadable as e:
        where = picture if isinstance(picture, str) else "a picture of a table"
        raise DataError(f"{where} has changed since its row was read: it is one {e}") from e


def _numbers(processor: Any, picture: Image.Image) -> Tensor:
    """(channels, height, width), whatever is beside it in a batch."""
    found: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    return found.float()
