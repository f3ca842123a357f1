"""A page of few kinds of blocks, as Markdown and as HTML that needs no other file."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple


class Title(NamedTuple):
    text: str


class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    """A paragraph; **bold** and `code` are all that it knows."""

    text: str


class Code(NamedTuple):
    text: str


class Image(NamedTuple):
    file: str
    text: str


class Table(NamedTuple):
    """The first column is a name, the others are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Title | Heading | Text | Code | Image | Table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto;
       padding: 0 1rem; color: #1c1c1c; background: #fff }
table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0 }
td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left; font-weight: 600 }
img { max-width: 100% }
pre { background: #f4f4f4; padding: .7rem 1rem; overflow-x: auto }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } td, th { border-color: #444 }
  pre { background: #262626 } img { filter: invert(.9) hue-rotate(180deg) }
}
"""


def markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown; images are files beside it."""
    out = []
    for block in blocks:
        match block:
            case Title(text):
                out.append(f"# {text}")
            case Heading(text):
                out.append(f"## {text}")
            case Text(text):
                out.append(text)
            case Code(text):
                out.append(f"```\n{text}\n```")
            case Image(file, text):
                out.append(f"![{text}]({file})")
            case Table(head, rows):
                rule = ["---", *["---:"] * (len(head) - 1)]
                lines = ([cell.replace("|", "\\|") for cell in line] for line in (head, *rows))
                first, *others = (f"| {' | '.join(line)} |" for line in lines)
                out.append("\n".join((first, f"| {' | '.join(rule)} |", *others)))
    return "\n\n".join(out) + "\n"


def html(blocks: Sequence[Block], folder: Path) -> str:
    """The page as HTML, the images of `folder` within it."""
    out = []
    for block in blocks:
        match block:
            case Title(text):
                out.append(f"<h1>{escape(text)}</h1>")
            case Heading(text):
                out.append(f"<h2>{escape(text)}</h2>")
            case Text(text):
                out.append(f"<p>{_inline(text)}</p>")
            case Code(text):
                out.append(f"<pre>{escape(text)}</pre>")
            case Image(file, text):
                data = base64.b64encode((folder / file).read_bytes()).decode()
                out.append(f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">')
            case Table(head, rows):
                lines = [_row("th", head), *(_row("td", row) for row in rows)]
                out.append(f"<table>{''.join(lines)}</table>")
    title = escape(next(b.text for b in blocks if isinstance(b, Title)))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style>{''.join(out)}</html>\n"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _inline(text: str) -> str:
    parts = escape(text).split("**")
    text = "".join(f"<b>{p}</b>" if i % 2 else p for i, p in enumerate(parts))
    parts = text.split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
