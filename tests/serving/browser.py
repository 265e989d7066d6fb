"""A real Chromium, driven by its DevTools protocol over a pipe: no driver, no port, no dependency.

Messages are JSON that ends in a zero byte; the browser reads them from its file descriptor 3 and
writes answers and events to 4.
"""

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import time

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)
_SECS = 120  # for anything, a compilation included; only a failure takes this long
_KEYS = {"Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, "")}
_SHIFT = 8


class Browser:
    """A browser with one page open."""

    def __init__(self, profile: pathlib.Path):
        """Starts it without a window."""
        self._events, self._bytes, self._last_id = [], b"", 0
        ours, theirs = os.pipe(), os.pipe()  # what we read, what the browser reads
        # A shell puts them in place, out of the way of 3 and 4 themselves.
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs[0], ours[1])]
        command = [
            *("bash", "-c", f'exec "$@" 3<&{given[0]} 4>&{given[1]}', "bash"),
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *(f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking"),
            "about:blank",
        ]
        self._process = subprocess.Popen(command, pass_fds=given, stderr=subprocess.DEVNULL)
        for fd in (*given, theirs[0], ours[1]):
            os.close(fd)
        self._read, self._write = ours[0], theirs[1]
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        """Ends it."""
        with contextlib.suppress(OSError):
            self._session = None
            self.call("Browser.close")
        self._process.wait(30)
        os.close(self._read)
        os.close(self._write)

    # The protocol.

    def call(self, method, **params):
        """Calls a method; returns its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self._last_id:
                assert "error" not in reply, reply
                return reply["result"]
            self._events.append(reply)

    def _next(self):
        while b"\0" not in self._bytes:
            readable, _, _ = select.select([self._read], [], [], _SECS)
            assert readable, "the browser does not answer"
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser has ended"
            self._bytes += piece
        message, _, self._bytes = self._bytes.partition(b"\0")
        return json.loads(message)

    def events(self, method):
        """Returns the parameters of the events of a kind since the page was opened."""
        return [event["params"] for event in self._events if event.get("method") == method]

    # What a user does.

    def open(self, url, width=1000, height=700, scheme="light"):
        """Opens a page in a window of a size; what happened before is forgotten."""
        self._events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def see(self, expression):
        """Returns the value of an expression in the page."""
        reply = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def until(self, expression):
        """Waits until an expression is true; returns its value."""
        deadline = time.monotonic() + _SECS
        while not (value := self.see(expression)):
            assert time.monotonic() < deadline, expression
            time.sleep(0.01)
        return value

    def press(self, key, shift=False):
        """Presses a key where the focus is."""
        code, number, text = _KEYS[key]
        key_event = {
            "key": key,
            "code": code,
            "windowsVirtualKeyCode": number,
            "modifiers": _SHIFT * shift,
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **key_event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key_event)

    def type(self, text):
        """Types a text where the focus is."""
        self.call("Input.insertText", text=text)

    def fill(self, selector, text):
        """Puts a text into a field in place of what it holds."""
        self.see(f"document.querySelector({json.dumps(selector)}).select()")
        self.type(text)

    def click(self, selector):
        """Clicks on the middle of an element."""
        x, y = self.see(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path):
        """Writes what is seen to a PNG file."""
        reply = self.call("Page.captureScreenshot", format="png")
        pathlib.Path(path).write_bytes(base64.b64decode(reply["data"]))

    def complaints(self):
        """Returns what the page's console holds: errors, warnings, refusals of its policy."""
        logged = [event["entry"] for event in self.events("Log.entryAdded")]
        return [
            *[event["exceptionDetails"] for event in self.events("Runtime.exceptionThrown")],
            *[event["args"] for event in self.events("Runtime.consoleAPICalled")],
            # A response that is an error is logged as well; the page handles it.
            *[entry for entry in logged if entry["source"] != "network"],
        ]

    def requested(self):
        """Returns the addresses that the page requested."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]
