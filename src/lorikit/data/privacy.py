"""What should not be taught because it is someone's: keys of well-known shapes, addresses, phone and card numbers.

Shapes and check digits only, so that some are missed and a made-up number may be named. What is found is never shown whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

_SECRETS = {
    "private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "Alibaba Cloud access key": r"\bLTAI[0-9A-Za-z]{12,26}\b",
    "GitHub token": r"\bgh[pousr]_[0-9A-Za-z]{36,255}\b|\bgithub_pat_[0-9A-Za-z_]{40,255}\b",
    "GitLab token": r"\bglpat-[0-9A-Za-z_-]{20,}",
    "API key (sk-...)": r"\bsk-[0-9A-Za-z_-]{20,}",
    "Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "Slack token": r"\bxox[abeprs]-[0-9A-Za-z-]{10,}",
    "Stripe key": r"\b[rs]k_live_[0-9A-Za-z]{16,}",
    "Hugging Face token": r"\bhf_[0-9A-Za-z]{30,}",
    "npm token": r"\bnpm_[0-9A-Za-z]{36}\b",
    "PyPI token": r"\bpypi-AgE[0-9A-Za-z_-]{50,}",
    "SendGrid key": r"\bSG\.[0-9A-Za-z_-]{22}\.[0-9A-Za-z_-]{43}\b",
    "Telegram bot token": r"\b\d{8,10}:AA[0-9A-Za-z_-]{33}\b",
    "JSON web token": r"\beyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.[0-9A-Za-z_-]{10,}",
    "password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s:/@]{1,64}:[^\s:/@]{3,64}@[0-9A-Za-z]",
}
_SECRET = re.compile("|".join(f"(?P<s{number}>{shape})" for number, shape in enumerate(_SECRETS.values())))
_NAMES = list(_SECRETS)
# A text without one of these holds no secret: much quicker to look for than the shapes.
_HINT = re.compile(
    r"PRIVATE KEY|AKIA|ASIA|LTAI|gh[pousr]_|github_pat_|glpat-|\bsk-|AIza|xox[abeprs]-|k_live_|hf_|npm_|pypi-|SG\.|:AA|eyJ|://[^/\s]*@"
)
_PLACEHOLDER = re.compile(r"(?i)example|x{4}|\*{3}|your[_-]|placeholder|dummy|([^-])\1{5}")

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+", re.ASCII)
_NOBODY = re.compile(r"(?i)@(?:[\w-]+\.)*(?:example\.(?:com|org|net|edu)|[\w-]+\.(?:example|invalid|test|localhost))$")
_DIGIT = re.compile(r"\d")  # all that follow have one: most texts need no other look
_DIGITS = re.compile(r"(?<![\w.])\+?\(?\d[\d ().-]{5,24}\d(?![\w]|\.\d)", re.ASCII)
_PHONE = re.compile(
    r"\+[1-9]\d{0,2}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}"  # international
    r"|(?:1[ .-])?\(?[2-9]\d{2}\)?[ .-][2-9]\d{2}[ .-]\d{4}"  # North American
    r"|1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # Chinese, mobile
    r"|0\d{2,3}[ -]\d{7,8}"  # Chinese, fixed
)
_FICTION = re.compile(r"555[ .-]?01\d\d$")
_CARD = re.compile(r"[3-6]\d{3}(?:([ -]?)\d{4}(?:\1\d{4}){1,2}(?:\1\d{1,4})?|[ -]?\d{6}[ -]?\d{5})")
_CHINESE_ID = re.compile(r"(?<!\d)[1-8]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?\b")


def secrets(text: str) -> list[str]:
    """Keys and tokens in `text`, each as its kind and its first characters."""
    if not _HINT.search(text):
        return []
    found = [(_NAMES[int((match.lastgroup or "s0")[1:])], match[0]) for match in _SECRET.finditer(text)]
    return list(dict.fromkeys(f"{kind} {hidden(value)}" for kind, value in found if _real(kind, value)))


def personal(text: str) -> list[str]:
    """E-mail addresses, phone, card, bank account and Chinese identity numbers in `text`, each as its kind and beginning."""
    return list(dict.fromkeys(f"{kind} {hidden(value)}" for kind, value in _personal(text)))


def hidden(value: str) -> str:
    """Enough of a value to find it, too little to use it."""
    return f"{value[: min(4, len(value) // 3)]}… ({len(value)} characters)"


def _real(kind: str, value: str) -> bool:
    if kind in ("private key", "password in a URL"):
        return not _PLACEHOLDER.search(value)
    return not _PLACEHOLDER.search(value) and len(set(value)) >= 8 and any(map(str.isdecimal, value))


def _personal(text: str) -> Iterator[tuple[str, str]]:
    if "@" in text:
        yield from (("e-mail address", m[0]) for m in _EMAIL.finditer(text) if not _NOBODY.search(m[0]))
    if not _DIGIT.search(text):
        return
    for match in _CHINESE_ID.finditer(text):
        if _identity(match[0]):
            yield "Chinese identity number", match[0]
    for match in _IBAN.finditer(text):
        if _account(match[0]):
            yield "bank account", match[0]
    for match in _DIGITS.finditer(text):
        run = match[0]
        if _CARD.fullmatch(run) and luhn(run):
            yield "card number", run
        elif _PHONE.fullmatch(run) and 8 <= sum(map(str.isdecimal, run)) <= 15 and not _FICTION.search(run):
            yield "phone number", run


def luhn(number: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812); whatever is no digit is passed over."""
    digits = [int(char) for char in reversed(number) if char.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) if place % 2 else digit for place, digit in enumerate(digits)]
    return sum(doubled) % 10 == 0 and any(a != b for a, b in pairwise(digits))


def _identity(number: str) -> bool:
    """GB 11643: the last sign checks the others."""
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def _account(number: str) -> bool:
    """ISO 13616: the number, its country moved to the end, is 1 modulo 97."""
    plain = number.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1
