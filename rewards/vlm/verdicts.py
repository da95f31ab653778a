"""Reads a vision-language model's answer: a mark on a scale, or which of two images is better.

The last of several statements counts. A mark outside its scale, a range ("3-4") and a verdict for both sides count as
no statement, and a number that is not stated as a mark ("2 dogs") is no mark.
"""

import re
import unicodedata

# A mark, the highest mark it is out of, and the end that shows that the number does not count something.
_NUMBER = r"(?P<mark>[-+\u2212]?\d+(?:\.\d+|,\d{1,2})?)(?![\d.,]*\d)"
_OUT_OF = r"\s*\(?(?:/|out\s+of)\s*(?P<most>\d+)|\s*(?P<percent>%)"
_RANGE = r"(?P<range>\s*(?:[-\u2013\u2014~]|\bto\b|\bor\b)\s*\d)"
_END = r"(?=[*_\"'`)\]}]*[ \t]*(?:$|[^\w\s%]|(?:because|since|as|due|for|but|and|with|points?|stars?|marks?)\b))"
_MARK = rf"{_NUMBER}(?:{_RANGE}|{_OUT_OF})?{_END}"
# Between the name and the mark: emphasis and quotes, a bracket such as "(1-5)", and a sign or verb such as ":" or "is".
_GAP = r"[\s*_\"'`{]*"
_STATES = rf"{_GAP}(?:[(\[](?P<scale>[^)\]\n]*)[)\]])?{_GAP}(?:[:=>\u2013\u2014]|-(?=\s)|\bis\b|\bof\b){_GAP}"
_NOUN = r"(?:score|rating|grade|mark)"
_WHOLE = (  # names of the one mark for everything, the clearest first
    rf"(?<![\w-])(?:(?:final|overall|total)[\s_-]+{_NOUN}|final|overall)",
    rf"(?<![\w-])(?:(?:the|an?|my|this|its|your|image|picture|numerical)[ _]|(?<!\w[ _-])(?<!\w[*_][ _-])){_NOUN}",
    r"\b(?:rate|give)\s+(?:(?:it|this|the|an?|image|picture)\s+)*",
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?([^{}]*)\}")


def mark(answer: str, name: str, low: float, high: float) -> float | None:
    """The last mark that the answer states under `name` ("final": for everything); None if not in [low, high].

    It reads "Style Score (1-5): 4", "**style** = 4/5", '{"style": 4}' and "<style>4</style>"; for "final" also
    "Score: 4", "Rating \u2013 4", "4 out of 5", "\\boxed{4}" and an answer that is only a number.
    """
    said = statement(answer, name)
    return None if said is None else _in_scale(said, low, high)


def statement(answer: str, name: str) -> dict[str, str | None] | None:
    """The parts of the last statement of a mark under `name`, inside the scale or not; None if there is none."""
    text = unicodedata.normalize("NFKC", answer).strip()
    if name == "final":
        text = _BOXED.sub(r" final: \1\n", text)
        patterns = [rf"(?:{label})(?:{_STATES}|\s*){_MARK}" for label in _WHOLE]
        patterns += [rf"(?<![\w.,/]){_NUMBER}(?:{_OUT_OF}){_END}", rf"\A{_GAP}{_NUMBER}[\s*_\"'`}}.]*\Z"]
    else:
        patterns = [rf"(?<![\w-]){re.escape(name)}(?:[ _-]+{_NOUN})?(?![\w-]){_STATES}(?:score[\"']?\s*:\s*)?{_MARK}"]
    for pattern in patterns:
        found = list(re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE))
        if found:
            return found[-1].groupdict()
    return None


def _in_scale(said: dict[str, str | None], low: float, high: float) -> float | None:
    value = float((said["mark"] or "").replace(",", ".").replace("\u2212", "-"))
    stated = re.findall(r"\d+", said.get("scale") or "")[-1:] + ["100"] * bool(said.get("percent"))
    stated += [said["most"]] if said.get("most") else []
    other = said.get("range") or any(float(most) != high for most in stated)
    return value if not other and low <= value <= high else None


_THING = r"(?:image|picture|photo|option|candidate|choice)"
_SIDE = rf"(?:the\s+)?(?:{_THING}\s*#?\s*(1|2|a|b|one|two)\b|(first|second)\b(?:\s+(?:{_THING}|one)\b)?)"
_SIDES = {"1": 1.0, "a": 1.0, "one": 1.0, "first": 1.0, "2": 0.0, "b": 0.0, "two": 0.0, "second": 0.0}
_BETTER = (
    r"\s+(?:(?:is|looks)\s+(?:(?:the|a|bit|clearly|slightly|much|far|overall|marginally)\s+)*"
    r"(?:better|best|superior|preferred|preferable|winner)|wins)\b"
)
_WINS = re.compile(rf"\b{_SIDE}{_BETTER}|\bprefer\s+{_SIDE}", re.IGNORECASE)
_ALONE = re.compile(rf"(?:{_SIDE}|([12ab]))(?:{_BETTER})?", re.IGNORECASE)
_TIE_ALONE = re.compile(r"(?:(?:it is|it's|an?|the)\s+)*(?:tie|tied|draw|equal|equally good|same|neither|both)", re.I)
_TIES = re.compile(r"\ba (?:tie|draw)\b|\b(?:is|are|look) (?:equal(?:ly)?|tied)\b|\bneither (?:\w+ )?is better\b", re.I)
_DECISIVE = (
    re.compile(r"<answer>(.*?)(?:</answer>|$)", re.IGNORECASE | re.DOTALL),
    _BOXED,
    re.compile(r"\[\[([^\[\]]*)\]\]"),
)
_LABELLED = re.compile(
    rf"(?<![\w-])(?:answer|verdict|winner|choice|decision|preference|(?:preferred|better)(?: {_THING})?)"
    r"[\"'*_`\s]*(?:[:=]|\bis\b)[\"'*_`\s]*([^\",}\n]+)",
    re.IGNORECASE,
)


def preferred(answer: str) -> float | None:
    """1 if the answer prefers image 1, 0 for image 2, 1/2 for a tie; None if it names no winner.

    The last <answer>, \\boxed{} or [[ ]] counts; without one, the last "Answer: ..." or '"winner": "..."' that names a
    side; without that, the whole answer, which must name exactly one side: "Image 1 is better", "the second image",
    "A", "a tie". [[C]] is MT-Bench's tie.
    """
    text = unicodedata.normalize("NFKC", answer).replace("\u2019", "'").replace("[[C]]", "[[tie]]").strip()
    for pattern in _DECISIVE:
        said = pattern.findall(text)
        if said:
            return _side(said[-1])
    labelled = [side for side in map(_side, _LABELLED.findall(text)) if side is not None]
    return labelled[-1] if labelled else _side(text)


def _side(text: str) -> float | None:
    short = text.strip(" \t\n*_`\"'.!(){}<>[]")
    alone = _ALONE.fullmatch(short)
    named = [word for match in [*filter(None, [alone]), *_WINS.finditer(text)] for word in match.groups() if word]
    winners = {_SIDES[word.lower()] for word in named}
    if winners:
        return winners.pop() if len(winners) == 1 else None
    return 0.5 if _TIE_ALONE.fullmatch(short) or _TIES.search(text) else None
