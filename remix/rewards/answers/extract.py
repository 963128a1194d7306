"""From a whole response to the text of its answer. Linear in the length of the response.

In this order: what follows </think>; the last complete \\boxed{} or <answer>, whichever comes later; what "the answer
is" or "####" introduces; the last formula or number of the last line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TAIL_LIMIT = 2_000
"""Characters at the end of a response in which an answer without a box is looked for."""

_THINK = re.compile(r"<(/?)\s*(?:think|thinking|thought|reasoning)\s*>", re.IGNORECASE)
_END = re.compile(r"<\|(?:im_end|endoftext|eot_id|end)\|>|<\|im_start\|>\s*(?:user|system)")
_ANSWER_TAG = re.compile(r"<(/?)\s*answer\s*>", re.IGNORECASE)
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)\s?\{|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s?\{")
_BARE_BOX = re.compile(r"\\boxed\s+([\w.+\-/,%]{1,200})")
_SPACE = r"(?:[\s$]|\\[()\[\],;:! ]|\\q?quad(?![a-z]))*"
_NEXT_BOX = re.compile(
    rf"{_SPACE}(?:(?:,|;|\\text\{{\s*(?:and|or),?\s*\}}|\b(?:and|or)\b){_SPACE})+(?:[a-zA-Z](?:_\{{?\w\}}?)?\s?={_SPACE})?"
)
_STATED = re.compile(
    r"(?:\b(?:final\s)?answers?\b[\s*_]{0,4}(?:(?:to|for|of)\b[^.\n:=]{0,80}?)?"
    r"(?:[\s*_]{0,4}(?::|=|\b(?:is|are|was|equals|would be|should be|must be|will be)\b)[\s*_:]{0,8}"
    r"|(?=\s{0,4}(?:\$|\\[(\[])))"
    r"|\bfinal answer\b[ \t*_#]{0,8}(?::|\n)[\s*_:#]{0,12})",
    re.IGNORECASE,
)
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*", re.MULTILINE)
_DENIAL = re.compile(
    r"(?:definitely |certainly |clearly |probably |surely )?"
    r"(?:not\b|n't\b|never\b|neither\b|no longer\b|nothing\b|unknown\b|unclear\b|other than\b|different from\b"
    r"|anything but\b|\\(?:neq?|not)\b)",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\bnot(?: be| equal(?: to)?)?|n't(?: be| equal(?: to)?)?|\bnever|\bneither|\bnor|\bother than|\bcannot be"
    r"|\binstead of|\brather than|≠|\\neq?|!=)\s*(?:the |a )?[$\\(\s]*$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"\n|[.;!?](?=\s|$|\*)|\s(?=(?:because|since|which|where|when|as|so|hence|therefore|but|not|if|instead|after|by"
    r"|using|from|rather|I)\b)|,\s*(?=(?:because|since|which|where|when|as|so|but|not|if|hence|with|given|rather)\b)"
)
_FORMULA_ENDS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_NUMBER = re.compile(
    r"(?<![\w.\\^{])(?:[-+−]\s?)?\\?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.?|\.(?=\d))\d*"
    r"(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?(?:\s?\\?%|\s(?:percent|pct)\b)?(?![A-Za-z_]{2}|[A-Za-z_]\d)"
)
_MATHEMATICS = re.compile(r"[\d\\=<>]|^[A-Za-z]$")
_EMPTY_BOX = re.compile(r"\\boxed\s?\{\s?\}")
_SENTENCE = re.compile(r"(?!\\)[A-Za-z]+(?:[^A-Za-z]+[A-Za-z]+){2}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


def extract(response: str) -> str | None:
    """The text of the answer, boxes in a row joined by commas; None where there is no answer."""
    text = _final_part(response)
    if not text.strip():
        return None
    tag = _tagged(text)
    boxed = _boxed(text)
    if tag is not None and (boxed is None or boxed[0] <= tag[0]):
        inner = _boxed(tag[1])
        if inner is not None:
            return inner[1]
        stated = _stated(tag[1][-TAIL_LIMIT:])
        return (tag[1] if stated is None else stated).strip() or None
    if boxed is not None:
        return boxed[1]
    tail = text[-TAIL_LIMIT:]
    stated = _stated(tail)
    if stated is not None:
        return stated or None
    return _bare_box(tail) or _last_line(tail)


def _final_part(response: str) -> str:
    """What the reader is told: after the last </think>, before an unfinished <think>, before the model's next turn."""
    start, end = 0, len(response)
    for tag in _THINK.finditer(response):
        if tag.group(1):
            start, end = tag.end(), len(response)
        elif end == len(response):
            end = tag.start()
    # A thought that never ends leaves nothing: what stood before it was no conclusion.
    if end < len(response):
        return ""
    text = response[start:]
    for stop in _END.finditer(text):
        if text[: stop.start()].strip():
            return text[: stop.start()]
    return text


def _tagged(text: str) -> tuple[int, str] | None:
    """Where the last <answer> closes, and what it holds. An unclosed last one holds the rest."""
    tags = list(_ANSWER_TAG.finditer(text))
    for position in range(len(tags) - 1, -1, -1):
        if tags[position].group(1):
            continue
        end = tags[position + 1].start() if position + 1 < len(tags) else len(text)
        content = text[tags[position].end() : end]
        if content.strip():
            return end, content
    return None


def _boxed(text: str) -> tuple[int, str] | None:
    """Where the last box closes, and what it and those in a row with it hold. Empty boxes do not count."""
    if _BOX.search(text) is None:
        return None
    open_braces: list[re.Match[str]] = []
    boxes: list[tuple[int, int, str]] = []  # start, end and content of those closed so far, the outermost only
    for token in _BOX_OR_BRACE.finditer(text):
        mark = token.group()
        if mark.endswith("{") and mark != r"\{":
            open_braces.append(token)
        elif mark == "}" and open_braces:
            opening = open_braces.pop()
            if opening.group() != "{":
                while boxes and boxes[-1][0] > opening.start():
                    boxes.pop()
                boxes.append((opening.start(), token.end(), text[opening.end() : token.start()].strip()))
    boxes = [box for box in boxes if box[2]]
    if not boxes:
        return None
    row: list[str] = []
    for position in range(len(boxes) - 1, -1, -1):
        if row and not _NEXT_BOX.fullmatch(text, boxes[position][1], boxes[position + 1][0]):
            break
        row.append(boxes[position][2])
    return boxes[-1][1], ", ".join(dict.fromkeys(reversed(row)))


def _bare_box(tail: str) -> str | None:
    """\\boxed 5, without braces."""
    found = [match.group(1) for match in _BARE_BOX.finditer(tail)]
    return found[-1].rstrip(".,") if found else None


def _stated(tail: str) -> str | None:
    """What the last "answer is" or "####" introduces, unless it is denied there or later; "" where all is denied."""
    starts = [(match.end(), False) for match in _STATED.finditer(tail)]
    starts += [(match.end(), True) for match in _HASHES.finditer(tail)]
    denied: set[str] = set()
    for start, hashes in sorted(starts, reverse=True):
        rest = tail[start:].lstrip(" \t\r\n*_#:")
        if hashes and not re.match(r"[ \t*]*\S*\d", tail[start:]):
            continue  # a heading
        denial = _DENIAL.match(rest)
        if denial is not None:
            denied.add(_expression(rest[denial.end() :].lstrip(" :")))
            correction = re.match(r"[^.\n]{0,80}?\b(?:but|it is|it's|rather|instead)\s+", rest[denial.end() :])
            if correction is None:
                continue
            rest = rest[denial.end() + correction.end() :]
        answer = _expression(rest)
        if _SENTENCE.match(answer) and re.search(r"\d", answer):
            answer = _last_line(answer) or answer
        if answer and answer not in denied:
            return answer
    return "" if any(re.search(r"\d|\\", text) for text in denied) else None


def _expression(rest: str) -> str:
    """The formula, or else the words, that a text begins with."""
    found = ""
    while True:  # formulas joined by commas or words, as in "$1$ and $2$"
        formula = _formula_at(rest)
        if formula is None:
            break
        found += formula[0]
        rest = formula[1]
        join = re.match(r"\s*(?:,?\s*(?:and|or)\b|,)\s*(?=\$|\\[(\[])", rest)
        if join is None:
            unit = re.match(r"\s*(?:\\?%|percent\b|°|degrees?\b|\^?\\circ)", rest)
            return (found + (unit.group() if unit else "")).strip()
        found += "," + (" or " if "or" in join.group() else " ")
        rest = rest[join.end() :]
    line = _SENTENCE_END.split(found + rest, maxsplit=1)[0]
    return line.strip(" \t*_:").rstrip(".,;")


def _formula_at(text: str) -> tuple[str, str] | None:
    """The content of the formula that a text begins with, and what follows it."""
    for opening, closing in _FORMULA_ENDS:
        if text.startswith(opening):
            end = text.find(closing, len(opening))
            if end > 0 and text[len(opening) : end].strip():
                return text[len(opening) : end].strip(), text[end + len(closing) :]
    return None


def _formulas(text: str) -> Iterator[tuple[int, int, str]]:
    position = 0
    while True:
        starts = [text.find(opening, position) for opening, _ in _FORMULA_ENDS]
        known = [start for start in starts if start >= 0]
        if not known:
            return
        position = min(known)
        if position and text[position - 1] == "\\" and text[position] == "$":  # \$ is money
            position += 1
            continue
        formula = _formula_at(text[position:])
        if formula is None:
            position += 1
            continue
        end = len(text) - len(formula[1])
        yield position, end, formula[0]
        position = end


def _last_line(tail: str) -> str | None:
    """The last formula or number of the last line, whichever comes later; a line that is one expression, as it is."""
    tail = _EMPTY_BOX.sub("", tail).rstrip()
    begin = tail.rfind("\n") + 1
    formulas = [formula for formula in _formulas(tail) if formula[1] > begin]
    line = tail[begin:].strip()
    if r"\boxed" in line:  # one that was cut off
        return None
    if not formulas and not _WORD.search(line) and len(line) <= 200 and _MATHEMATICS.search(line):
        return line.strip("*_ ").rstrip(".") or None
    last = formulas[-1] if formulas else None
    begin = max(begin, last[1]) if last else begin
    for number in reversed(list(_NUMBER.finditer(tail, begin))):
        if number.group().strip() and not _DENIED_BEFORE.search(tail, max(0, number.start() - 40), number.start()):
            return number.group().strip()
    if last is not None and not _DENIED_BEFORE.search(tail, max(0, last[0] - 40), last[0]):
        return last[2]
    if not formulas and len(line) <= 200 and "\\" in line and _WORD.sub("", line) != "":
        return line
    return None
