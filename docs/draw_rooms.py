"""Draw docs/rooms.svg from the imports: `python docs/draw_rooms.py`.

A box is a room, a row a floor; an arrow says that a room imports another, and how often. Floors are
those of .importlinter, so every arrow points down, or the linter fails.
"""

import configparser
from collections import Counter
from pathlib import Path

import grimp

DOCS = Path(__file__).parent
PICTURE = DOCS / "rooms.svg"
W, H, GAP, FLOOR = 132, 40, 24, 92
INK = "#334155"


def floors() -> list[list[str]]:
    """The rooms of each floor, the top first."""
    linter = configparser.ConfigParser()
    linter.read(DOCS.parent / ".importlinter")
    lines = linter["importlinter:contract:rooms"]["layers"].split("\n")
    rooms = [[r.strip(" ()") for r in line.split("|")] for line in lines if line.strip()]
    have = set(grimp.build_graph("fedlora").find_children("fedlora"))
    return [kept for floor in rooms if (kept := [r for r in floor if f"fedlora.{r}" in have])]


def arrows() -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another."""
    graph, found = grimp.build_graph("fedlora"), Counter[tuple[str, str]]()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            a, b = (name.split(".")[1:2] for name in (module, other))
            if a and b and a != b:
                found[a[0], b[0]] += 1
    return found


def draw() -> str:
    """The picture as SVG. The lowest floor has no arrows: everybody imports it."""
    rows = floors()
    width = max(len(row) for row in rows) * (W + GAP) + 240
    place = {}
    for n, row in enumerate(rows):
        left = (width - len(row) * (W + GAP) + GAP) / 2
        for i, room in enumerate(row):
            place[room] = left + i * (W + GAP), 20 + n * FLOOR
    lines = [
        _line(place[a], place[b], n, f"{a} imports {b}: {n}")
        for (a, b), n in sorted(arrows().items())
        if a in place and b in place and b not in rows[-1]
    ]
    boxes = [f'<rect x="{x:.0f}" y="{y}" width="{W}" height="{H}" rx="6"/>'
             for x, y in place.values()]  # fmt: skip
    names = [f'<text x="{x + W / 2:.0f}" y="{y + H / 2 + 5:.0f}">{room}</text>'
             for room, (x, y) in place.items()]  # fmt: skip
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {len(rows) * FLOOR}">',
            '<marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0 0 L6 3 L0 6z" fill="{INK}"/></marker>',
            f'<g fill="none" stroke="{INK}" stroke-opacity="0.45" marker-end="url(#tip)">',
            *lines,
            f'</g>\n<g fill="#eef2ff" stroke="{INK}">',
            *boxes,
            f'</g>\n<g fill="{INK}" font-family="sans-serif" font-size="15" text-anchor="middle">',
            *names,
            "</g>\n</svg>\n",
        ]
    )


def _line(above: tuple[float, int], below: tuple[float, int], n: int, title: str) -> str:
    """From one box's foot to another's head; past the floors between, to the side."""
    (x0, y0), (x1, y1) = above, below
    x0, y0, x1 = x0 + W / 2, y0 + H, x1 + W / 2
    far = (y1 + H - y0) / FLOOR
    side = 0 if far <= 1 else (1 if len(title) % 2 else -1) * (60 + 44 * far)
    x, y = (x0 + x1) / 2 + side, (y0 + y1) / 2
    width = 0.6 + min(n, 60) / 20
    curve = f"M{x0:.0f} {y0} Q{x:.0f} {y:.0f} {x1:.0f} {y1}"
    return f'<path d="{curve}" stroke-width="{width:.1f}"><title>{title}</title></path>'


if __name__ == "__main__":
    PICTURE.write_text(draw())
