"""The frame of an HTML page that needs nothing from outside: its style, its sections, its pictures."""

import re
from html import escape

STYLE = """:root { --ink: #222; --muted: #666; --line: #ddd; --page: #fff; --soft: #f5f6f8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --muted: #a5a9b0; --line: #3a3d42; --page: #17191c; --soft: #22252a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; }
p, li { max-width: 50em; }
.note { color: var(--muted); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 5.2em; }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600; }
.facts td { text-align: left; white-space: normal; }
figure { margin: 0 0 1rem; padding: .8rem; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; overflow-x: auto; }
figure svg { display: block; max-width: 100%; min-width: 480px; height: auto; margin: 0 auto; }
.wide + .wide { margin-top: 1.2rem; }
pre { background: var(--soft); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="fedpipe" content="{key}">
<title>{name}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{name}</h1>
<p>{statement}</p>
{body}
</main>
</body>
</html>
"""


def inline(svg: str, prefix: str, title: str) -> str:
    """An SVG file as part of a page: no prolog or metadata, ids made unique by a prefix, a title read aloud."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    named = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure>{named.strip()}</figure>"


def page(name: str, key: str, statement: str, sections: list[tuple[str, str]]) -> str:
    """A page of sections (title, HTML) under its name and one paragraph; `key` says what it was made from."""
    body = "\n".join(f"<section><h2>{escape(title)}</h2>\n{html}\n</section>" for title, html in sections)
    return PAGE.format(name=escape(name), key=key, style=STYLE, statement=escape(statement), body=body)
