"""Made-up pictures of three shapes, in a folder a class: the sample of image-classification."""

import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

TASK = "image-classification"
FOLDER = "pictures"
SHAPES = ("circle", "square", "stripes")
EACH, SIZE = 60, 48


def rows(_: random.Random) -> Iterator[str]:
    """What a row is, as the README shows it."""
    yield f"{FOLDER}/{SHAPES[0]}/0.png, a row of the class {SHAPES[0]}"


def draw(folder: Path) -> None:
    """Write the files, always the same ones."""
    chance = random.Random(0)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for n in range(EACH):
            picture(chance, shape).save(folder / shape / f"{n}.png")


def picture(chance: random.Random, shape: str, size: int = SIZE) -> Image.Image:
    """One of them: its colours, its place and its size are drawn, and none tells the class."""
    ground, ink = (tuple(chance.randrange(256) for _ in range(3)) for _ in range(2))
    if sum(abs(a - b) for a, b in zip(ground, ink, strict=True)) < 160:
        ink = tuple((x + 128) % 256 for x in ground)
    found = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(found)
    across = chance.randint(size // 3, 2 * size // 3)
    left, top = (chance.randint(0, size - across) for _ in range(2))
    box = (left, top, left + across, top + across)
    if shape == "circle":
        pen.ellipse(box, fill=ink)
    elif shape == "square":
        pen.rectangle(box, fill=ink)
    else:
        for y in range(top, top + across, max(2, size // 8)):
            pen.rectangle((left, y, left + across, y + size // 16), fill=ink)
    return found
