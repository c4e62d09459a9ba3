"""HTML and SVG as trees. Text and attributes are escaped when the tree is written, never by hand.

Names of jobs, samples and configuration come from outside. They can only become text here: there is
no way to put ready-made markup into a tree, and the page forbids scripts and every outside source.
"""

import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element, tostring

type Child = Element | str | None

COLORS = 10  # classes c0 to c9

_LIGHT = "#2f6fde #d6482c #178a3c #b97400 #8e44ad #0086a8 #c2417f #5b8500 #8a5a2b #5d6b85".split()
_DARK = "#7fb0ff #ff8f73 #62cf83 #ffc04d #d59cff #4fd0ee #ff92c2 #b4d852 #dcae7d #a9b8d6".split()

# What the page may load: its own styles, and nothing else.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def el(tag: str, *children: Child, **attributes: object) -> Element:
    """Returns an element.

    Args:
        tag: its name.
        children: elements and texts in order; None is left out.
        attributes: `class_` for class; `_` becomes `-`; None is left out; numbers are rounded.
    """
    given = {
        name.rstrip("_").replace("_", "-"): _attribute(value)
        for name, value in attributes.items()
        if value is not None
    }
    element = Element(tag, given)
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif child is not None:
            text = _clean(child)
            if last is None:
                element.text = (element.text or "") + text
            else:
                last.tail = (last.tail or "") + text
    return element


def _attribute(value: object) -> str:
    return (
        f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else _clean(str(value))
    )


def _clean(text: str) -> str:
    """Replaces what no document may hold, such as NUL and lone surrogates."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def table(headings: list[str], rows: Sequence[Sequence[Child]]) -> Element:
    """Returns a table in a frame that scrolls; all but the first column are set flush right."""
    head = el("tr", *(el("th", heading, scope="col") for heading in headings))
    body = [el("tr", *(el("td", cell) for cell in row)) for row in rows]
    return el("div", el("table", el("thead", head), el("tbody", *body)), class_="scroll")


def document(body: Element, *, title: str) -> str:
    """Returns the page.

    Args:
        body: its contents, a `main` element.
        title: its title.
    """
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", STYLE + _PAGE_STYLE),
    )
    html = el("html", head, el("body", body), lang="en")
    return "<!doctype html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def picture(svg: Element) -> str:
    """Returns an SVG file that carries its own style, for pages outside of a report."""
    svg.insert(0, el("style", STYLE))
    svg.insert(1, el("rect", width="100%", height="100%", class_="back"))
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    return tostring(svg, encoding="unicode") + "\n"


def _palette(colors: Sequence[str]) -> str:
    return "".join(f"--c{i}:{color};" for i, color in enumerate(colors))


# Colours and the look of drawings; shared by pages and picture files.
STYLE = (
    f":root{{--text:#1c2330;--soft:#5b6677;--line:#d5dae3;--back:#ffffff;--card:#f6f8fb;"
    f"{_palette(_LIGHT)}}}"
    f"@media (prefers-color-scheme: dark){{:root{{--text:#e6eaf2;--soft:#9aa6b8;--line:#3a4454;"
    f"--back:#14181f;--card:#1c222c;{_palette(_DARK)}}}}}"
    + "".join(
        f".s{i}{{stroke:var(--c{i});fill:none}}.f{i}{{fill:var(--c{i})}}" for i in range(COLORS)
    )
    + "svg{max-width:100%;height:auto;display:block}"
    "svg text{font:12px system-ui,sans-serif;fill:var(--soft)}svg .name{fill:var(--text)}"
    ".back{fill:var(--back)}.grid{stroke:var(--line);stroke-width:1;fill:none}.pad{fill:var(--line)}"
    ".thin{stroke-width:1.2;opacity:.8}.bold{stroke-width:2}.edge{stroke:var(--back);stroke-width:1}"
    ".bad{stroke:var(--c1);stroke-width:2;fill:none}"
)

_PAGE_STYLE = (
    "body{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif}"
    "main{max-width:1080px;margin:0 auto;padding:24px 20px 64px}"
    "h1{font-size:1.6rem;margin:0 0 4px;overflow-wrap:anywhere}"
    "h2{font-size:1.15rem;margin:36px 0 10px;border-bottom:1px solid var(--line);"
    "padding-bottom:4px}"
    "h3{font-size:1rem;margin:18px 0 6px}p{margin:6px 0}.soft{color:var(--soft)}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:4px 14px 4px 0;text-align:right;white-space:nowrap}"
    "th{color:var(--soft);font-weight:600;border-bottom:1px solid var(--line)}"
    "th:first-child,td:first-child{text-align:left}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(135px,1fr));gap:10px;"
    "margin:16px 0}.card{background:var(--card);border:1px solid var(--line);border-radius:8px;"
    "padding:10px 12px}.card b{display:block;font-size:1.25rem;overflow-wrap:anywhere}"
    ".charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:16px}"
    "pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;"
    "overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.45 ui-monospace,"
    "monospace}details{margin:8px 0}summary{cursor:pointer}"
    ".legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:6px 0}"
    ".legend svg{display:inline-block;width:12px;height:12px;margin-right:6px}"
)
