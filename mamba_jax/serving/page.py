"""The page to chat on, and what a browser may do with it."""

import base64
import dataclasses
import hashlib
import re
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Page:
    """A page, and the headers that it is sent with."""

    text: str
    headers: dict[str, str]


def load_page() -> Page:
    """Reads the page.

    Its policy: the page's own script and style run and nothing else does, such as HTML in a model's
    answer; it asks its own server alone; no other site shows it in a frame.
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
        "Cache-Control": "no-cache",  # the next version's page must meet the next version's policy
    }
    return Page(text, headers)


def _hashes(text: str, tag: str) -> str:
    """Returns the sources that allow what stands in elements of a page."""
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(each.encode()).digest() for each in inside)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
