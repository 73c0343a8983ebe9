"""Normalised text: the level between an exact repeat and a similar meaning; and what counts as content.

Two texts that normalise alike ask the same thing, so such a hit is served with no further check. Hence the
rules lean to the strict side: a difference that may carry meaning stays one, and costs an embedding.

* Unicode's compatibility forms (NFKC) are one: wide letters, ligatures, no-break spaces. But superscripts,
  subscripts, fractions and circled digits stay what they are: ``10²`` is not ``102``.
* The capital that a word begins with is folded; one inside a word (``iPhone``, ``US``), in a word with a
  digit or an underscore, or of a word of one letter (``C``) may be a name.
* Spaces within a line are one; lines stay lines. Typographic quotes are plain ones.
* Punctuation at the end of a sentence goes; ``!`` stays where it may be a factorial.
* Nothing is folded or closed up in quotes and backticks.
"""

from __future__ import annotations

import re
import unicodedata

from ..caching import cache_key

__all__ = ["content_words", "normal_key", "normalised"]

_LONGEST = 4_000  # characters
_KEPT_FORMS = ("<super>", "<sub>", "<fraction>", "<circle>")
_QUOTES = str.maketrans("\u2018\u2019\u201b\u201c\u201d\u201e\u201f", '\'\'\'""""')
_QUOTED = re.compile(r'(```.*?```|`[^`\n]*`|"[^"\n]*")', re.DOTALL)
_CAPITAL = re.compile(r"(?<!\w)[^\W\d_a-z]\w*")
_SPACES = re.compile(r"(?<=\S)[^\S\n]+")
_LINE_ENDS = re.compile(r"[^\S\n]*\n(?:[^\S\n]*\n)*")
_END = re.compile(r"(?:(?<=[^\W\d_]{2})(?:[.?!。؟।]+| [?!])|(?<=[\w)\]'\"])(?:[.?。؟।]+| \?))$")

_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Scripts that put no spaces between words, and how many of their characters make about one word.
_UNSPACED = (
    (re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"), 2),
    (re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"), 4),
)
# Question words, negations and numbers are content: they decide what the answer is.
_STOP_WORDS = """
    a an the and or but if so as at by for from in into of on to with about please
    i me my mine we us our you your he him his she her it its they them their this that these those there here
    am is are was were be been being do does did have has had will would can could shall should may might must
    i'm i've i'd i'll you're you've you'd we're we've it's that's there's he's she's they're let's
    hi hello hey thanks thank ok okay yes just
"""
_STOP = frozenset(_STOP_WORDS.split())


def _compatible(text: str) -> str:
    if text.isascii() or unicodedata.is_normalized("NFKC", text):
        return text
    return unicodedata.normalize("NFC", "".join(map(_compatible_character, text)))


def _compatible_character(character: str) -> str:
    if unicodedata.decomposition(character).startswith(_KEPT_FORMS):
        return character
    return unicodedata.normalize("NFKC", character)


def _folded(match: re.Match[str]) -> str:
    word = match[0]
    if len(word) == 1:
        return "i" if word == "I" else word
    return word.lower() if word[1:].islower() and word.isalpha() else word


def _plain(segment: str) -> str:
    return _SPACES.sub(" ", _LINE_ENDS.sub("\n", _CAPITAL.sub(_folded, segment)))


def normalised(text: str) -> str:
    """``text`` as all texts that differ from it only in case, spacing, Unicode form or end punctuation are
    written. Normalising again changes nothing. A text of more than 4,000 characters stays as it is."""
    if len(text) > _LONGEST:
        return text
    compatible = _compatible(text).translate(_QUOTES).replace("\r\n", "\n").strip()
    segments = _QUOTED.split(compatible)
    segments[::2] = map(_plain, segments[::2])
    joined = "".join(segments).strip()
    return _END.sub("", joined)


def normal_key(scope: str, text: str, secret: bytes | None = None) -> str:
    """64 hex digits that stand for all texts of ``scope`` that normalise like ``text``."""
    form = normalised(text).encode("utf-8", "surrogatepass")
    return cache_key.digest("normal", scope, (), form, secret)


def content_words(text: str) -> int:
    """How many words of ``text`` say something: not articles, pronouns, auxiliaries, prepositions and
    greetings. English ones are known; of other languages every word counts, and where a script has no spaces
    so many characters as make about one."""
    text = _compatible(text).translate(_QUOTES)
    count = 0
    for letters, size in _UNSPACED:
        text, found = letters.subn(" ", text)
        count += -(-found // size)
    return count + sum(token.lower() not in _STOP for token in _TOKEN.findall(text))
