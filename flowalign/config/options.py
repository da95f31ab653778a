"""The one dialect of every --option: [NAME.]KEY=VALUE, with VALUE in YAML, of which JSON is a part."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from flowalign.config.base import UserError
from flowalign.config.mistakes import nearest
from flowalign.config.paths import expanded

_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")  # such as 1e-3, a text for YAML 1.1


def parse_options(names: Sequence[str], texts: Sequence[str], flag: str = "--option") -> dict[str, dict[str, Any]]:
    """The options of each of the things named, from texts [NAME.]KEY=VALUE; the name may be left out for a single one.

    A name is as given, such as "judge.py:Sharp" or "http://host/ocr", or its last part. Raises UserError for a text of
    another form, a name that is none of these, and a value that is not YAML.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    known = {re.split(r"[:/]", name)[-1]: name for name in reversed(names)} | {name: name for name in names}
    form = "KEY=VALUE" if len(names) == 1 else f"NAME.KEY=VALUE, with a name of {', '.join(names)}"
    for text in texts:
        left, equals, value = text.partition("=")
        owner, dot, key = left.rpartition(".")
        if not equals or not key.isidentifier() or (not dot and len(names) != 1):
            raise UserError(f"{flag} {text!r} must be written {form}, such as mode=lines")
        if dot and owner not in known:
            raise UserError(f"{flag} {text!r}: {owner!r} is no name given{nearest(owner, list(known))}")
        try:
            parsed = float(value) if _NUMBER.fullmatch(value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{flag} {text!r}: the value {value!r} is not YAML; put it in quotes") from error
        found[known[owner] if dot else names[0]][key] = expanded(parsed) if isinstance(parsed, str) else parsed
    return found
