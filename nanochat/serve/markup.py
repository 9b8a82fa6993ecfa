"""What a model says as safe HTML: Markdown, highlighted code, mathematics as MathML, calculator steps. Block by block.

The text is nobody's friend: raw HTML stays text, links go to http, https and mailto only, images become links, and
what the renderers made passes a sanitizer that knows few tags and attributes. A calculator step stands in the text as
a mark of two private characters, which the text itself may not hold; it becomes markup after the sanitizer, and the
sanitizer drops every attribute that holds a mark, so a step cannot break out of one.
"""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

OPEN, CLOSE = "\ue000", "\ue001"  # around the number of a calculator step
MARKS = re.compile(f"{OPEN}([0-9]+){CLOSE}")
MAX_CODE = 20_000  # characters of a code block that is still coloured
MAX_MATH = 2_000  # of a formula
MAX_NESTING = 20  # of lists and quotes
LANGUAGES = {
    "bash", "sh", "shell", "console", "c", "cpp", "c++", "csharp", "css", "diff", "go", "html", "ini", "java",
    "javascript", "js", "json", "jsx", "kotlin", "lua", "makefile", "py", "python", "r", "ruby", "rust", "scala", "sql",
    "swift", "toml", "ts", "typescript", "xml", "yaml",
}  # fmt: skip
TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
MATHS = {
    "math", "menclose", "mfenced", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom", "mroot",
    "mrow", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder",
    "munderover",
}  # fmt: skip
MATH_ATTRIBUTES = {
    "display", "displaystyle", "fence", "form", "linethickness", "lspace", "mathvariant", "maxsize", "minsize",
    "movablelimits", "notation", "rspace", "separator", "stretchy", "columnalign", "rowspacing", "columnspacing",
    "width",
}  # fmt: skip
ATTRIBUTES = {"a": {"href"}, "code": {"class"}, "span": {"class"}, "ol": {"start"}, "td": {"class"}, "th": {"class"}}
ATTRIBUTES |= {tag: MATH_ATTRIBUTES for tag in MATHS}
CLASS = re.compile(r"[a-z][a-z0-9+-]*|(?:k|s|c|n|m|o|g|e|w|l|p|x|d)[a-z0-9]{0,2}")


def blocks(parts: list[dict]) -> list[str]:
    """The parts of a reply (see nanochat.chat) as top-level blocks of safe HTML."""
    text, steps = _joined(parts)
    return [_with_steps(_clean(block), steps) for block in _rendered(text)]


def _joined(parts: list[dict]) -> tuple[str, list[tuple[str, str | None]]]:
    """One Markdown text with a mark for each calculator step, and the steps: (expression, answer or None)."""
    text, steps = [], []
    for part in parts:
        words = part["text"].replace(OPEN, "\ufffd").replace(CLOSE, "\ufffd").replace("\0", "\ufffd")
        if part["type"] == "text":
            text.append(words)
        elif part["type"] == "python":
            text.append(f"{OPEN}{len(steps)}{CLOSE}")
            steps.append((words, None))
        elif steps and steps[-1][1] is None:
            steps[-1] = (steps[-1][0], words)
    return "".join(text), steps


def _rendered(text: str) -> list[str]:
    """Markdown to HTML, one string a top-level block."""
    markdown, env, made = _markdown(), {}, []
    block: list[Token] = []
    depth = 0
    for token in markdown.parse(text, env):
        block.append(token)
        depth += token.nesting
        if depth == 0:
            made.append(markdown.renderer.render(block, markdown.options, env))
            block = []
    return made


@cache
def _markdown() -> MarkdownIt:
    from mdit_py_plugins.dollarmath import dollarmath_plugin
    from mdit_py_plugins.texmath import texmath_plugin

    options = {"html": False, "linkify": False, "maxNesting": MAX_NESTING}
    markdown = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    markdown.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True)
    markdown.use(texmath_plugin, delimiters="brackets")
    markdown.core.ruler.after("block", "first_dollar", _first_dollar)
    rules = markdown.renderer.rules
    rules["fence"] = rules["code_block"] = lambda tokens, i, *_: _code(tokens[i])
    rules["image"] = lambda tokens, i, *_: _image(tokens[i])
    for kind in ("math_inline", "math_single"):
        rules[kind] = lambda tokens, i, *_: _math(tokens[i].content, False)
    for kind in ("math_block", "math_inline_double", "math_block_eqno"):
        rules[kind] = lambda tokens, i, *_: _math(tokens[i].content, True)
    return markdown


def _first_dollar(state) -> None:
    """The dollar plugin takes a text's last character for the one before its first: give it one that is harmless."""
    for token in state.tokens:
        if token.type == "inline" and token.content.startswith("$"):
            token.content = "\n" + token.content


def _code(token: Token) -> str:
    words = token.info.split()
    name = words[0].lower() if words and words[0].lower() in LANGUAGES else ""
    css = f' class="{name}"' if name else ""
    return f"<pre><code{css}>{_coloured(token.content, name)}</code></pre>\n"


def _coloured(code: str, name: str) -> str:
    if not name or len(code) > MAX_CODE or OPEN in code:  # colouring would tear a mark apart
        return html.escape(code)
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    return highlight(code, get_lexer_by_name(name, stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))


def _image(token: Token) -> str:
    """Nothing is fetched for a reader who did not ask: an image is a link to it."""
    source, words = html.escape(str(token.attrs.get("src", ""))), html.escape(token.content or "image")
    return f'<a href="{source}">{words}</a>'


@cache
def _converter() -> Any:
    from latex2mathml.converter import convert

    return convert


def _math(formula: str, display: bool) -> str:
    """MathML; a formula that can't be converted is shown as it is written."""
    if len(formula) <= MAX_MATH and OPEN not in formula:
        try:
            return _converter()(formula, display="block" if display else "inline")
        except Exception as error:  # noqa: BLE001  (a converter of foreign text may raise anything; nothing is lost)
            del error
    return f"<code>{html.escape(formula)}</code>"


@cache
def _cleaner() -> nh3.Cleaner:
    return nh3.Cleaner(
        tags=TAGS | MATHS,
        clean_content_tags={"script", "style"},
        attributes=ATTRIBUTES,
        attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _attribute(tag: str, name: str, value: str) -> str | None:
    if OPEN in value or CLOSE in value:
        return None
    if name == "class":
        return value if all(CLASS.fullmatch(word) for word in value.split()) else None
    if name == "href":  # no path of this server
        return value if value.partition(":")[0].lower() in ("http", "https", "mailto") else None
    return value


def _clean(block: str) -> str:
    return _cleaner().clean(block)


def _with_steps(block: str, steps: list[tuple[str, str | None]]) -> str:
    return MARKS.sub(lambda match: _step(*steps[int(match[1])]) if int(match[1]) < len(steps) else "", block)


def _step(expression: str, answer: str | None) -> str:
    """A button that shows and hides what the calculator was asked."""
    result = "" if answer is None else f" = <output>{html.escape(answer)}</output>"
    inside = f'<span class="work" hidden><code>{html.escape(expression)}</code>{result}</span>'
    return f'<span class="step"><button type="button" aria-expanded="false">calculator</button>{inside}</span>'
