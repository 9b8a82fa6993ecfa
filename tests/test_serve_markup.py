"""What a model says as HTML: Markdown, code, mathematics, steps; nothing that could run, load or lead astray."""

import asyncio
import errno
import re
import time

import pytest

from nanochat.serve import markup
from nanochat.serve.renderer import Renderer, plain


def html(text):
    """One text as one string of HTML."""
    return "".join(markup.blocks([{"type": "text", "text": text}]))


def test_markdown():
    table = "| j | k |\n|---|---|\n| 1 | 2 |"
    made = html(f"# A\n\n**b** *c* ~~d~~ `e`\n\n- f\n- g\n\n3. h\n\n> i\n\n{table}\n\n[l](https://m.n)")
    for piece in ("<h1>A</h1>", "<strong>b</strong>", "<em>c</em>", "<s>d</s>", "<code>e</code>", "<li>f</li>"):
        assert piece in made, piece
    for piece in ("<td>1</td>", '<ol start="3">', "<blockquote>", 'href="https://m.n"', "noopener noreferrer nofollow"):
        assert piece in made, piece


def test_blocks_are_top_level_and_joined_give_the_whole():
    text = "one\n\n- two\n  - three\n\n```py\nx = 1\n\ny = 2\n```\n\nfour"
    blocks = markup.blocks([{"type": "text", "text": text}])
    assert len(blocks) == 4 and blocks[1].count("<li>") == 2 and "".join(blocks) == html(text)
    assert markup.blocks([]) == []
    assert "<pre>" in html("```py\nnot yet closed")  # as it is while it streams


def test_code_is_coloured_by_classes_alone():
    made = html("```python\ndef f(x): return 'a'\n```\n\n```nosuch\n<b>\n```")
    assert '<span class="k">def</span>' in made and "style=" not in made and "&lt;b&gt;" in made


def test_mathematics_is_mathml_and_money_is_not():
    made = html("$x^2$ and \\(y_1\\) for $5 or $6\n\n$$\\frac{a}{b}$$\n\n\\[z\\]")
    assert made.count("<math") == 4 and made.count('display="block"') == 2 and "for $5 or $6" in made
    assert "<math" in html("$x$ is 5") and "<math" not in html("$5-$6")
    assert "<mfrac>" in made and "<msup>" in made
    assert "\\frac{" in html("$$\\frac{$$") or "<math" in html("$$\\frac{$$")  # nonsense is shown, not an error


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x)",
    "[a](//evil.example)",
    "[a](/chat/completions)",
    "![a](http://evil.example/pixel.png)",
    "![a](javascript:alert(1))",
    "<http://a.example/\"onmouseover=alert(1)>",
    "```html\"onclick=alert(1)\n<script>alert(1)</script>\n```",
    "```python <script>\n'</code></pre><script>alert(1)</script>'\n```",
    "$\\text{<img src=x onerror=alert(1)>}$",
    "$\\href{javascript:alert(1)}{x}$",
    "$$</math><script>alert(1)</script>$$",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=alert(1)&gt;\">",
    "<svg/onload=alert(1)>",
    "<a href=\"https://x\" onclick=alert(1)>y</a>",
    "| <img src=x onerror=alert(1)> |\n|---|\n| `<b onclick=x>` |",
    "[x](https://a.example \"t\" onmouseover=\"alert(1)\")",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\ue0000\ue001 <b>",
    "x\0<script>",
]  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_can_run_load_or_lead_astray(text):
    made = html(text)
    tags = re.findall(r"<(/?)([a-zA-Z0-9]+)([^>]*)>", made)
    assert {name for _, name, _ in tags} <= markup.TAGS | markup.MATHS
    for _, _, attributes in tags:
        names = re.findall(r"([a-z-]+)=", re.sub(r'"[^"]*"', '""', attributes))
        assert set(names) <= {"href", "rel", "target", "class", "start", *markup.MATH_ATTRIBUTES}
        for link in re.findall(r'href="([^"]*)"', attributes):
            assert link.startswith(("http://", "https://", "mailto:"))


def test_steps_stand_where_they_were_made():
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "2*3<4"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": " *apples*."},
        {"type": "python", "text": "1/0"},
    ]
    made = "".join(markup.blocks(parts))
    assert made.startswith('<p>It is <span class="step">') and "<em>apples</em>" in made and made.count("<p>") == 1
    assert "<code>2*3&lt;4</code> = <output>6</output>" in made and "<code>1/0</code></span>" in made
    assert made.count('aria-expanded="false"') == 2 and made.count("hidden") == 2


def test_a_step_cannot_break_out_of_an_attribute_or_of_code():
    step = {"type": "python", "text": "1"}
    for before, after in (
        ("[a](http://x/", ")"),
        ('[a](http://x "', '")'),
        ("![", "](http://x)"),
        ("```py", "\nx\n```"),
    ):
        made = "".join(markup.blocks([{"type": "text", "text": before}, step, {"type": "text", "text": after}]))
        for attributes in re.findall(r"<[a-z]+ ([^>]*)>", made):
            assert markup.OPEN not in attributes and "step" not in attributes.replace('class="step"', "")
    inside = "".join(markup.blocks([{"type": "text", "text": "```py\nx = "}, step, {"type": "text", "text": "\n```"}]))
    assert '<span class="step">' in inside and markup.OPEN not in inside


@pytest.mark.slow
def test_a_text_that_takes_too_long_is_shown_plain_and_the_next_one_is_well():
    slow = [{"type": "text", "text": "\\(" * 30_000 + "<b>"}]

    async def run():
        renderer = Renderer(seconds=30)
        try:
            await renderer.start()
            assert await renderer.blocks([{"type": "text", "text": "*a*"}]) == ["<p><em>a</em></p>\n"]
            renderer.seconds = 0.3
            begin = time.monotonic()
            made = await renderer.blocks(slow)
            assert made == plain(slow) and "&lt;b&gt;" in made[0] and time.monotonic() - begin < 10
            await renderer.start()
            renderer.seconds = 10
            both = await asyncio.gather(*(renderer.blocks([{"type": "text", "text": f"`{i}`"}]) for i in range(5)))
            assert both == [[f"<p><code>{i}</code></p>\n"] for i in range(5)]
            task = asyncio.ensure_future(renderer.blocks(slow))
            await asyncio.sleep(0.05)
            task.cancel()  # an answer that nobody awaits must not become the next one's
            await asyncio.gather(task, return_exceptions=True)
            await renderer.start()
            assert await renderer.blocks([{"type": "text", "text": "z"}]) == ["<p>z</p>\n"]
        finally:
            await renderer.close()

    asyncio.run(run())


def test_nobody_waits_for_ever_behind_others():
    async def run():
        renderer = Renderer(seconds=0.2)
        await renderer.turn.acquire()  # somebody else has given it much to do
        return await asyncio.wait_for(renderer.blocks([{"type": "text", "text": "*a*"}]), 15)

    assert asyncio.run(run()) == ["<p>*a*</p>"]


def test_a_process_that_can_not_be_started_now_is_tried_again(monkeypatch):
    words = [{"type": "text", "text": "*a*"}]

    async def none(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    async def run():
        renderer = Renderer(seconds=30)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", none)
            assert await renderer.blocks(words) == plain(words)
        try:
            await renderer.start()
            assert await renderer.blocks(words) == ["<p><em>a</em></p>\n"]
        finally:
            await renderer.close()

    asyncio.run(run())
