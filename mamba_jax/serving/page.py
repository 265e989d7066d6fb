"""The chat page and its content security policy."""

import base64
import dataclasses
import hashlib
import re
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Page:
    """A page and its response headers."""

    text: str
    headers: dict[str, str]


def load_page() -> Page:
    """Loads the page.

    Its policy: only the page's own script and style run, so HTML in a model's answer never does;
    the page connects to its own server only; no other site may show it in a frame.
    """
    text = resources.files("mamba_jax.serving").joinpath("assets/chat.html").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_hashes(text, 'script')}; "
        f"style-src {_hashes(text, 'style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # a cached page would not match a newer version's policy
    }
    return Page(text, headers)


def _hashes(text: str, tag: str) -> str:
    """Returns the CSP sources that allow the content of a page's elements."""
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(each.encode()).digest() for each in inside)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
