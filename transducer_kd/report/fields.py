"""Checks what a JSON file holds against the fields that it should have; an error names file and field."""

import math
from typing import Any, NamedTuple

from transducer_kd.log import UserError


class Maybe(NamedTuple):
    """What may be missing, or null."""

    wanted: Any


def check(value: Any, wanted: Any, where: str, mend: str, field: str = "") -> None:
    """UserError that names `where` (the file), the field and what to do (`mend`) unless `value` is as wanted.

    wanted: a type (float also takes ints, and nothing that is not finite), {name: wanted} for an object that
    has these fields and perhaps more, {str: wanted} for one whose fields have any name, [wanted] for a list,
    or Maybe(wanted). field: where in the file `value` is, `words[3].wer`; empty for all of it.
    """
    if isinstance(wanted, Maybe):
        if value is None:
            return
        wanted = wanted.wanted
    if isinstance(wanted, list):
        _must(isinstance(value, list), value, "a list", where, mend, field)
        for number, item in enumerate(value):
            check(item, wanted[0], where, mend, f"{field}[{number}]")
    elif isinstance(wanted, dict):
        _must(isinstance(value, dict), value, "an object", where, mend, field)
        for name, kind in wanted.items():
            for key in value if name is str else [name]:
                check(value.get(key), kind, where, mend, f"{field}.{key}".lstrip("."))
    else:
        accepted = (int, float) if wanted is float else wanted
        # True is an int to Python, not to a reader of the file.
        is_right = isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool))
        _must(is_right, value, f"of type {wanted.__name__}", where, mend, field)
        is_finite = not isinstance(value, float) or math.isfinite(value)
        _must(is_finite, value, "a finite number", where, mend, field)


def _must(is_right: bool, value: Any, what: str, where: str, mend: str, field: str) -> None:
    if is_right:
        return
    shown = repr(value)
    told = f": {field} is {shown if len(shown) < 80 else shown[:80] + '...'}, not" if field else " is not"
    raise UserError(f"{where}{told} {what}; {mend}")
