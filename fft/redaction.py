"""What nobody is to read in a log, a manifest or a page: passwords in URLs, signatures, secrets of the environment; and
what no terminal is to obey.

Depends on nothing but the standard library.
"""

import os
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")

#: What stands for a secret.
HIDDEN = "***"

#: Escapes that are ours: green, pale, and their end.
_OWN_COLOUR = re.compile(r"(\x1b\[(?:32|2|0)m)")

#: How names of variables begin that say who asks a store, and which.
OF_STORES = ("AWS_", "AZURE_", "GOOGLE_", "HADOOP_")

#: Names of secrets, of variables and of parameters of URLs: by their words, so that neither ``TOKENIZERS_PARALLELISM``
#: nor ``monkey`` is one.
_NAMED = re.compile(
    r"(?:^|[^a-z])(?:secrets?|tokens?|pass|passwd|password|passphrase|pwd|(?:api|access|secret|private|account|master|"
    r"signing|encryption)[^a-z]?key|keys?|credentials?|signatures?|sig|sas|auth|authorization|dsn|connection[^a-z]?string)(?:"
    r"[^a-z]|$)|"
    r"password|secretkey|accesskey|accountkey|apikey",
    re.IGNORECASE,
)
#: What variables say of a secret without telling it: where it is, how many there are.
_ABOUT = re.compile(
    r"(?:^MAX_|_(?:FILE|PATH|DIR|SOCK|URI|URL|HOST|PORT|ID|NAME|TYPE|MODE|COUNT|EXPIRATION|METHOD)$)", re.IGNORECASE
)
#: Characters of the shortest value that is taken for a secret.
_SHORTEST = 8
#: Paths, numbers, and words as a person writes them: a log without them could not be read.
_PLAIN = re.compile(r"[/~.].*|[\d.,:+-]+|[a-z]{1,15}|[A-Z]{1,15}|true|false", re.DOTALL)

#: ``scheme://name:password@``: a port, which is digits up to a slash or the end, is none; buckets have no ports.
#: (All is bounded, so that no text takes long.)
_USERINFO = re.compile(
    r"(?<![A-Za-z0-9+.-])(?:(?:s3[an]?|gs|gcs):/{1,2}[^\s/@:]{0,256}|(?!(?:file|dbfs):)[A-Za-z][A-Za-z0-9+.-]{0,31}:/{1,2}"
    r"(?!/)[^\s/@:\[]{0,256}(?=:(?!\d+(?:[/\s]|$)))):(?:[^\s/]{0,1024}|[^\s@]{0,1024})@"
)
_QUERY = re.compile(r"""([?&;]([\w.%-]{1,64})=)([^&\s"'<>;]+)""")
#: Headers and settings as libraries repeat them.
_STATED = re.compile(
    r"""((?:\b(?:bearer|basic)\s{1,4})|(?:(?:secret|passw(?:or)?d|account.?key|access.?key|api.?key|"""
    r"""sharedaccesssignature|session.?token)[\w.-]{0,32}["']?(?:=|:\s?(?=["']))["']?))(?![\s"'*])([^\s,;"'&)]{4,})""",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, as ``HF_TOKEN`` and ``DB_PASSWORD`` do."""
    return _NAMED.search(name) is not None and _ABOUT.search(name) is None


def has_credentials(url: str) -> bool:
    """Whether a URL names a password, as ``s3://KEY:SECRET@bucket`` does, or a signature."""
    return _USERINFO.match(url) is not None or any(is_secret_name(name) for _, name, _ in _QUERY.findall(url))


def redact(text: str) -> str:
    """The text with ``***`` for what is secret in it.

    That is the name and password in a URL, values of parameters of URLs and of settings that are called like secrets,
    and, wherever they stand, the values of variables of the environment that are called so.

    >>> redact("cannot read s3://AKIA:wJal/rXUt@bucket/a?X-Amz-Signature=0f1e&part=2")
    'cannot read s3://***@bucket/a?X-Amz-Signature=***&part=2'
    """
    secrets = _secrets_of(frozenset((name, value) for name, value in os.environ.items() if is_secret_name(name)))
    if secrets is not None:
        text = secrets.sub(HIDDEN, text)
    if "://" in text or ":/" in text:
        text = _USERINFO.sub(lambda found: re.sub(r"(:/{1,2}).*", rf"\1{HIDDEN}@", found[0]), text)
    if "=" in text:
        text = _QUERY.sub(lambda found: found[1] + (HIDDEN if is_secret_name(found[2]) else found[3]), text)
    return _STATED.sub(rf"\g<1>{HIDDEN}", text)


def harmless(text: str) -> str:
    """The text with what a terminal would obey, or nobody would see, written out; lines, tabs and spaces of any script
    stay, and so do the colours of :mod:`fft.text.shown`.

    >>> harmless("rows of \x1b]0;mine\x07 chats")
    'rows of \\\\x1b]0;mine\\\\x07 chats'
    """
    if text.isprintable():
        return text
    return "".join(part if _OWN_COLOUR.fullmatch(part) else _spelled_out(part) for part in _OWN_COLOUR.split(text))


def _spelled_out(text: str) -> str:
    return "".join(letter if _is_seen(letter) else ascii(letter)[1:-1] for letter in text)


def _is_seen(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t" or unicodedata.category(letter) == "Zs"


def fit_to_print(text: str) -> str:
    """What a log, or a terminal, gets of a text: nothing that is secret, nothing that a terminal would obey."""
    return harmless(redact(text))


def redact_all(value: T) -> T:
    """The same of all texts in what JSON and YAML can write; keys stay."""
    if isinstance(value, str):
        return redact(value)  # pyrefly: ignore[bad-return]  # a str for a str
    if isinstance(value, Mapping):
        return {key: redact_all(one) for key, one in value.items()}  # pyrefly: ignore[bad-return]  # a dict for one
    if isinstance(value, list | tuple):
        return type(value)(redact_all(one) for one in value)
    return value


@lru_cache(maxsize=4)
def _secrets_of(named: frozenset[tuple[str, str]]) -> re.Pattern[str] | None:
    values = {value for _, value in named if len(value) >= _SHORTEST and not _PLAIN.fullmatch(value)}
    return re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None
