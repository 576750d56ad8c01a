"""The frame of a report page: one HTML file with its style and script in it, and the tables in it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def page(title: str, body: Iterable[str]) -> str:
    """body: HTML."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "hover.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style></head>\n<body>\n{chr(10).join(filter(None, body))}\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def bars(columns: Sequence[str], rows: Iterable[tuple[str, float, str]]) -> str:
    """A table of (name, share from 0 to 1, text) with the share drawn as a bar. columns: of name and text."""
    lines = (
        f"<tr><td>{html.escape(name)}</td><td class=bar><i style=width:{100 * share:.2f}%></i></td>"
        f"<td>{html.escape(text)}</td></tr>"
        for name, share, text in rows
    )
    first, last = map(html.escape, columns)
    head = f"<tr><th>{first}</th><th></th><th>{last}</th></tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table></div>"


def cards(figures: Iterable[tuple[str, str, str, str]]) -> str:
    """Big figures: (what, figure, text below, class)."""
    parts = (
        f'<div class="{kind}"><span class=soft>{html.escape(what)}</span><b>{html.escape(figure)}</b>'
        f"{html.escape(below)}</div>"
        for what, figure, below, kind in figures
    )
    return f"<div class=cards>{''.join(parts)}</div>"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
