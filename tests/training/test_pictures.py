"""Pictures as rows: which are read, which are left out, one digest a picture; their pixels."""

import io
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedlora import export, simulate
from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import DataError, ModelError, PrivacyError
from fedlora.launch.sample_pictures import SHAPES, draw, picture
from fedlora.privacy.probe import check_apart
from fedlora.training import cache
from fedlora.training.data import pictures
from fedlora.training.data.batches import collate
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.pictures import as_text, digest_of, opened
from fedlora.training.model.loading import load_base
from fedlora.training.model.processor import load_processor
from fedlora.training.model.targets import targeted
from fedlora.training.tasks.image_classification import SMALL, thumbnails
from tests.support.by_task import load
from tests.support.private_setting import Setting
from tests.support.task_rows import task_settings

Settings = Callable[..., dict[str, object]]
TASK = "image-classification"


def noise(n: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Image.Image:
    chance = random.Random(n)
    made = Image.new("RGB", size)
    made.putdata([tuple(chance.randrange(256) for _ in range(3)) for _ in range(size[0] * size[1])])
    return made.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def folder(root: Path, each: int = 12) -> Path:
    for k, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for n in range(each):
            (root / name / f"{n:02}.png").write_bytes(encoded(noise(100 * k + n)))
    return root


def corpus(path: Path | str, **changes: Any) -> Corpus:
    how = {"path": str(path), "partition": "iid", "test_size": 4, **changes}
    return load(DataConfig(**how), TASK, 2, 0)


def rows_of(found: Corpus) -> list[tuple[str, str]]:
    parts = [found.test, *(x for c in found.clients for x in (c.train, c.test))]
    return sorted(row for p in parts for row in zip(p.text, p.label, strict=True))


def left_of(found: Corpus) -> dict[str, int]:
    return {x.why: x.rows for s in found.account.sources for x in s.left}


# -- which are read -------------------------------------------------------------------------------


def test_what_is_no_whole_picture_is_left_out_and_counted_by_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cats = folder(tmp_path / "pets") / "cat"
    whole = (cats / "00.png").read_bytes()
    (cats / "cut.png").write_bytes(encoded(noise(7, (60, 60)))[:-2000])
    (cats / "cut.jpg").write_bytes(encoded(noise(7, (60, 60)), "JPEG")[:-900])
    (cats / "notes.txt").write_text("of the cats")
    (cats / "none.png").write_bytes(b"")
    (cats / "deep.png").write_bytes(encoded(Image.fromarray(np.full((4, 4), 40000, np.uint16))))
    (cats / "copy.bmp").write_bytes(encoded(Image.open(io.BytesIO(whole)), "BMP"))
    (cats / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (cats / ".DS_Store").write_text("hidden")
    (tmp_path / "pets" / "empty").mkdir()
    (tmp_path / "pets" / "LICENSE").write_text("of the set")
    found = corpus(tmp_path / "pets")
    assert left_of(found) == {
        pictures.DAMAGED: 2, pictures.NONE: 2, pictures.DEEP: 1, pictures.ABSENT: 1,
        "equal to an earlier row": 1,
    }  # fmt: skip
    (source,) = found.account.sources
    assert source.read == 31
    assert source.unit == "file"
    assert source.notes == ('no file in "empty", which is no class',
                            "1 files in no class's folder not read")  # fmt: skip
    assert found.labels == ("cat", "dog")
    assert len(rows_of(found)) == 24
    assert "cut.jpg" in caplog.text


def test_where_no_picture_is_left_it_says_why(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of its 2 rows is left: 2 without a picture in it"):
        corpus(tmp_path)


def test_a_picture_of_more_pixels_than_anyone_photographs_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "MOST", 23)
    with pytest.raises(pictures.Unreadable) as told:
        opened(encoded(noise(1)))
    assert told.value.why == pictures.LARGE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_eight_bits_becomes_what_pillow_makes_of_it(mode: str) -> None:
    made = noise(3, mode=mode)
    file = encoded(made, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    want = Image.open(io.BytesIO(file)).convert("RGB")
    assert np.array_equal(np.asarray(opened(file)), np.asarray(want))


def test_transparency_is_dropped_and_not_blended() -> None:
    made = noise(3).convert("RGBA")
    made.putalpha(0)
    assert np.array_equal(np.asarray(opened(encoded(made))), np.asarray(noise(3)))


def test_a_phones_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    found = opened(encoded(noise(5), exif=exif))
    assert np.array_equal(np.asarray(found), np.rot90(np.asarray(noise(5)), 3))


def test_a_picture_has_one_digest_whatever_its_file() -> None:
    same = {digest_of(opened(encoded(noise(2), kind))) for kind in ("PNG", "BMP", "TIFF", "PPM")}
    assert len(same) == 1
    assert digest_of(opened(encoded(noise(2, (4, 6))))) not in same
    turned = Image.frombytes("RGB", (4, 6), noise(2).tobytes())  # the same numbers
    assert digest_of(turned) not in same


def test_copies_of_a_test_picture_are_in_no_training(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets")
    for name in ("cat", "dog"):
        for n in range(12):
            copy = opened((root / name / f"{n:02}.png").read_bytes())
            copy.save(root / name / f"copy-{n}.bmp")
    found = corpus(root)
    assert left_of(found) == {"equal to an earlier row": 24}
    kept = {key for c in found.clients for part in (c.train, c.test) for key in part.keys}
    assert not kept & {*found.test.keys}


# -- where they lie -------------------------------------------------------------------------------


def test_the_same_pictures_are_the_same_rows_wherever_they_lie(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets")
    want = rows_of(corpus(root))
    files = [(p, p.parent.name) for p in sorted(root.rglob("*.png"))]
    contents = [(p.read_bytes(), label) for p, label in files]
    given: dict[str, str] = {}
    (root / "paths.csv").write_text(
        "\n".join(["image,label", *(f"{p.relative_to(root)},{label}" for p, label in files)])
    )
    given["paths"] = str(root / "paths.csv")
    lines = [json.dumps({"image": as_text(x), "label": label}) for x, label in contents]
    (tmp_path / "uris.jsonl").write_text("\n".join(lines))
    given["uris"] = str(tmp_path / "uris.jsonl")
    columns = {"image": [x for x, _ in contents], "label": [label for _, label in contents]}
    structs = {**columns, "image": [{"bytes": x, "path": None} for x in columns["image"]]}
    Dataset.from_dict(columns).to_parquet(given.setdefault("bytes", f"{tmp_path}/bytes.parquet"))
    Dataset.from_dict(structs).to_parquet(given.setdefault("struct", f"{tmp_path}/struct.parquet"))
    images = Dataset.from_dict(structs).cast_column("image", ImageFeature())
    images.to_parquet(given.setdefault("parquet", f"{tmp_path}/images.parquet"))
    images.save_to_disk(given.setdefault("arrow", f"{tmp_path}/arrow"))
    for kind, path in given.items():
        assert rows_of(corpus(path)) == want, kind


def test_numbered_classes_keep_their_order(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": encoded(noise(n)), "path": None} for n in range(12)],
            "label": [n % 2 for n in range(12)]}  # fmt: skip
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["zebra", "ant"])})
    Dataset.from_dict(rows, features=features).to_parquet(f"{tmp_path}/x.parquet")
    assert corpus(tmp_path / "x.parquet").labels == ("zebra", "ant")


def test_a_split_is_a_folder_of_the_folders_of_classes(tmp_path: Path) -> None:
    folder(tmp_path / "pets" / "train")
    (tmp_path / "pets" / "test").mkdir()
    found = corpus(tmp_path / "pets", split="train")
    assert found.labels == ("cat", "dog")
    shutil.move(tmp_path / "pets" / "train", tmp_path / "pets" / "val")
    with pytest.raises(
        DataError, match=r'no folder "train" in it; set data.split to one of "test"'
    ):
        corpus(tmp_path / "pets", split="train")


def test_pictures_in_no_folder_of_a_class_are_told_where_classes_are(tmp_path: Path) -> None:
    folder(tmp_path / "pets")
    with pytest.raises(DataError, match=r"no class of any: data\.path names the directory in"):
        corpus(tmp_path / "pets" / "cat")


def test_a_column_without_pictures_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("photo,label\na.png,x\nb.png,y\n")
    with pytest.raises(DataError, match=r'data\.image = "image": .*no such column.*"photo"'):
        corpus(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"none of its 2 rows is left: 2 whose picture's file is n"):
        corpus(tmp_path / "x.csv", image="photo")
    Dataset.from_dict({"image": [1, 2], "label": ["a", "b"]}).to_parquet(f"{tmp_path}/n.parquet")
    with pytest.raises(DataError, match=r"has no pictures there but Value"):
        corpus(tmp_path / "n.parquet")


# -- pixels ---------------------------------------------------------------------------------------


def test_pixels_are_the_processors_own_and_are_made_for_a_batch_alone(
    settings: Settings, tmp_path: Path
) -> None:
    config = Config.read(task_settings(settings, "pictures", tmp_path))
    rows = cache.corpus(config).client(0).train
    model = cache.model(config, cache.corpus(config).labels)
    found = cache.encoded("train", 0, config, model.labels)
    assert found.pixels is not None
    assert all(type(x) is bytes for x in found.pixels.sources), "encoded, as the rows hold them"
    plain = AutoImageProcessor.from_pretrained(config.model.path, backend="pil")
    want = plain([opened(x) for x in rows.picture[:5]], return_tensors="pt")["pixel_values"]
    batch = collate(found, torch.arange(5))
    assert batch.keys() == {"pixel_values", "labels"}
    assert torch.equal(batch["pixel_values"], want)
    some = found.select(torch.tensor([4, 1]))
    assert torch.equal(collate(some, torch.arange(2))["pixel_values"], want[[4, 1]])
    assert thumbnails(rows).shape == (len(rows), 3 * SMALL**2)
    assert model.prefix is None


def test_a_file_that_changed_since_it_was_read_is_named(settings: Settings, tmp_path: Path) -> None:
    root = folder(tmp_path / "pets")
    given = task_settings(settings, "pictures", tmp_path, **{"data.path": str(root),
                          "data.test-size": 4, "clients.count": 2})  # fmt: skip
    config = Config.read(given)
    labels = cache.corpus(config).labels
    found = cache.encoded("train", 0, config, labels)
    assert found.pixels is not None
    Path(found.pixels.sources[0]).write_bytes(b"other")
    with pytest.raises(DataError, match=r"\.png has changed since its row was read"):
        collate(found, torch.arange(2))


def test_a_processor_that_keeps_each_pictures_shape_is_refused(tmp_path: Path) -> None:
    ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path)
    model = Config.read({"model.path": str(tmp_path), "model.task": TASK}).model
    with pytest.raises(ModelError, match=r"of one picture and \(3, 37, 23\) of another"):
        load_processor(str(tmp_path), model)


# -- models ---------------------------------------------------------------------------------------

SHAPE = {"image_size": 16, "num_labels": 3}
WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 40, "patch_size": 8}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "ViT": WIDE, "DeiT": WIDE,
    "Swin": {"patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2],
             "window_size": 4},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
}  # fmt: skip


def written(kind: str, directory: Path) -> Path:
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **KINDS[kind])
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(str(directory))
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size).save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Swin"])
def test_auto_adapts_the_linear_maps_of_attention(tmp_path: Path, kind: str) -> None:
    given = {"model.path": str(written(kind, tmp_path)), "model.task": TASK}
    base = load_base(Config.read(given).model, ("a", "b", "c"), 0)
    linear = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    found = targeted(base, linear, ("auto",))
    assert {n.rpartition(".")[2] for n in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_convolutional_network_is_refused_with_what_to_do(tmp_path: Path) -> None:
    given = {"model.path": str(written("ResNet", tmp_path / "a")), "model.task": TASK}
    with pytest.raises(ModelError, match=r"keeps statistics of a client's own .*choose .* ViT, De"):
        load_base(Config.read(given).model, ("a", "b", "c"), 0)
    given["model.path"] = str(written("ConvNext", tmp_path / "b"))
    base = load_base(Config.read(given).model, ("a", "b", "c"), 0)
    linear = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    with pytest.raises(ModelError, match=r"finds no linear module in this model's attention"):
        targeted(base, linear, ("auto",))


def test_windows_that_mix_examples_are_refused_under_example_level_privacy(
    settings: Settings, tmp_path: Path
) -> None:
    more = {"model.path": str(written("Swin", tmp_path / "swin")), "lora.target-modules": "auto"}
    s = Setting(task_settings(settings, "pictures", tmp_path, **more), torch.float32)
    with pytest.raises(PrivacyError, match=r"does not keep examples apart"):
        check_apart(s.model, s.live)


def test_a_base_in_bfloat16_takes_pixels_in_its_own_precision(
    settings: Settings, tmp_path: Path
) -> None:
    more = {"model.dtype": "bfloat16"}
    config = Config.read(task_settings(settings, "pictures", tmp_path, **more))
    model = cache.model(config, cache.corpus(config).labels)
    batch = collate(cache.encoded("train", 0, config, model.labels), torch.arange(3))
    assert model.logits({"pixel_values": batch["pixel_values"]}).shape == (3, 3)


CARD = r"""
import json, re, sys
sys.modules["fedlora"] = None
known = {}
for block in re.findall(r"^```python\n(.*?)^```", open("README.md").read(), re.M | re.S):
    exec(block, known)
from PIL import Image
batch = known["processor"]([Image.open(sys.argv[1]).convert("RGB")], return_tensors="pt")
print(json.dumps(known["logits"](batch)[0].tolist()))
"""


@pytest.mark.slow
def test_an_export_reads_a_picture_in_plain_transformers_as_its_readme_says(
    settings: Settings, tmp_path: Path
) -> None:
    run = simulate(task_settings(settings, "pictures", tmp_path, **{"run.rounds": 1}))
    noise(9, (20, 30)).save(tmp_path / "one.png")
    said = []
    for merged in (False, True):
        place = tmp_path / f"out-{merged}"
        export(run, place, merged=merged)
        command = [sys.executable, "-P", "-c", CARD, str(tmp_path / "one.png")]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
        told, logits = done.stdout.splitlines()[-2:]
        assert told.split()[0] in run.labels
        said.append(json.loads(logits))
        assert (place / "preprocessor_config.json").is_file()
    assert said[0] == pytest.approx(said[1], rel=1e-4)
    assert len({*said[0]}) == 3


def test_the_sample_pictures_are_the_same_each_time_and_of_three_shapes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / name)
    files = [sorted((tmp_path / name).rglob("*.png")) for name in ("a", "b")]
    assert [x.read_bytes() for x in files[0]] == [x.read_bytes() for x in files[1]]
    assert {x.parent.name for x in files[0]} == {*SHAPES}
    assert picture(random.Random(1), "circle", 16).size == (16, 16)
