"""The adapter forms as lines of text that fit a terminal: what `fedlora forms` prints."""

import textwrap
from collections.abc import Iterator

from fedlora.strategies import forms

LEAST = 40
"""Columns below which nothing is wrapped further."""


def lines(width: int) -> Iterator[str]:
    """Each form: its name, its law and size, f(x), and what strategies make of it."""
    width = max(width, LEAST)
    for name, form in forms.FORMS.items():
        size = f"; clients.ranks is {form.size}" if form.size else ""
        yield f"{name}: {form.law}{size}"
        yield from _wrapped(f"f(x) = {form.change}", width)
        for words, names in forms.verdicts(form).items():
            if names and words != "refused":
                yield from _wrapped(f"{SAID[words]}: {forms.shortly(names)}", width)
    yield ""
    for init, text in forms.INITS.items():
        yield from _wrapped(f"lora.init = {init}: {text}", width, "")
    yield ""
    left_out = ", ".join(sorted({*forms.LEFT_OUT, *forms.INITS_LEFT_OUT}))
    yield from _wrapped(f"Not here: {left_out}; naming one says why and what to use.", width, "")


SAID = {"exact": "exact", "shared": "exact, of what is shared", "approximate": "logged"}
"""What a strategy guarantees of a form, as the list has it."""


def _wrapped(text: str, width: int, indent: str = "    ") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
