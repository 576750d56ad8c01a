"""The frame of a report page: one HTML file with its style and script in it, and what pages are made of."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def page(title: str, body: Iterable[str]) -> str:
    """body: HTML."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "hover.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{style}</style></head>\n<body>\n<main>\n{chr(10).join(filter(None, body))}\n</main>\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """parts: HTML. Empty without any."""
    content = "".join(parts)
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def grid(*parts: str) -> str:
    """parts: HTML, side by side where there is room."""
    content = "".join(parts)
    return f"<div class=grid>{content}</div>" if content else ""


def note(text: str) -> str:
    return f"<p class=soft>{html.escape(text)}</p>"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    texts: Collection[int] = (0,),
    kinds: Iterable[str] = (),
) -> str:
    """A table of text. texts: columns that are no numbers. kinds: of each row, a class of style.css."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if place in texts else ''}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )

    given = list(rows)
    classes = [*kinds] or [""] * len(given)
    body = "".join(
        f'<tr class="{kind}">{line("td", row)}</tr>' if kind else f"<tr>{line('td', row)}</tr>"
        for kind, row in zip(classes, given, strict=True)
    )
    head = f"<thead><tr>{line('th', columns)}</tr></thead>" if any(columns) else ""
    return f"<div class=scroll><table>{head}<tbody>{body}</tbody></table></div>"


def bars(rows: Iterable[tuple[str, Sequence[tuple[str, float]], str]]) -> str:
    """Rows of a name, bars one behind the other as (class of style.css, share from 0 to 1), and a text."""
    lines = []
    for name, parts, text in rows:
        drawn = "".join(
            f'<i class="{kind}" style="width:{100 * min(share, 1):.2f}%"></i>' for kind, share in parts
        )
        lines.append(
            f"<div><span>{html.escape(name).replace('.', '.<wbr>')}</span><span class=bar>{drawn}</span>"
            f"<span>{html.escape(text)}</span></div>"
        )
    return f"<div class=bars>{''.join(lines)}</div>"


def cards(figures: Iterable[tuple[str, str, str, str]]) -> str:
    """Big figures: (what, figure, text below, class)."""
    parts = (
        f'<div class="{kind}"><span>{html.escape(what)}</span> <b>{html.escape(figure)}</b> '
        f"<small>{html.escape(below)}</small></div>"
        for what, figure, below, kind in figures
    )
    return f"<div class=cards>{''.join(parts)}</div>"


def listed(title: str, values: Mapping[str, str]) -> str:
    """A small list of names and values."""
    rows = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(each)}</dd>" for key, each in values.items())
    return f"<div class=listed><h3>{html.escape(title)}</h3><dl>{rows}</dl></div>" if rows else ""


def folded(title: str, content: str, is_open: bool = False) -> str:
    """content: HTML."""
    return f"<details{' open' * is_open}><summary>{html.escape(title)}</summary>{content}</details>"


def verbatim(text: str, kind: str = "") -> str:
    return f'<pre class="{kind}">{html.escape(text)}</pre>'
