"""The page in a headless Chromium: what people do with it, what an attacker tries, keyboard, phone, accessibility."""

import json

import pytest
from serve_rig import serving, until


class Page:
    """A page of its own browser profile, and the faults it reports."""

    def __init__(self, browser, rig, **options):
        self.context = browser.new_context(**options)
        self.page, self.rig, self.faults = self.context.new_page(), rig, []
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.open()

    def open(self):
        self.page.goto(self.rig.url)
        until(lambda: self.page.locator("#model option").count(), 20)

    def say(self, text):
        self.page.fill("#words", text)
        self.page.keyboard.press("Enter")

    def remember(self, question, reply):
        """Let the browser have kept a chat, and open it."""
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        chat = {"id": "abc", "updated": 1, "messages": messages}
        self.page.evaluate("chat => localStorage.setItem('nanochat.chat.abc', JSON.stringify(chat))", chat)
        self.page.reload()

    def settled(self, articles):
        """Wait until so many messages are there and none is being written."""
        busy = self.page.locator("body.busy")
        until(lambda: self.page.locator("article").count() == articles and not busy.count(), 20)

    def last(self):
        return self.page.locator("article.assistant .body").last

    def close(self):
        assert self.faults == []
        self.context.close()


@pytest.mark.slow
def test_it_talks_stops_regenerates_edits_and_remembers_pitfall_33(browser):
    with serving("a«2*3»‹6›bcdefgh\nijklm<nop>qrstuvwxyz.", seconds=0.02, max_tokens=200) as rig:
        user = Page(browser, rig)
        page = user.page
        user.say("<img src=x onerror=alert(1)> /clear")  # neither markup nor a command: text
        user.settled(2)
        assert page.inner_text("article.user .body") == "<img src=x onerror=alert(1)> /clear"
        until(lambda: "ijklm<nop>qrstuvwxyz" in user.last().inner_text())
        assert page.locator("main img").count() == 0 and "tok/s" in page.inner_text("article.assistant .note")
        step = page.locator(".step > button")
        assert step.get_attribute("aria-expanded") == "false" and not page.locator(".step .work").is_visible()
        step.click()
        assert page.inner_text(".step .work").replace("\n", "") == "2*3 = 6"
        page.click("text=Certainty")
        assert page.locator(".token").count() > 20
        page.locator(".token").nth(3).hover()
        assert "100.0 %" in page.inner_text("#tip") and page.locator("#tip meter").count() == 5
        page.click("text=Certainty")
        assert page.locator(".token").count() == 0 and page.locator(".step").count() == 1

        rig.engine.model.seconds = 0.5  # half a minute for all of it
        user.say("second")
        until(lambda: page.locator("article").count() == 4 and user.last().inner_text())
        page.keyboard.press("Escape")
        user.settled(4)
        rig.engine.model.seconds = 0.02
        until(lambda: rig.load == 0)
        assert "stopped" in page.inner_text("article:last-of-type .note")
        page.locator("text=Regenerate").last.click()
        user.settled(4)
        assert user.last().inner_text().endswith("xyz")

        page.reload()
        user.settled(4)
        assert page.locator("#chats li").count() == 1
        until(lambda: page.locator(".step").count() == 2)  # old replies are rendered again
        page.locator("article.user >> text=Edit").last.click()
        box = page.get_by_label("Edit your message")
        assert box.input_value() == "second"
        box.fill("third")
        page.keyboard.press("Enter")
        user.settled(4)
        assert page.locator("article.user .body").last.inner_text() == "third"

        rig.engine.model.fail = True
        user.say("fourth")
        page.wait_for_selector("text=The model failed")
        rig.engine.model.fail = False
        page.click(".trouble button")
        user.settled(6)
        user.faults = [fault for fault in user.faults if "500" not in fault]  # Chromium reports the refusal
        user.close()


@pytest.mark.slow
def test_a_reply_that_fails_half_way_is_asked_for_again(browser):
    with serving("abcdefghijklmnopqrstuvwxyz.", seconds=0.5, max_tokens=200) as rig:
        user = Page(browser, rig)
        page, model = user.page, rig.engine.model
        page.click("text=Who are you?")  # one of the beginnings that an empty page offers
        until(lambda: "abc" in user.last().inner_text())
        model.fail = True
        page.wait_for_selector("text=The model failed")
        assert "interrupted" in page.inner_text("article.assistant .note")
        model.fail, model.seconds = False, 0.0
        page.click("text=Try again")
        user.settled(2)  # in place of what had failed, not after it
        assert user.last().inner_text() == "abcdefghijklmnopqrstuvwxyz"
        asked = [{"role": "user", "content": "hi"}]
        page.evaluate("chat => localStorage.setItem('nanochat.chat.x', JSON.stringify(chat))",
                      {"id": "x", "updated": 9e15, "messages": asked})  # fmt: skip
        page.goto(rig.url + "/#x")
        page.reload()  # a chat that was left before it was answered
        page.click("text=Ask again")
        user.settled(2)
        assert user.last().inner_text().startswith("abc") and page.locator("text=No reply yet").count() == 0
        user.close()


FETCH = """async text => {
  const { reply } = await import("/ui/server.js");
  const pieces = [...new TextEncoder().encode(text)].map((byte) => new Uint8Array([byte]));
  const body = new ReadableStream({ start(c) { pieces.forEach((piece) => c.enqueue(piece)); c.close(); } });
  window.fetch = async () => new Response(body);
  const seen = [];
  try {
    for await (const event of reply({ messages: [] }, "")) seen.push(event);
  } catch (error) { seen.push(error.message); }
  return seen;
}"""


@pytest.mark.slow
def test_events_that_come_byte_by_byte_are_whole_and_a_broken_one_is_told_pitfall_33(browser):
    with serving("hey.") as rig:
        user = Page(browser, rig)
        token, done = {"token": "é😀"}, {"done": True, "dropped": 0}
        stream = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in (token, done))
        assert user.page.evaluate(FETCH, stream) == [token, done]
        assert user.page.evaluate(FETCH, stream.split('data: {"done')[0]) == [token, "The connection was lost."]
        assert user.page.evaluate(FETCH, "data: {no JSON\n\n") == ["The connection was lost."]
        user.close()


SLOW_END = """() => {
  const real = window.fetch, text = new TextEncoder();
  const parts = [{ type: "text", text: "hey" }];
  async function start(c) {
    const say = (event) => c.enqueue(text.encode("data: " + JSON.stringify(event) + "\\n\\n"));
    say({ token: "hey", gpu: 0 });
    await new Promise((done) => setTimeout(done, 1100));
    say({ done: true, finish: "length", tokens: 1, parts, dropped: 0 });
    c.close();
  }
  window.fetch = async (path, more) =>
    path === "/chat/completions" ? new Response(new ReadableStream({ start })) : real(path, more);
}"""


@pytest.mark.slow
def test_a_reply_that_was_saved_while_it_grew_is_no_interrupted_one(browser):
    with serving("hey.") as rig:
        user = Page(browser, rig)
        user.page.evaluate(SLOW_END)  # longer than a second, after which what there is gets saved
        user.say("hi")
        user.settled(2)
        assert user.page.inner_text("article.assistant .note") == "cut at the limit"
        user.close()


@pytest.mark.slow
def test_chats_outlive_the_server(browser):
    with serving("hey.") as rig:
        user = Page(browser, rig)
        page, port = user.page, int(rig.url.rsplit(":", 1)[1])
        user.say("apples")
        user.settled(2)
    user.say("pears")
    page.wait_for_selector("text=The server can't be reached")
    with serving("hey.", port=port) as rig:
        page.click("text=Try again")
        user.settled(4)
        page.reload()
        user.settled(4)
        assert page.locator("article.user .body").all_inner_texts() == ["apples", "pears"]
    user.context.close()  # its console reports the connection that was refused


@pytest.mark.slow
def test_chats_are_kept_searched_exported_deleted_and_brought_back(browser, tmp_path):
    with serving("hey.") as rig:
        user = Page(browser, rig)
        page = user.page
        for name in ("apples", "pears"):
            user.say(name)
            user.settled(2)
            page.click("#fresh")
        assert page.locator("#chats li").count() == 2 and page.locator("article").count() == 0
        page.fill("#search", "PEAR")
        assert page.locator("#chats .chat").all_inner_texts() == ["pears"]
        page.fill("#search", "no such")
        assert page.is_visible("#nochats")
        page.fill("#search", "")
        page.click("#chats >> text=apples")
        assert page.inner_text("article.user .body") == "apples" and page.inner_text("#title") == "apples"
        with page.expect_download() as download:
            page.get_by_label("Export: apples").click()
        download.value.save_as(tmp_path / "apples.json")
        page.get_by_label("Delete: apples").click()
        assert page.locator("#chats .chat").all_inner_texts() == ["pears"]
        page.click("#toast >> text=Undo")
        assert page.locator("#chats li").count() == 2
        page.get_by_label("Delete: apples").click()
        evil = '{"chats": [{"id": "<b>", "messages": [{"role": "user", "content": "<img src=x onerror=alert(1)>"}, '
        evil += '{"role": "assistant", "content": "<script>", "html": "<script>"}]}, {"messages": 3}, null]}'
        (tmp_path / "evil.json").write_text(evil)
        page.set_input_files("#file", [tmp_path / "apples.json"])
        until(lambda: page.locator("#chats li").count() == 2)
        page.set_input_files("#file", [tmp_path / "evil.json"])
        until(lambda: page.locator("#chats li").count() == 3)
        page.click("#chats >> text=<img src=x")
        until(lambda: "<script>" in user.last().inner_text())
        assert page.locator("main img").count() == 0
        page.click("#open-settings")
        page.click("#delete-all")
        assert page.locator("#chats li").count() == 0
        user.close()


@pytest.mark.slow
def test_settings_reach_the_server_and_stay(browser):
    with serving("hey.", models=("test", "other")) as rig:
        user = Page(browser, rig, color_scheme="dark")
        page, seen = user.page, []
        page.on("request", lambda r: seen.append(r.post_data_json) if r.url.endswith("/chat/completions") else None)
        page.keyboard.press("Control+,")
        for name, value in (("system", "Be kind."), ("temperature", "0.5"), ("top_k", "7"), ("max_tokens", "99999")):
            page.fill("#" + name, value)
        page.select_option("#theme", "light")
        page.uncheck("#certainty")
        page.click("#settings >> text=Done")
        assert page.is_visible("#settings")  # the browser points at what is out of bounds
        page.keyboard.press("Escape")
        page.select_option("#model", "other")
        user.say("hi")
        user.settled(2)
        assert seen[0]["messages"][0] == {"role": "system", "content": "Be kind."}
        assert (seen[0]["temperature"], seen[0]["top_k"], seen[0]["model"]) == (0.5, 7, "other")
        assert "logprobs" not in seen[0] and "max_tokens" not in seen[0]  # out of bounds: the server's own
        page.reload()
        until(lambda: page.input_value("#model") == "other")
        assert page.get_attribute("html", "data-theme") == "light" and page.input_value("#system") == "Be kind."
        user.close()


@pytest.mark.slow
def test_an_api_key_is_asked_for_and_kept_for_the_tab(browser):
    with serving("hey.", api_key="secret") as rig:
        context = browser.new_context()
        page = context.new_page()
        page.goto(rig.url)
        page.wait_for_selector("text=needs an API key")
        page.keyboard.press("Control+,")
        page.fill("#key", "secret")
        page.click("#settings >> text=Done")
        until(lambda: page.locator("#model option").count() == 1)
        page.fill("#words", "hi")
        page.keyboard.press("Enter")
        until(lambda: page.locator("article.assistant").count() == 1)
        assert "secret" not in page.evaluate("JSON.stringify({...localStorage})")
        context.close()


@pytest.mark.slow
def test_markdown_code_and_mathematics_are_shown(browser):
    reply = (
        "# T\n\n```py\nx = 1  # <b>\n```\n\n$y^2$ <script>alert(1)</script> [l](javascript:x)\n\n| a |\n|---|\n| 1 |"
    )
    with serving("hey.") as rig:
        user = Page(browser, rig)
        page = user.page
        user.remember("q", reply)
        until(lambda: page.locator(".code pre").count())
        assert page.inner_text(".code pre").strip() == "x = 1  # <b>" and page.locator(".code .mi").count() == 1
        assert page.locator("math msup").count() == 1 and page.locator(".block h1").count() == 1
        assert page.locator("td").count() == 1 and page.locator(".block script, .block a").count() == 0
        assert "<script>alert(1)</script>" in user.last().inner_text()
        user.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click(".copy-code")
        until(lambda: page.evaluate("navigator.clipboard.readText()") == "x = 1  # <b>\n")
        page.click("article.assistant .copy-message")
        until(lambda: page.evaluate("navigator.clipboard.readText()") == reply)
        user.close()


@pytest.mark.slow
def test_by_keyboard_alone(browser):
    with serving("abcdefghijklmnopqrstuvw.", seconds=0.03, max_tokens=200) as rig:
        user = Page(browser, rig)
        page, press = user.page, user.page.keyboard.press
        page.keyboard.type("one")
        press("Shift+Enter")
        page.keyboard.type("two")
        press("Enter")
        until(lambda: page.locator("article").count() == 2 and user.last().inner_text())
        press("Escape")
        user.settled(2)
        assert page.inner_text("article.user .body") == "one\ntwo"
        press("ArrowUp")
        page.keyboard.type("!")
        press("Enter")
        user.settled(2)
        assert page.inner_text("article.user .body") == "one\ntwo!"
        press("Control+Shift+O")
        assert page.locator("article").count() == 0
        press("Control+K")
        press("Tab")
        press("Enter")  # the first chat of the list
        assert page.locator("article").count() == 2
        press("Tab")
        press("Escape")
        page.locator("#log").focus()
        press("?")
        assert page.is_visible("#keys")
        press("Escape")
        press("/")
        assert page.evaluate("document.activeElement.id") == "words"
        user.close()


@pytest.mark.slow
def test_reading_back_is_not_disturbed(browser):
    with serving([ord("a"), ord("\n")], seconds=0.01, max_tokens=300) as rig:
        user = Page(browser, rig, viewport={"width": 800, "height": 400})
        page = user.page
        user.remember("x\n" * 60, "y")
        user.settled(2)
        user.say("more")
        until(lambda: user.last().inner_text())
        page.locator("#log").evaluate("log => { log.scrollTop = 0; }")
        until(lambda: page.is_visible("#latest"))
        page.wait_for_timeout(300)
        assert page.locator("#log").evaluate("log => log.scrollTop") == 0
        page.click("#latest")
        assert page.locator("#log").evaluate("log => log.scrollTop") > 100
        user.settled(4)
        user.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme,width", [("dark", 1200), ("light", 360)])
def test_axe_finds_nothing_and_a_phone_shows_all(browser, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    def violations(page):
        return [(v["id"], [n["html"][:150] for n in v["nodes"]]) for v in Axe().run(page).response["violations"]]

    reply = "# T\n\n`a` [l](http://x.y)\n\n```py\nx = 'a' + f(1)  # c\n```\n\n$y^2$\n\n| a |\n|---|\n| 1 |\n\n> q"
    with serving("a«2*3»‹6›bcdefgh.") as rig:
        user = Page(browser, rig, color_scheme=scheme, viewport={"width": width, "height": 800})
        page = user.page
        assert violations(page) == []
        user.remember("q" * 300, reply)
        until(lambda: page.locator("table").count())
        user.say("hello")
        user.settled(4)
        page.click(".step > button")
        assert violations(page) == []
        page.click("text=Certainty")
        page.locator(".token").nth(1).hover()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width < 500:
            assert not page.locator("#fresh").is_visible()
            page.click("#menu")
            page.wait_for_timeout(300)
            assert page.locator("#fresh").is_visible() and violations(page) == []
            page.keyboard.press("Escape")
            until(lambda: not page.locator("#fresh").is_visible())
        page.keyboard.press("Control+,")
        assert violations(page) == []
        user.close()
