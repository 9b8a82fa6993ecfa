"""A report as files: one HTML page that needs nothing else, and Markdown with its pictures as SVG files beside it.

The page has its pictures inside: no network, no scripts, no files. Whatever a model wrote is escaped.
"""

import html
import re
from pathlib import Path

from nanochat import paths
from nanochat.report import Report, grid

SCORES = "The last value of each stage, behind the one from before its first update; ± one standard error."
PICTURES = "report_pictures"  # folder of the Markdown's pictures


def write(report: Report, folder: Path) -> None:
    """report.html, report.md and its pictures, into `folder`."""
    for _, pictures in report.figures:
        for picture in pictures:
            with paths.atomic_write(folder / PICTURES / file_name(picture.title), "w") as file:
                file.write(picture.svg)
    for name, text in (("report.md", markdown(report)), ("report.html", page(report))):
        with paths.atomic_write(folder / name, "w") as file:
            file.write(text)


def file_name(title: str) -> str:
    """The picture's file, by its title."""
    return re.sub(r"\W+", "_", title.lower()).strip("_") + ".svg"


def markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# Report of {report.name}\n", *(f"- {name}: {value}" for name, value in report.about.items())]
    for title, rows in report.tables:
        parts += [f"\n## {title}\n", *([SCORES + "\n"] if title.startswith("Scores") else []), grid(rows)]
    for heading, pictures in report.figures:
        parts.append(f"\n## {heading}\n")
        parts += [f"![{picture.title}]({PICTURES}/{file_name(picture.title)})" for picture in pictures]
    return "\n".join(parts) + "\n"


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; font-size: 1.25rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: left; vertical-align: top; }
th { background: var(--soft); } td { overflow-wrap: break-word; max-width: 44rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.figures figure { margin: 0; } svg { width: 100%; height: auto; background: white; border-radius: 6px; }
.figures.few { max-width: 42rem; }
@media (prefers-color-scheme: dark) { svg { filter: invert(.93) hue-rotate(180deg); } }
@media (max-width: 40rem) { body { padding: 0 .7rem; } th, td { padding: .3rem .45rem; font-size: .87rem; } }
"""


def table_html(rows: list[list[str]]) -> str:
    """Header and rows as HTML."""
    whole = lambda cell: html.escape(cell).replace(" ± ", "&nbsp;±&nbsp;")
    line = lambda row, tag: "<tr>" + "".join(f"<{tag}>{whole(cell)}</{tag}>" for cell in row) + "</tr>"
    return f"<div class=wide><table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table></div>"


def page(report: Report) -> str:
    """The report as one HTML page: short tables, pictures, samples, and the plans folded up."""
    sections = []
    for heading, pictures in report.figures:
        few = " few" if len(pictures) == 1 else ""
        inside = "".join(f"<figure>{picture.svg}</figure>" for picture in pictures)
        sections.append((heading, f"<div class='figures{few}'>{inside}</div>"))
    note = lambda title: f"<p>{SCORES}</p>" if title.startswith("Scores") else ""
    grids = [(title, note(title) + table_html(rows)) for title, rows in report.tables]
    short = [(t, g) for t, g in grids if not t.startswith(("Plan", "Samples", "CORE"))]
    rest = [(t, g) for t, g in grids if t.startswith(("Samples", "CORE"))]
    folded = [(t, f"<details><summary>show</summary>{g}</details>") for t, g in grids if t.startswith("Plan")]
    body = [*short, *sections, *rest, *folded]
    name = html.escape(report.name)
    facts = " · ".join(html.escape(f"{key}: {value}") for key, value in report.about.items())
    links = "".join(f"<a href='#s{i}'>{html.escape(title)}</a>" for i, (title, _) in enumerate(body))
    text = "".join(f"<h2 id=s{i}>{html.escape(title)}</h2>{inside}\n" for i, (title, inside) in enumerate(body))
    head = "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    icon = "<link rel=icon href='data:,'>"
    return (
        f"{head}{icon}<title>nanochat: {name}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Report of {name}</h1><p>{facts}</p><nav>{links}</nav>{text}</main></body></html>\n"
    )
