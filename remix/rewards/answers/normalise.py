"""The many spellings of one thing brought to one spelling. Every pass is one linear sweep over a short text."""

from __future__ import annotations

import re

from remix.rewards.answers.numerals import spell_out

_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10"}
_CHARACTERS = str.maketrans(
    {symbol: r"\frac{%s}{%s}" % tuple(value.split("/")) for symbol, value in _VULGAR.items()}  # noqa: UP031
    | dict.fromkeys("−–—‐‑﹣－", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u200a\u205f\u3000", r"\,")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f", "")
    | dict.fromkeys("×✕✖", r"\times ")
    | dict.fromkeys("·⋅∙•∗", r"\cdot ")
    | dict.fromkeys("÷∕⁄／", "/")
    | dict.fromkeys("′’‘`´", "'")
    | dict.fromkeys("〈⟨", r"\langle ")
    | dict.fromkeys("〉⟩", r"\rangle ")
    | {"√": r"\sqrt ", "∛": r"\sqrt[3]", "π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ", "Ø": r"\emptyset "}
    | {
        "≤": r"\le ",
        "⩽": r"\le ",
        "≥": r"\ge ",
        "⩾": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∓": r"\mp ",
    }
    | {"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "∧": r"\land ", "∨": r"\lor ", "∣": "|"}
    | {"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∠": r"\angle ", "ℏ": r"\hbar "}
    | {
        "ℝ": r"\mathbb{R}",
        "ℤ": r"\mathbb{Z}",
        "ℕ": r"\mathbb{N}",
        "…": r"\ldots ",
        "⋯": r"\ldots ",
        "°": r"^\circ ",
        "º": r"^\circ ",
    }
    | {
        "α": r"\alpha ",
        "β": r"\beta ",
        "γ": r"\gamma ",
        "δ": r"\delta ",
        "ε": r"\epsilon ",
        "θ": r"\theta ",
        "λ": r"\lambda ",
    }
    | {
        "μ": r"\mu ",
        "ρ": r"\rho ",
        "σ": r"\sigma ",
        "τ": r"\tau ",
        "φ": r"\phi ",
        "ω": r"\omega ",
        "Δ": r"\Delta ",
        "ζ": r"\zeta ",
    }
    | {
        "（": "(",
        "）": ")",
        "，": ",",
        "、": ",",
        "：": ":",
        "；": ";",
        "％": "%",
        "＝": "=",
        "＋": "+",
        "｛": r"\{",
        "｝": r"\}",
    }
    | {
        "€": r"\text{euros}",
        "£": r"\text{pounds sterling}",
        "¥": r"\text{yen}",
        "₹": r"\text{rupees}",
        "¢": r"\text{cents}",
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")

_OTHER_DIGITS = re.compile(r"(?![0-9])\d")
"""Of other scripts, and full-width ones."""
_MARGIN = re.compile(r"\A(?:\s|\\[,;:! ])+")
_GONE = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|phantom|mathstrut|strut|hfill)"
    r"(?![A-Za-z])\.?|\\(?:label|tag)\s?\{[^{}]{0,80}\}|\\[hv]space\s?\{[^{}]{0,40}\}"
)
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_ACCENTS = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|mathit|mathcal|mathsf|mathtt|vec|overrightarrow|mathring|underline|boxed|fbox|ensuremath)"
    r"(?![A-Za-z])\s?"
)
_TEXT_COMMANDS = re.compile(
    r"\\(?:textbf|textit|textrm|textnormal|textsf|texttt|textsc|mbox|hbox|operatorname\*?|emph|mathrm|rm)(?=\s?\{)"
)
_LETTER = re.compile(r"\\text\s?\{\s?([eid])\s?\}(?=\s?(?:\^|[+\-*/)}\\,]|$))")
_DOUBLE_ESCAPED = re.compile(
    r"\\\\(?=(?:frac|dfrac|tfrac|sqrt|left|right|le|ge|leq|geq|pi|infty|cup|cap|in|text|pm|cdot|times|circ|theta|alpha"
    r"|sin|cos|tan|log|ln|mathrm|mathbb|boxed|angle|binom|overline|begin|end)(?![a-z]))"
)
_DEGREES = re.compile(
    r"\^\s?(?:\\circ(?![a-z])|\{\s?\\circ\s?\})|\\(?:degree|textdegree)(?![a-z])|\bdegs?\b|\bdegrees?\b"
)
_TEXT_DEGREES = re.compile(r"\\text\s?\{\s?degrees?\s?\}")
_PERCENT = re.compile(
    r"\\text\s?\{\s?(?:percent|percentage|pct|%|\\%)\s?\}|\\?%|\b(?:percent(?:age)?|per cent|pct)\b\.?"
)
_MODULUS = re.compile(r"\\pmod\s?(?:\{[^{}]{0,80}\}|\w{1,20})|\(\s?(?:\\bmod|\\mod|\\text\{mod\}|mod)\b[^()]{0,80}\)")
_CLOCK = re.compile(r"\b(\d{1,2}):00\s?(?=(?:\\text\s?\{\s?)?[ap]\.?m\b)", re.IGNORECASE)
_NOON = re.compile(r"\b([ap])\.m\b\.?", re.IGNORECASE)
_TEX_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\s?\\!)\s?(?=\d{3}(?!\d))")
_SPACED_THOUSANDS = re.compile(r"(?<![\w.\\{,])\d{1,3}(?:(?:\\,| )\d{3})+(?![\w{])")
_COMMA_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\d,]|\.\d*,)")
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad|~|\s+")
_TEN = re.compile(r"(?<=[\d.])\s?[xX]\s?10\s?(?=\^)")
_MARKDOWN = re.compile(r"\*\*(?=[^*\d]|$)|(?<![\w)}])\*\*")
_POWER = re.compile(r"(?<=[\w)}\]])\*\*(?=[\w({.\-]|\\[A-Za-z{])")
_LEADING_WORDS = re.compile(
    r"(?:\\text\s?\{)?\s?(?:so |thus |therefore |hence )?"
    r"(?:(?:the |our |my )?(?:final )?(?:answer|value|result|solution)s?"
    r"(?: is| are|:|=)(?: equal to| approximately)?"
    r"|approximately|approx\.?|about|exactly|roughly|equals)\s?:?\s?(?:\})?"
    r"(?=[\s\d$\\\-(\[.])",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """One spelling of an answer, still as text; commas that may separate thousands are left as they are."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉ₙ]+", lambda run: "_{" + run.group().translate(_SUBSCRIPTS) + "}", text)
    text = _OTHER_DIGITS.sub(lambda digit: str(int(digit.group())), text.translate(_CHARACTERS))
    text = _MARGIN.sub("", text)
    if r"\begin" not in text and "&" not in text:
        text = _DOUBLE_ESCAPED.sub(r"\\", text)
    text = _TEX_THOUSANDS.sub("", text)
    text = re.sub(r"\\!\s?", "", text)
    text = re.sub(r"\\\$|\bUSD\b|\bUS\$", r"\\text{dollars}", text)
    text = re.sub(r"\$|(?<!\\)\\[()\[\]]", " ", text)
    text = _GONE.sub("", text)
    text = _OVER.sub(r"\\frac{\1}{\2}", text)
    text = _ACCENTS.sub("", text)
    text = _TEXT_COMMANDS.sub(r"\\text", text)
    text = _LETTER.sub(r"\1", text)
    text = _SPACED_THOUSANDS.sub(lambda run: re.sub(r"\D", "", run.group()), text)
    text = _POWER.sub("^", text)
    text = _MARKDOWN.sub("", text)
    text = _NOON.sub(r"\1m", _CLOCK.sub(r"\1 ", text))
    text = _TEXT_DEGREES.sub(r"\\degree ", text)
    text = _DEGREES.sub(r" \\degree ", text)
    text = _PERCENT.sub(r" \\% ", text)
    text = _MODULUS.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _TEN.sub(r"\\times 10", text)
    text = re.sub(r"\b(?:np|math|numpy|sympy)\.(?=[a-z])", "", text)
    text = _LEADING_WORDS.sub("", text.strip(), count=1) if _LEADING_WORDS.match(text.strip()) else text
    text = text.strip().rstrip(",;:").strip()
    text = text[:-1].strip() if text.endswith(".") and not text.endswith("..") else text
    return spell_out(text)


def moduli(text: str) -> str:
    """The moduli that `clean` drops: 3 (mod 7) answers what 3 does, but not what 3 (mod 8) does."""
    return " ".join(re.sub(r"\\text|\\?[pb]?mod|\W", "", found) for found in _MODULUS.findall(text))


def without_thousands(text: str) -> str:
    """Commas between groups of three digits taken for thousands separators."""
    return _COMMA_THOUSANDS.sub(lambda run: run.group().replace(",", ""), text)


def plain(text: str) -> str:
    """For comparing as text: no needless spaces, no dollar signs around it, no full stop after it."""
    return without_spaces(re.sub(r"\\[,;: ]", " ", text.replace("\\!", ""))).strip("$").removesuffix(".")


def without_spaces(text: str) -> str:
    """Spaces stay between letters and digits, where they part words, and after commas, where they part items."""
    return re.sub(r"\s+(?![^\W_])|(?<![^\W_])(?<!,)\s+", "", text.strip())


def words(text: str) -> str:
    """For comparing as words: letters and digits in lower case, without the commands and articles around them."""
    text = re.sub(r"\\[A-Za-z]+|\\.", " ", text)
    found = re.findall(r"[^\W_]+", text.lower())
    while found and found[0] in ("the", "a", "an") and len(found) > 1:
        found.pop(0)
    return " ".join(found)
