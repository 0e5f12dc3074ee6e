"""Turns a drawing of matplotlib into SVG that stands inside a page and takes its colours from there."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from fastalign.report.text import clean

URL = re.compile(r"url\(#([^)]+)\)")
COLOUR = re.compile(r"#[0-9a-f]{6}\b")


def inline(svg: str, key: str, colours: Mapping[str, str], title: str, about: str) -> str:
    """SVG to put into HTML.

    Args:
        svg: a whole SVG document.
        key: begins every id in it, so that several may stand in one page.
        colours: what each colour of the document becomes, as in ``{"#010101": "currentColor"}``.
        title, about: what it shows, in a few words and in a sentence, for those who do not see it.
    """
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # the second would be a style of the whole page
                parent.remove(child)
    elements = list(root.iter())
    used: set[str] = set()
    for element in elements:
        for name, value in element.attrib.items():
            used.update([value.removeprefix("#")] if _local(name) == "href" else URL.findall(value))
    for element in elements:
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                if value not in used:
                    continue
                value = f"{key}-{value}"
            elif name == "href":
                value = f"#{key}-{value.removeprefix('#')}"
            else:
                value = URL.sub(rf"url(#{key}-\1)", value)
                value = COLOUR.sub(lambda found: colours.get(found[0], found[0]), value)
            element.set(name, value)
    width, height = root.get("viewBox", "0 0 0 0").split()[2:]
    root.attrib.clear()
    root.attrib |= {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-labelledby": f"{key}-title {key}-about",
        "style": f"min-width:{0.9 * float(width):.0f}px;max-width:{1.6 * float(width):.0f}px",
    }
    for place, (name, text) in enumerate((("title", title), ("desc", about))):
        element = ET.Element(name, id=f"{key}-{'title' if name == 'title' else 'about'}")
        element.text = clean(text)
        root.insert(place, element)
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _local(name: str) -> str:
    """The name of an element or attribute without its namespace: HTML knows those of SVG by itself."""
    return name.rpartition("}")[2]
