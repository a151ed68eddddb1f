"""Self-contained HTML: a page, tables, pictures of kept tokens and charts, without any script.

Everything is embedded, so a page can be mailed, and reads well on a phone.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vitrim.tools.visualize import Panel

_STYLE = """
:root { color-scheme: light; --ink: #1c2028; --soft: #5f6773; --line: #e3e6ea; --accent: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 48px; color: var(--ink);
  background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 8px; }
p { margin: 0 0 12px; } .soft, figcaption, footer { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; margin-bottom: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small, th small { display: block; color: var(--soft); font-size: .75rem; font-weight: 400; }
th { font-weight: 600; font-size: .8rem; color: var(--soft); vertical-align: bottom; }
.cards { display: grid; gap: 12px; margin: 20px 0; grid-template-columns: repeat(4, 1fr); }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 1.5rem; line-height: 1.25; }
.card span { color: var(--soft); font-size: .85rem; line-height: 1.3; display: block; }
.strip { display: grid; gap: 12px; margin: 0 0 24px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.strip figure, .charts figure { margin: 0; }
.strip img { width: 100%; display: block; border-radius: 6px; }
.strip figcaption { line-height: 1.35; margin-top: 6px; }
.strip figcaption b { color: var(--ink); font-weight: 600; display: block; }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 6px; overflow-wrap: anywhere; }
.charts { display: grid; gap: 24px; grid-template-columns: repeat(2, 1fr); }
.charts svg { width: 100%; height: auto; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: 0 0 12px; }
@media (max-width: 640px) {
  .cards, .strip { grid-template-columns: repeat(2, 1fr); } .charts { grid-template-columns: 1fr; }
  th, td { padding: 5px 0 5px 6px; font-size: .8rem; } th { font-size: .72rem; }
  td small, th small { font-size: .65rem; white-space: nowrap; }
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document around ``body``."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text; the first column is left-aligned, a second line in a cell is small."""
    cells = "".join(f"<th>{_cell(name)}</th>" for name in head)
    lines = ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return (
        f'<div class="wide"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    first, _, second = html.escape(text).partition("\n")
    return f"{first}<small>{second}</small>" if second else first


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """Large numbers, each with what it means."""
    found = [
        f'<div class="card"><b>{html.escape(number)}</b><span>{html.escape(text)}</span></div>'
        for number, text in facts
    ]
    return f'<div class="cards">{"".join(found)}</div>'


def strip(panels: Sequence[Panel], heading: str = "") -> str:
    """The panels of one image; they wrap on a narrow screen."""
    figures = [
        f'<figure><img alt="{html.escape(panel.title)}" src="{png_url(panel.image)}">'
        f"<figcaption><b>{html.escape(panel.title)}</b>{html.escape(panel.caption)}</figcaption>"
        "</figure>"
        for panel in panels
    ]
    head = f"<h3>{html.escape(heading)}</h3>" if heading else ""
    return f'{head}<div class="strip">{"".join(figures)}</div>'


def png_url(image: Image.Image) -> str:
    """The image as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(title: str, note: str, strips: Sequence[tuple[str, Sequence[Panel]]]) -> str:
    """A page with a strip per named image."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="soft">{html.escape(note)}</p>']
    return page(title, "\n".join(parts + [strip(found, name) for name, found in strips]))


@dataclass(frozen=True)
class Point:
    """A dot of a chart."""

    x: float
    y: float
    note: str
    """Shown when the pointer rests on it."""
    is_main: bool = False
    """Drawn larger."""


@dataclass(frozen=True)
class Series:
    """Dots of one colour, joined by a line where there are several."""

    name: str
    points: Sequence[Point]


_COLOURS = ("#1c2028", "#1f6feb", "#d1580c", "#1a7f4b", "#9a3fbf", "#b8860b", "#c2255c", "#0b8a94")


def chart(series: Sequence[Series], x_name: str, y_name: str) -> str:
    """Series of dots in the order of their colours, as inline SVG with a legend."""
    width, left, right, bottom = 520, 58, 18, 50
    legend_rows = math.ceil(len(series) / 3)
    top, height = 18 + 20 * legend_rows, 326 + 20 * legend_rows
    every = [point for one in series for point in one.points]
    x_ticks, y_ticks = ticks([p.x for p in every], 5), ticks([p.y for p in every], 5)

    def place_x(value: float) -> float:
        return left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (width - left - right)

    def place_y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return height - bottom - share * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(y_name)} against {html.escape(x_name)}" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#5f6773">'
    ]
    for value in y_ticks:
        y = place_y(value)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#e3e6ea"/>')
        parts.append(_text(left - 8, y + 5, _number(value, y_ticks), "end"))
    for value in x_ticks:
        text = _number(value, x_ticks)
        parts.append(_text(place_x(value), height - bottom + 20, text, "middle"))
    parts.append(_text((left + width - right) / 2, height - 8, x_name, "middle"))
    parts.append(
        f'<g transform="translate(15 {(top + height - bottom) / 2:.0f}) rotate(-90)">'
        f"{_text(0, 0, y_name, 'middle')}</g>"
    )
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        x, y = left + 8 + number % 3 * 150, 16 + number // 3 * 20
        parts.append(f'<circle cx="{x}" cy="{y - 5}" r="5" fill="{colour}"/>')
        parts.append(_text(x + 10, y, one.name, "start", "#1c2028"))
        line = sorted(one.points, key=lambda point: point.x)
        path = "L".join(f"{place_x(point.x):.1f} {place_y(point.y):.1f}" for point in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in line:
            parts.append(
                f'<circle cx="{place_x(point.x):.1f}" cy="{place_y(point.y):.1f}" '
                f'r="{7 if point.is_main else 4.5}" fill="{colour}" stroke="#fff" '
                f'stroke-width="1.5"><title>{html.escape(point.note)}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def ticks(values: Sequence[float], count: int) -> list[float]:
    """Round numbers, about ``count``, that enclose ``values``."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [step * place for place in range(first, last + 1)]


def _number(value: float, among: Sequence[float]) -> str:
    step = among[1] - among[0]
    text = f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    exact = f"{value:.6g}"
    return exact if abs(float(text.replace(",", "")) - value) > 1e-9 * max(1, abs(value)) else text


def _text(x: float, y: float, text: str, anchor: str, fill: str = "") -> str:
    colour = f' fill="{fill}"' if fill else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{colour}>{html.escape(text)}</text>'
    )
