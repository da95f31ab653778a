"""The texts that a prompt quotes, and one plain form for all spellings of a text.

Published code takes the text between the first two straight double quotes and drops spaces and case. Prompts that
people write contain curly quotes, several texts, inch marks and letters in more than one encoding.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

# The marks that end a quotation, the likelier first, by the mark that opens it.
_CLOSERS = {"“": "”“", "„": "“”", "‟": "”", "〝": "〞〟", "«": "»", "»": "«»", "「": "」", "『": "』"}
_EITHER = '"”＂'  # marks that begin or end a quotation, or stand for inches
_OPENS_AFTER = "([{<:=-–—/"
_CLOSES_BEFORE = ".,;:!?)]}>'’…-–—/。，、；：！？）】》」』"

# An apostrophe begins no quotation inside a word or in place of cut-off letters, and ends none before a letter.
_CUT = re.compile(r"(?<!\w)['‘’](?=(?i:em|til|tis|twas|cause|bout|\d\ds)\b)|(?<!\w)['‘’]n['‘’](?!\w)")
_SINGLE = re.compile(
    r"(?<!\w)['‘](?!\s)(?P<a>(?:(?!\s['‘]\S).)+?)(?<!\s)['’](?!\w)|‚(?P<b>[^‘’]+)[‘’]|‹(?P<c>[^›]+)›", re.DOTALL
)

_ALIKE = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′´`ʼʹ＇", "'"),
        **dict.fromkeys("“”„‟″〝〞〟＂", '"'),
        **dict.fromkeys("‐‑‒–—―−⁃﹘﹣－", "-"),
        "™": "TM",
        "℠": "SM",
        "ı": "i",
    }
)
# Forms that stay apart from their plain twins, both on a sign and in the engine's dictionary: x² is not x2.
_OWN_FORMS = ("<super>", "<sub>", "<circle>", "<fraction>")
_INVISIBLE = ("Cf", "Zs", "Zl", "Zp")
_VARIANTS = {chr(code) for code in range(0xFE00, 0xFE10)}


@lru_cache(4096)
def plain(text: str) -> str:
    """The text without spaces, case and invisible characters, and with one form for each character (NFC).

    Full-width forms, ligatures and other compatibility forms (NFKC) become their plain twins, except superscripts,
    subscripts, circled characters and fractions. Curly quotes, primes and all dashes become straight ones, ß becomes
    ss, and the Turkish dotted and dotless i become i.
    """
    folded = "".join(_folded(character) for character in unicodedata.normalize("NFC", text).translate(_ALIKE))
    cased = unicodedata.normalize("NFC", folded).casefold().replace("i\u0307", "i")
    seen = (one for one in cased if not (one.isspace() or unicodedata.category(one) in _INVISIBLE or one in _VARIANTS))
    return unicodedata.normalize("NFC", "".join(seen))


def _folded(character: str) -> str:
    if unicodedata.decomposition(character).startswith(_OWN_FORMS):
        return character
    twin = unicodedata.normalize("NFKC", character)
    return character if len(twin) > 1 and twin[0] == " " else twin  # an accent that stands alone


@lru_cache(4096)
def quoted_texts(prompt: str) -> tuple[str, ...]:
    """The distinct texts that the prompt quotes, in their order; a blank text does not count.

    Quotations stand in double quotes, straight or of any language. Only without any of these do single quotes count,
    where they are no apostrophes. A mark after a number is an inch unless it ends a quotation, and a mark without a
    partner is ignored. If the whole prompt is quoted, as tables export it, the texts are those quoted inside.
    """
    if prompt.count('\\"') > 1:
        prompt = prompt.replace('\\"', '"')
    inner = unwrapped(prompt)
    if inner is not None:
        return quoted_texts(inner)
    texts: dict[str, str] = {}
    for text in list(filter(plain, _double(prompt))) or _single(prompt):
        if plain(text):
            texts.setdefault(plain(text), text.strip())
    return tuple(texts.values())


def unwrapped(prompt: str) -> str | None:
    """The prompt without the quotes around all of it; None if it has no such quotes."""
    text = prompt.strip().rstrip(".,;")
    if len(text) < 3:
        return None
    inner, closers = text[1:-1], _CLOSERS.get(text[0], text[0])
    if text[0] in _EITHER and text[-1] == text[0]:
        first = inner.find(text[0])  # "SALE" and "OFF" begins and ends alike too, but its second mark closes
        whole = first < 0 or inner[first : first + 2] == 2 * text[0] or _opens(inner, first)
        return inner.replace(2 * text[0], text[0]) if whole else None
    if text[0] in _CLOSERS:
        return inner if text[-1] in closers and not any(mark in inner for mark in closers) else None
    return inner if _SINGLE.fullmatch(text) else None


def _double(prompt: str) -> Iterator[str]:
    place = 0
    while place < len(prompt):
        mark, end = prompt[place], -1
        if mark in _EITHER:
            end = _partner(prompt, place)
        elif mark in _CLOSERS:
            ends = (prompt.find(closer, place + 1) for closer in (*_CLOSERS[mark], '"'))
            end = next((one for one in ends if one > place), -1)
            place = max(place, prompt.rfind(mark, place, end))  # an opening mark without an end is skipped
        if end > place:
            yield prompt[place + 1 : end]
            place = end
        place += 1


def _partner(prompt: str, place: int) -> int:
    """Where the quotation that begins at `place` ends; -1 if none begins there."""
    if _after_number(prompt, place) or _closes(prompt, place):
        return -1
    marks = [at for at in range(place + 1, len(prompt)) if prompt[at] == prompt[place]]
    for number, at in enumerate(marks):
        if _opens(prompt, at):
            return -1
        if not (_after_number(prompt, at) and _inside(prompt, at, marks[number + 1 :])):
            return at
    return -1


def _inside(prompt: str, at: int, later: Sequence[int]) -> bool:
    """Whether the mark at `at`, after a number in a quotation, is an inch: it then leaves the end to a later mark."""
    following = prompt[at + 1 : at + 2]
    if following.isascii() and following.isalnum():
        return True
    for place in later:
        if not _closes(prompt, place):
            return False
        if not _after_number(prompt, place):
            return True
    return False


def _after_number(prompt: str, place: int) -> bool:
    return prompt[place - 1 : place].isdigit()


def _opens(prompt: str, place: int) -> bool:
    before, after = prompt[:place][-1:], prompt[place + 1 : place + 2]
    starts = not before or before.isspace() or before in _OPENS_AFTER
    return starts and bool(after) and not after.isspace() and after != prompt[place]


def _closes(prompt: str, place: int) -> bool:
    before, after = prompt[:place][-1:], prompt[place + 1 : place + 2]
    ends = not after or after.isspace() or after in _CLOSES_BEFORE
    return bool(before) and not before.isspace() and ends and not _opens(prompt, place)


def _single(prompt: str) -> Iterator[str]:
    cut = _CUT.sub(lambda found: re.sub("['‘’]", "ʼ", found[0]), prompt)  # as long as the prompt
    for found in _SINGLE.finditer(cut):
        group = found.lastgroup
        assert group is not None  # every branch has a group
        yield prompt[found.start(group) : found.end(group)]
