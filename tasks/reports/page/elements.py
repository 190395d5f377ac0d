"""HTML, piece by piece: text is escaped where it is put into an element, so nothing can be markup.

```
el("p", "reads ", el("b", "<KAWO>"), class_="a")   # <p class="a">reads <b>&lt;KAWO&gt;</b></p>
```
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

_EMPTY = {"br", "img", "input", "meta", "line", "rect", "path", "circle", "polyline", "polygon"}
MISSING = "\N{EN DASH}"
_SMALL = 128  # pixels; a picture up to this side is shown as it is, its pixels crisp


class Html(str):
    """Text that is HTML already."""


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """Return an element. Children and values of attributes that are no `Html` are escaped.

    A trailing `_` of an attribute's name falls away, another one is a hyphen. None and False leave
    the attribute out, True is one without a value.
    """
    given = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        given.append(f" {name}" if value is True else f' {name}="{escape(str(value))}"')
    opened = f"<{tag}{''.join(given)}>"
    if tag in _EMPTY:
        return Html(f"{opened[:-1]}/>")
    return Html(f"{opened}{joined(children)}</{tag}>")


def joined(children: Iterable[Any]) -> Html:
    """Return pieces one after the other; None is nothing, other text than `Html` is escaped."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escape(str(child))
            for child in children
            if child is not None
        )
    )


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, numbers: int = 0) -> Html:
    """Return a table that scrolls by itself where it is too wide; the last `numbers` columns are
    numbers."""
    first = len(head) - numbers

    def row(tag: str, cells: Sequence[Any]) -> Html:
        return el(
            "tr",
            *(el(tag, cell, class_="n" if i >= first else None) for i, cell in enumerate(cells)),
        )

    body = el("tbody", *(row("td", cells) for cells in rows))
    return el("div", el("table", el("thead", row("th", head)), body), class_="scroll")


def picture(image: Image.Image, alt: str, side: int) -> Html:
    """Return an `img` that carries its picture, its longest side at most `side` pixels."""
    image = image.convert("RGB")
    is_small = max(image.size) <= _SMALL
    if not is_small:
        image.thumbnail((side, side))
    data = io.BytesIO()
    if is_small:
        image.save(data, "PNG")
    else:
        image.save(data, "JPEG", quality=85)
    kind = "png" if is_small else "jpeg"
    return el(
        "img",
        src=f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}",
        alt=alt,
        width=image.width,
        height=image.height,
        class_="crisp" if is_small else None,
    )


def frames(kind: str, figures: Sequence[tuple[str, Html]]) -> Html:
    """Return figures of which a slider shows one; without a script, all. `figures`: label, what."""
    shown = [
        el("figure", what, el("figcaption", label), data_label=label) for label, what in figures
    ]
    if len(shown) == 1:
        return el("div", *shown, class_=f"frames {kind}")
    slider = el(
        "input",
        type="range",
        min=0,
        max=len(shown) - 1,
        value=len(shown) - 1,
        aria_label=f"{kind}: which round",
    )
    chooser = el("p", slider, el("output", figures[-1][0]), class_="chooser")
    return el("div", chooser, *shown, class_=f"frames {kind}")


def number(value: float | None) -> str:
    """Return a number as a table shows it; a dash where it was not measured."""
    return MISSING if value is None else f"{value:.4g}"
