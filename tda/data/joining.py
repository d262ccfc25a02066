"""Joins a prompt and its target, with a space between them or not."""

import unicodedata

# Closing marks: they take a space after them, and none before.
_CLOSING = frozenset(".,;:!?…%)]}’”»")
_OPENING = frozenset("([{‘“«¿¡$€£#@")
_QUOTES = frozenset("\"'`")
# Scripts that are written without spaces between words, as ranges of code points: Thai and Lao,
# Tibetan, Myanmar, Khmer, CJK with kana and full-width forms, and the ideographs beyond 16 bits.
# Hangul is not among them: Korean has spaces.
_UNSPACED = (
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0xA4CF),
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFFEF),
    (0x20000, 0x3FFFF),
)


def choose_joiner(prompt: str, target: str) -> str:
    """Returns a space if one belongs between prompt and target, else nothing.

    A space belongs after a word, or a mark that ends a phrase (`.,;:!?…%)]}` or a closing quote),
    and before a word (`Paris`, `.5`, `-3`, `.ae`), an opening bracket or a quote. No space is put

    - if there is white space at the border already, or either is empty;
    - if the prompt ends in an opening bracket or quote, or in another symbol (`=`, `/`, `_`, `-`),
      unless white space comes before that symbol (`2 + 2 =`);
    - if the prompt ends in `":`, as a key of JSON does;
    - if the target begins with a closing mark or another symbol;
    - if either border is Chinese, Japanese, Thai, Lao, Tibetan, Khmer or Myanmar.
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    if is_unspaced(prompt[-1]) or is_unspaced(target[0]):
        return ""
    return " " if _takes_space_after(prompt) and _takes_space_before(target) else ""


def join(prompt: str, target: str, joiner: str | None = None) -> str:
    """Returns the text of a query; if `joiner` is None, `choose_joiner` chooses it."""
    return prompt + (choose_joiner(prompt, target) if joiner is None else joiner) + target


def _takes_space_after(prompt: str) -> bool:
    last, before = prompt[-1], prompt[-2:-1]
    if is_word(last):
        return True
    if last == ":" and before in _QUOTES:
        return False
    if last in _CLOSING:
        return True
    if last in _QUOTES:
        # A quote closes behind a word or a mark, and opens elsewhere.
        return bool(before) and (is_word(before) or before in _CLOSING - {":"})
    # A symbol with white space before it gets white space after it too.
    return last not in _OPENING and before.isspace()


def _takes_space_before(target: str) -> bool:
    first = target[0]
    # `.ae`, `.5` and `-3` are words; `-` and `+` before a letter are symbols of code.
    starts_word = (first in "-+" and target[1:2].isdigit()) or (
        first == "." and target[1:2].isalnum()
    )
    return is_word(first) or first in _OPENING or first in _QUOTES or starts_word


def is_word(character: str) -> bool:
    """Returns whether a character is part of a word."""
    # Marks are parts of words: vowel signs and accents that follow their letter.
    return character.isalnum() or unicodedata.category(character).startswith("M")


def is_unspaced(character: str) -> bool:
    """Returns whether a character's script has no spaces between words."""
    return any(low <= ord(character) <= high for low, high in _UNSPACED)
