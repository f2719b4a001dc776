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
    """The picture as SVG."""
    rows = floors()
    width = max(len(row) for row in rows) * (W + GAP) + 240
    place = {}
    for n, row in enumerate(rows):
        left = (width - len(row) * (W + GAP) + GAP) / 2
        for i, room in enumerate(row):
            place[room] = left + i * (W + GAP), 20 + n * FLOOR
    lines = []
    for (a, b), n in sorted(arrows().items()):
        if a not in place or b not in place:
            continue
        (x0, y0), (x1, y1) = place[a], place[b]
        far = (y1 - y0) / FLOOR
        start, end = (x0 + W / 2, y0 + H), (x1 + W / 2, y1)
        side = 0 if far <= 1 else (1 if (len(a) + len(b)) % 2 else -1) * (30 + 22 * far)
        middle = (start[0] + end[0]) / 2 + side * 2, (start[1] + end[1]) / 2
        lines.append(
            f'<path d="M{start[0]:.0f} {start[1]:.0f} Q{middle[0]:.0f} {middle[1]:.0f} '
            f'{end[0]:.0f} {end[1]:.0f}" stroke-width="{0.6 + min(n, 60) / 20:.1f}">'
            f"<title>{a} imports {b}: {n}</title></path>"
        )
    boxes = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{W}" height="{H}" rx="6"/>'
        f'<text x="{x + W / 2:.0f}" y="{y + H / 2 + 5:.0f}">{room}</text>'
        for room, (x, y) in place.items()
    ]
    height = 20 + len(rows) * FLOOR
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">\n'
        f'<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0 0 L6 3 L0 6z" fill="{INK}"/></marker></defs>\n'
        f'<g fill="none" stroke="{INK}" stroke-opacity="0.45" marker-end="url(#tip)">\n'
        + "\n".join(line.replace("<path ", '<path marker-end="url(#tip)" ') for line in lines)
        + f'\n</g>\n<g fill="#eef2ff" stroke="{INK}">\n'
        + "\n".join(b.replace("<text", f'<text fill="{INK}" stroke="none"') for b in boxes)
        + "\n</g>\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
