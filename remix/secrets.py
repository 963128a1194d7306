"""Credentials: where a text holds one, and the same text without it.

What counts: the values of environment variables whose names say so (HF_TOKEN, WANDB_API_KEY, MY_SECRET), and a few
forms that nothing else has (hf_..., AKIA..., scheme://user:password@host).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

SHORTEST = 8
"""Characters of a value that counts: shorter ones occur everywhere."""
REMOVED = "[secret]"

_NAME = re.compile(
    r"(?:^|_)(?:KEY|PAT|AUTH|CREDENTIALS?)$|_PWD$|(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY)(?:_|$)"
)
_PLACE = re.compile(r"_(?:PATH|FILE|DIR|SOCK|URL|NAME|ID)$")
"""Names of variables that say where a credential lies, not what it is."""

_FORMS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"(?<![A-Za-z0-9_-])sk-(?=[\w-]*\d)[\w-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google API key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[a-z]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]*-----END [A-Z ]*PRIVATE KEY-----)?",
    "a password in an address": r"(?<=://)[^\s/:@'\"]*:[^\s/@'\"]+(?=@)",
}
_FORM = {kind: re.compile(pattern) for kind, pattern in _FORMS.items()}


def find_secret(text: str, environ: Mapping[str, str] | None = None) -> str | None:
    """In words, which credential the text holds ("the value of $HF_TOKEN", "an AWS key"); None where it holds none."""
    for name, value in _values(os.environ if environ is None else environ):
        if value in text:
            return f"the value of ${name}"
    return next((kind for kind, pattern in _FORM.items() if pattern.search(text)), None)


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text with every credential replaced by [secret]."""
    for _, value in _values(os.environ if environ is None else environ):
        text = text.replace(value, REMOVED)
    for pattern in _FORM.values():
        text = pattern.sub(REMOVED, text)
    return text


def _values(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and values, the longest first, since one may hold another."""
    named = [
        (name, value.strip())
        for name, value in environ.items()
        if _NAME.search(name.upper()) and not _PLACE.search(name.upper())
    ]
    for name, value in sorted(named, key=lambda pair: -len(pair[1])):
        if len(value) >= SHORTEST and not os.path.exists(value):
            yield name, value
