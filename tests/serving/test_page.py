"""The chat page, in a real browser."""

import json

import pytest

from .browser import BROWSER, Browser
from .served import metric, post, request, serving, until

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")

# What can be seen on it.
ANSWERS = "[...document.querySelectorAll('.assistant .text')].map(part => part.textContent)"
LAST = "document.querySelector('.assistant:last-child .text').textContent"
ABOUT = "document.querySelector('.assistant:last-child .about')?.textContent"
NOTICE = "document.querySelector('#notice:not([hidden])')?.textContent"
SEND = "document.getElementById('send').textContent"
BOX = "document.getElementById('box').value"
AT_END = "log.scrollTop > 0 && log.scrollTop + log.clientHeight >= log.scrollHeight - 1"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def port():
    with serving() as port:
        yield port


@pytest.fixture
def page(browser, port):
    """The page, just opened; in the end its console is empty and no other host was contacted."""
    here = f"http://127.0.0.1:{port}/"
    browser.open(here)
    browser.until("document.title === 'tiny'")
    yield browser
    assert not browser.complaints()
    assert all(url.startswith(here) for url in browser.requested()), browser.requested()


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


def _set(page, **settings):
    """Sets what the settings say."""
    page.click("#adjust")
    for name, value in settings.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.click("#adjust")
    page.see("document.getElementById('box').focus()")


def _say(page, text):
    """Types a message and presses Enter; returns the whole answer."""
    n_before = page.see("document.querySelectorAll('.about').length")
    page.type(text)
    page.press("Enter")
    page.until(f"document.querySelectorAll('.about').length > {n_before} && {SEND} === 'Send'")
    return page.see(LAST)


def _sent_messages(page):
    """Returns the messages that the page sent last; what a tiny model answers tells little."""
    sent = page.events("Network.requestWillBeSent")[-1]["request"]
    return json.loads(sent["postData"])["messages"]


def _answer_of(port, *messages):
    """Returns the answer that another client gets, and its usage."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 12}
    status, answer = post(port, "/v1/chat/completions", body)
    assert status == 200
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_a_conversation_is_what_the_server_says(page, port):
    _set(page, temperature=0, max_tokens=12)
    first = _say(page, "Who are <you>?")
    expected, usage = _answer_of(port, _user("Who are <you>?"))
    assert first == expected
    about = page.see(ABOUT)
    assert about.startswith(f"reached max tokens · {usage['prompt_tokens']} prompt tokens")
    assert f"{usage['completion_tokens']} generated" in about and "tokens/s" in about

    page.type("Two")
    page.press("Enter", shift=True)
    second = _say(page, "lines")
    turns = [_user("Who are <you>?"), _assistant(first), _user("Two\nlines")]
    assert _sent_messages(page) == turns
    assert second == _answer_of(port, *turns)[0]
    assert page.see(ANSWERS) == [first, second]
    assert (
        page.see("document.querySelector('.user:nth-child(3) .text').textContent") == "Two\nlines"
    )

    page.click("#new")
    assert page.see(ANSWERS) == []
    _set(page, system="Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, _user("Hi")]
    assert _say(page, "Hi") == _answer_of(port, *turns)[0]
    assert _sent_messages(page) == turns


@pytest.mark.parametrize("how", ["the button", "Escape", "a new chat"])
def test_stopping_frees_the_slot(page, port, how):
    """Greedily this model repeats itself for all of 100,000 tokens."""
    cancelled = lambda: (
        request(port, "GET", "/metrics")[2].count(b'"cancelled"')
        and metric(port, 'mamba_jax_generations_total{reason="cancelled"}')
    )
    before = cancelled()
    _set(page, temperature=0, max_tokens=100_000)
    page.type("On and on")
    page.press("Enter")
    page.until(f"document.querySelector('.assistant') && {LAST}.length > 20")
    assert page.see(SEND) == "Stop"
    assert page.see("document.getElementById('log').ariaBusy") == "true"
    page.press("Enter")  # does nothing while an answer comes
    assert metric(port, "mamba_jax_generations_decoding") == 1
    if how == "Escape":
        page.press("Escape")
    else:
        page.click("#send" if how == "the button" else "#new")
    until(lambda: metric(port, "mamba_jax_generations_decoding") == 0)
    until(lambda: cancelled() == before + 1)
    page.until(f"{SEND} === 'Send'")
    if how == "a new chat":
        assert page.see(ANSWERS) == []
        return
    shown = page.see(LAST)
    assert page.see(ABOUT) == "stopped"
    _set(page, max_tokens=12)
    _say(page, "x")
    assert _sent_messages(page) == [_user("On and on"), _assistant(shown), _user("x")]


def _pretend(page, *pieces, status=200, headers=None, ends=True):
    """Makes the server answer with bytes, a list for each read."""
    page.see(
        f"""window.fetch = async () => new Response(new ReadableStream({{ start(stream) {{
          for (const piece of {json.dumps([list(piece) for piece in pieces])})
            stream.enqueue(Uint8Array.from(piece));
          {"stream.close()" if ends else "stream.error(new TypeError('network error'))"};
        }} }}), {{ status: {status}, headers: {json.dumps(headers or {})} }}); 0"""
    )


def _lines(*texts, end="\n"):
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    return "".join(f"data: {json.dumps(c, ensure_ascii=False)}{end}{end}" for c in chunks).encode()


HTML = "<img src=x onerror=\"document.title='hurt'\"><script>document.title='hurt'</script>&lt;é€😀"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_bytes_may_be_cut_anywhere_and_html_is_text(page, size, end):
    stream = f": hello{end}{end}".encode() + _lines(HTML, "\n  ", HTML, end=end)
    stream += f"data: [DONE]{end}{end}".encode()
    _pretend(page, *(stream[at : at + size] for at in range(0, len(stream), size)))
    assert _say(page, HTML) == HTML + "\n  " + HTML
    assert not page.see(NOTICE)
    assert page.see("document.querySelector('.user .text').textContent") == HTML
    # No element came of it: two parts of a heading, a text and buttons, one with the counts.
    assert page.see("document.querySelectorAll('#log :not(button)').length") == 9
    assert page.see("document.title") == "tiny"


STARTED = _lines("started")
WRONG = {
    "busy": ({"status": 429, "headers": {"Retry-After": "7"}}, [b"{}"], "busy; try again in 7 s"),
    "refused": (
        {"status": 400},
        [b'{"error": {"message": "no <b>"}}'],
        "refused the request: no <b>.",
    ),
    "no JSON": ({"status": 502}, [b"<html>"], "status 502"),
    "nothing": ({}, [], "cut off: the server closed the connection"),
    "cut short": ({}, [STARTED], "cut off: the server closed the connection"),
    "lost": ({"ends": False}, [STARTED], "cut off: the connection was lost"),
    "failed": (
        {},
        [STARTED, b'data: {"error": {"message": "too late"}}\n\n'],
        "cut off: too late.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_failures_are_reported(page, case):
    """A question without any answer returns to its box; an answer that began is kept."""
    how, pieces, message = WRONG[case]
    _pretend(page, *pieces, **how)
    page.type("Hello?")
    page.press("Enter")
    assert message in page.until(NOTICE)
    page.until(f"{SEND} === 'Send'")
    if how.get("ends", True) and STARTED not in pieces:
        assert page.see(ANSWERS) == []
        assert page.see(BOX) == "Hello?"
    elif how.get("ends", True):  # what was read before a connection is lost is the browser's choice
        assert page.see(ANSWERS) == ["started"]
        assert page.see(ABOUT).startswith("cut off")
        assert page.see(BOX) == ""


def test_a_setting_that_cannot_work_is_shown(page):
    _set(page, top_p=2)
    page.type("Hi")
    page.press("Enter")
    assert page.see("document.activeElement.name") == "top_p"
    assert page.see(ANSWERS) == []


def test_regenerating_with_a_setting_that_cannot_work_keeps_the_turn(page):
    _set(page, temperature=0, max_tokens=5)
    answer = _say(page, "Hi")
    _set(page, top_p=2)
    _act(page, "Regenerate")
    assert page.see("document.activeElement.name") == "top_p"
    assert page.see(ANSWERS) == [answer]


def test_only_the_pages_own_script_runs_and_it_asks_its_own_server_alone(browser, port):
    browser.open(f"http://127.0.0.1:{port}/")
    browser.see(
        """document.body.insertAdjacentHTML('beforeend',
        `<img src="x:" onerror="document.title = 'hurt'"><a style="color: red">a</a>`)"""
    )
    browser.see(f"fetch('http://localhost:{port}/health').catch(() => 0)")
    browser.until("document.title === 'tiny'")
    refused = [c["text"] for c in browser.complaints() if c.get("source") == "security"]
    for directive in ("script-src", "style-src", "img-src", "connect-src"):
        assert any(directive in text for text in refused), (directive, refused)


def test_the_page_prompts_for_a_key_and_reports_an_unreachable_server(browser):
    unlock = "!document.getElementById('unlock').hidden && document.activeElement.id === 'key'"
    with serving(api_key="sécret") as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until(unlock)
        assert browser.see(NOTICE) == "This server needs an API key."
        browser.type("wrong")
        browser.press("Enter")
        browser.until(f"({NOTICE}) === 'The server rejected this API key.'")
        assert browser.see(unlock)
        browser.type("sécret")
        browser.press("Enter")
        browser.until("document.getElementById('unlock').hidden && document.title === 'tiny'")
        assert not browser.see(NOTICE)
        assert browser.see("document.activeElement.id") == "box"
        browser.open(f"http://127.0.0.1:{port}/")  # as long as the tab is open
        browser.until("document.title === 'tiny'")
        assert browser.see("[localStorage.length, document.cookie]") == [0, ""]
        _set(browser, temperature=0, max_tokens=12)
        assert _say(browser, "Hi")
    browser.type("Still there?")
    browser.press("Enter")
    assert "does not respond" in browser.until(NOTICE)
    assert browser.see(BOX) == "Still there?"
    assert not browser.complaints()


@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_and_keys_reach_everything(browser, port, width):
    paper = "getComputedStyle(document.body).backgroundColor"
    for scheme, colour in (("dark", "rgb(20, 23, 26)"), ("light", "rgb(255, 255, 255)")):
        browser.open(f"http://127.0.0.1:{port}/", width, 640, scheme)
        browser.until("document.title === 'tiny'")
        assert browser.see(paper) == colour
    _pretend(browser, _lines("long" * 200, "\nline" * 60), b"data: [DONE]\n\n")
    _say(browser, "word" * 100)
    assert browser.see(AT_END)
    browser.click("#adjust")
    assert browser.see(AT_END)
    assert browser.see("document.documentElement.scrollWidth") == width
    assert browser.see("log.scrollWidth === log.clientWidth")
    assert browser.see("document.documentElement.scrollHeight") == 640  # the conversation scrolls
    reached = []
    browser.see("document.activeElement.blur()")
    for _ in range(22):  # once round, with the buttons of a turn and all settings
        browser.press("Tab")
        reached.append(browser.see("document.activeElement.id || document.activeElement.name"))
    assert set(reached) >= {"adjust", "new", "log", "box", "send", "temperature", "system"}, reached
    assert set(reached) >= {"chat", "completion", "seed", "stop", "top_k"}, reached


def _act(page, name, part=".assistant:last-child"):
    """Clicks a button below a part of the conversation."""
    buttons = f"[...document.querySelectorAll('{part} .acts button')]"
    page.see(f"{buttons}.find(button => button.textContent === '{name}').click()")


def _sent(page):
    """Returns what the page sent last, and where."""
    sent = page.events("Network.requestWillBeSent")[-1]["request"]
    return json.loads(sent["postData"]), sent["url"]


def test_a_text_is_continued_in_completion_mode(browser, port):
    browser.open(f"http://127.0.0.1:{port}/?a#completion")
    browser.until("document.title === 'tiny'")
    _set(browser, temperature=0, max_tokens=12, top_k=7, seed=3, stop="\\\\n\\n\nQ \\t")
    body = {"prompt": "  def main(", "max_tokens": 12, "temperature": 0}
    expected = post(port, "/v1/completions", body)[1]["choices"][0]["text"]
    assert _say(browser, "  def main(") == "  def main(" + expected
    sent, url = _sent(browser)
    assert url.endswith("/v1/completions")
    assert (sent["prompt"], sent["top_k"], sent["seed"]) == ("  def main(", 7, 3)
    assert sent["stop"] == ["\\n\n", "Q \t"]
    _say(browser, "")  # no text at all begins a document; nothing before belongs to it
    assert _sent(browser)[0]["prompt"] == ""
    browser.click("#chat")
    assert browser.see(ANSWERS) == []
    _set(browser, stop="", seed="")
    _say(browser, "Hi")
    assert _sent_messages(browser) == [_user("Hi")]
    assert not {"seed", "stop"} & set(_sent(browser)[0])
    browser.click("#completion")
    assert len(browser.see(ANSWERS)) == 2
    _act(browser, "Edit", ".assistant:first-child")
    assert browser.see(BOX) == "  def main("
    assert browser.see(ANSWERS) == []
    browser.click("#chat")
    assert len(browser.see(ANSWERS)) == 1
    assert not browser.complaints()


def test_a_turn_is_copied_made_again_and_edited(page, port):
    page.see("navigator.clipboard.writeText = async text => window.copied = text; 0")
    _pretend(page, _lines("<b>One</b>", "\n  two "), b"data: [DONE]\n\n")
    _say(page, "Say it")
    _act(page, "Copy")
    assert page.until("window.copied") == "<b>One</b>\n  two "
    _pretend(page, _lines("Another"), b"data: [DONE]\n\n")
    _act(page, "Regenerate")
    page.until(f"{LAST} === 'Another' && {SEND} === 'Send'")
    assert page.see(ANSWERS) == ["Another"]
    page.see("delete window.fetch; 0")
    page.open(page.see("location.href"))
    page.until("document.title === 'tiny'")
    _set(page, temperature=0, max_tokens=5)
    first = _say(page, "First")
    _say(page, "Second")
    _act(page, "Edit", ".user:nth-child(3)")
    assert page.see(ANSWERS) == [first]
    assert page.see(BOX) == "Second"
    page.fill("#box", "Third")
    _say(page, "")
    assert _sent_messages(page) == [_user("First"), _assistant(first), _user("Third")]
    _act(page, "Regenerate", ".assistant:nth-child(2)")
    page.until(f"{SEND} === 'Send' && document.querySelectorAll('.about').length === 1")
    assert _sent_messages(page) == [_user("First")]
    assert page.see(ANSWERS) == [first]


def test_it_says_that_the_server_is_warming_up(browser, port, tmp_path):
    waiting = {"status": "warming up", "programs": 28, "compiled": 7, "warm_up_secs": 12.3}
    script = f"""window.warm = {json.dumps(waiting)}; const ask = window.fetch;
        window.fetch = (path, ...more) => path === "ready" && warm
          ? Promise.resolve(new Response(JSON.stringify(warm), {{ status: 503 }}))
          : ask(path, ...more);"""
    added = browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    try:
        browser.open(f"http://127.0.0.1:{port}/")
        said = browser.until("document.querySelector('#warming:not([hidden])')?.textContent")
        assert "warming up: 7 of 28 programs compiled in 12 s" in said
        browser.type("Hi")
        browser.press("Enter")
        assert browser.see("document.getElementById('send').disabled")
        assert (browser.see(ANSWERS), browser.see(BOX)) == ([], "Hi")
        browser.see("window.warm = null; 0")
        browser.until("document.querySelector('#warming').hidden")
        _set(browser, temperature=0, max_tokens=5)
        _say(browser, "!")
        assert _sent_messages(browser) == [_user("Hi!")]
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
    assert not browser.complaints()
