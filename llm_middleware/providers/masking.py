"""What a provider says, made fit to be shown: no key, no URL, no host, no one's name for a deployment."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["LONGEST", "masked"]

LONGEST: Final = 1000  # characters of a message
_LOOKED_AT: Final = 4 * LONGEST
_MASK: Final = "***"

_NAMED: Final = (
    r"(?:api|access|secret|subscription|auth)[-_ ]?(?:key|token)(?: id)?|authorization|password|secret|token"
)
_PREFIXES: Final = (
    r"asst|csk|dapi|fw|ghp|gho|github_pat|hf|jina|key|nvapi|org|pplx|proj|r8|req|tgp_v1|user|xai"
)
_TOP: Final = (
    "ai|app|azure|cloud|cn|co|com|corp|de|dev|eu|example|fr|gg|internal|invalid|io|jp|lan|local|net|online|org"
    "|ru|services|site|svc|tech|test|uk|xyz"
)
_REST: Final = r"(?::\d{1,5})?(?:/[^\s\"'<>]*)?"  # a port and a path

# Each takes time that grows with the length of the text and no faster.
_PATTERNS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"\b[a-z][a-z0-9+.-]{0,20}://[^\s\"'<>]*", "[url]"),
        # Credentials that say what they are.
        (r"\b(bearer|basic)\s+[^\s\"',;]{8,}", rf"\1 {_MASK}"),
        (
            rf"\b({_NAMED})((?: provided| is)?[\"']?\s*[:=]\s*[\"'`]?)[^\s\"'`,;<>]+",
            rf"\1\2{_MASK}",
        ),
        # Credentials and ids by their first letters.
        (r"\b(?:sk|gsk|pk|rk)[-_][\w*.-]{4,}", _MASK),
        (rf"\b(?:{_PREFIXES})[-_](?=[\w*.-]{{0,200}}[\d*])[\w*.-]{{4,}}", _MASK),
        (r"\b(?:AIza|ya29\.|AKIA|ASIA|eyJ)[\w.*/+=-]{6,}", _MASK),
        # And by their looks: UUIDs, and long runs of letters and digits mixed.
        (r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", _MASK),
        (r"\b(?=[a-z]{0,63}[0-9])(?=[0-9]{0,63}[a-z])[a-z0-9]{20,}(?:[+/=][a-z0-9+/=]*)?", _MASK),
        # A deployment in quotes, and machines.
        (
            r"\b(deployments?|resource|endpoint)((?: name| id)?\s*[:=]?\s*)([\"'`])[^\"'`]{1,200}\3",
            rf"\1\2{_MASK}",
        ),
        (r"\b(host(?:name)?=)[\"']?[\w.-]+[\"']?", rf"\1{_MASK}"),
        (rf"(?<![\w.@-])(?:[a-z0-9_][a-z0-9_-]{{0,62}}\.){{1,10}}(?:{_TOP})\b{_REST}", "[host]"),
        (rf"\b(?:\d{{1,3}}\.){{3}}\d{{1,3}}\b{_REST}", "[host]"),
        (r"\[[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}\](?::\d{1,5})?", "[host]"),
        (rf"\blocalhost\b{_REST}", "[host]"),
        (r"(?<![\w-])[a-z][a-z0-9]*(?:-[a-z0-9]+)+:\d{2,5}\b", "[host]"),
    )
)
_UNSEEN: Final = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\ud800-\udfff]+")


def masked(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` as one line of at most `LONGEST` characters, with what looks like a key, a URL, a host or a
    deployment's id masked, and every one of ``secrets`` wherever it stands."""
    whole = len(text) <= _LOOKED_AT
    text = _UNSEEN.sub(" ", text[:_LOOKED_AT]).strip()
    if not whole:  # half a key at the end would look like none
        text = text.rpartition(" ")[0]
    for secret in secrets:
        if len(secret) > 2:
            text = text.replace(secret, _MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
