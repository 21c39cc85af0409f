"""A page of HTML that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from cifar_lab import plots

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #5c6166; --line: #dcdfe2; --card: #f4f6f8;
  --accent: #0072B2; --blue: #0072B2; --warn: #D55E00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #15181b; --faint: #a3a9af; --line: #363b40; --card: #1f2428; --accent: #56B4E9;
    --blue: #2B8FD9 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 64rem; padding: 1rem 1rem 4rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .6rem 0 } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem }
a { color: var(--accent) }
p { margin: .6rem 0; max-width: 46rem; overflow-wrap: anywhere }
p.note, figcaption { color: var(--faint); font-size: .9rem; line-height: 1.45 }
.headline { font-size: 1.25rem; line-height: 1.4; max-width: none; padding: .8rem 1rem; background: var(--card);
  border-left: .3rem solid var(--accent) }
.warning { padding: .5rem .8rem; border-left: .3rem solid var(--warn); background: var(--card) }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 1rem 0; padding: .5rem 0; font-size: .9rem;
  border: solid var(--line); border-width: 1px 0 }
nav a { padding: .2rem 0; text-decoration: none }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); gap: .5rem 1rem;
  margin: 1rem 0; font-size: .9rem }
dt { color: var(--faint); font-size: .8rem } dd { margin: 0; overflow-wrap: anywhere }
dl.long { grid-template-columns: 1fr } dl.long dt { font-size: .9rem }
dl.long > div { display: grid; grid-template-columns: 8.5rem 1fr; gap: 0 .8rem }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); gap: 0 2rem;
  align-items: start }
.wide { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { color: var(--faint); font-weight: 600; vertical-align: bottom } .text { text-align: left }
td.prose { white-space: normal; min-width: 24rem }
th:first-child, td:first-child { position: sticky; left: 0; padding-left: 0; background: var(--paper) }
figure { margin: .8rem 0 } svg { display: block; max-width: 100%; height: auto; overflow: visible }
svg text { font-family: inherit !important; fill: currentColor }
.wide img { display: block; max-width: 62rem }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)); gap: 0 .6rem; margin: .4rem 0;
  padding: 0; list-style: none; font-size: .78rem; font-variant-numeric: tabular-nums }
.legend i { display: inline-block; width: .9rem; height: .25rem; margin-right: .35rem; vertical-align: middle }
@media (max-width: 30rem) { th, td { padding: .25rem .35rem } }
@page { margin: 15mm }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; --card: #f4f6f8;
    --accent: #0072B2; --blue: #0072B2 }
  html { font-size: 9pt } body { max-width: none; padding: 0 }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  nav { display: none } h2 { break-after: avoid; margin-top: 1.6rem }
  figure, tr, .legend, dl > div { break-inside: avoid }
  .pair { grid-template-columns: 1fr 1fr; gap: 0 1.5rem } table { font-size: 6.5pt }
  .wide { overflow: visible } .wide img { max-width: 100% }
  th, td { padding: .1rem .25rem; white-space: normal } td.prose { min-width: 11rem } }
"""


class Section(NamedTuple):
    """A heading with the HTML that belongs under it."""

    title: str
    body: str


def percent(value: float, decimals: int = 1) -> str:
    """A fraction in percent."""
    return f"{value:.{decimals}%}"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """An HTML table, which scrolls in itself; columns of texts to the left, of numbers to the right."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    kinds = ["text" if any(re.match(r"[^\d+\-−<]", str(c)) for c in column) else "" for column in columns]
    prose = [any(len(str(c)) > 40 for c in column) for column in columns]

    def cell(tag: str, content: Any, kind: str, long: bool = False) -> str:
        names = " ".join(filter(None, (kind, "prose" if long else "")))
        attribute = f' class="{names}"' if names else ""
        return f"<{tag}{attribute}>{html.escape(str(content))}</{tag}>"

    head = "".join(cell("th", name, kind) for name, kind in zip(header, kinds, strict=True))
    body = "".join(f"<tr>{''.join(map(cell, ['td'] * len(row), row, kinds, prose))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str) -> Section:
    """A heading with what belongs under it."""
    return Section(title, "".join(parts))


def note(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="note">{html.escape(text)}</p>'


def facts(pairs: Mapping[str, str], kind: str = "") -> str:
    """Names with their values; `long` ones a line each."""
    items = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in pairs.items())
    return f'<dl class="{kind}">{items}</dl>'


def pair(*parts: str) -> str:
    """Things beside each other, where there is room."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def drawn(svg: str, alt: str, caption: str) -> str:
    """A figure from `plots.svg`, inside the page: `alt` says what is to be seen to who cannot see it."""
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{plots.inline(svg, alt)}{under}</figure>"


def picture(figure: Figure, path: Path, alt: str, caption: str = "") -> str:
    """A figure, inside the page, and saved as PNG."""
    plots.save(figure, path)
    return drawn(plots.svg(figure, path.stem), alt, caption)


def photograph(path: Path, alt: str, caption: str) -> str:
    """A PNG, inside the page, for a figure of too many parts to be drawn: it keeps its size, and scrolls."""
    image = f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{html.escape(alt)}">'
    return f'<figure><div class="wide">{image}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def page(title: str, lead: str, context: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    names = [re.sub(r"[^a-z0-9]+", "-", s.title.lower()).strip("-") for s in sections]
    links = "".join(f'<a href="#{n}">{html.escape(s.title)}</a>' for n, s in zip(names, sections, strict=True))
    body = "".join(
        f'<section id="{n}"><h2>{html.escape(s.title)}</h2>{s.body}</section>'
        for n, s in zip(names, sections, strict=True)
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body>'
        f'<h1>{html.escape(title)}</h1><p class="headline">{html.escape(lead)}</p>{context}'
        f'<nav aria-label="Contents">{links}</nav><main>{body}</main></body></html>\n'
    )
