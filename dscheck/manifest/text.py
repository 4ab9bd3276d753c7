"""JSON text that carries the SHA-256 of itself, so that a damaged object is never mistaken for another one (C15)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, NoReturn

from dscheck.errors import CorruptCheckpointError
from dscheck.manifest.later import make_now

LIMIT_BYTES = 64 * 1024
"""The largest record, tombstone or term: read by every rank, so it must stay one small read."""

_SEAL = ',"sha256":'
_TAIL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n', re.ASCII)
_TAIL_BYTES = len(_SEAL) + 64 + 4
# Longer ones do not fit an int64; refusing them by length keeps int() from quadratic work.
_LONGEST_INT = 20


def seal(body: dict[str, Any]) -> bytes:
    """`body` as one line of ASCII JSON whose last member is "sha256", the digest of every byte before `,"sha256":`.

    The body's members are sorted; nested ones keep their order, which for a Python dict carries meaning.
    Raises ValueError for a body that is empty, holds "sha256" itself, or holds NaN or an infinity.
    """
    if not body or "sha256" in body:
        raise ValueError("a sealed body has members, and none of them is called 'sha256'")
    members = {name: body[name] for name in sorted(body)}
    body_text = json.dumps(members, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=make_now)
    text = body_text[:-1].encode("ascii")
    return text + f'{_SEAL}"{hashlib.sha256(text).hexdigest()}"}}\n'.encode("ascii")


def unseal(data: bytes, key: str, limit_bytes: int | None = LIMIT_BYTES) -> dict[str, Any]:
    """The body that `seal` was given. `key` names the object in errors; `limit_bytes` None trusts the caller's size.

    Raises CorruptCheckpointError when the text is too long, is not sealed, does not match its digest, or is not
    the plain JSON that `seal` writes: duplicate members, NaN, integers over 64 bits, floats that overflow.
    """
    if limit_bytes is not None and len(data) > limit_bytes:
        raise _corrupt(key, f"has {len(data)} bytes, at most {limit_bytes} expected")
    seal_match = _TAIL.fullmatch(data, max(0, len(data) - _TAIL_BYTES))
    if seal_match is None:
        raise _corrupt(key, "does not end with the SHA-256 of its text: it is cut short, or was not written by dscheck")
    text = data[:-_TAIL_BYTES]
    stored, found = seal_match.group(1).decode("ascii"), hashlib.sha256(text).hexdigest()
    if stored != found:
        raise _corrupt(key, f"SHA-256 {stored} stored, {found} computed")
    return _parse(text, key)


def _parse(text: bytes, key: str) -> dict[str, Any]:
    try:
        # What ends with a brace can only be an object.
        body: dict[str, Any] = json.loads(
            text.decode("ascii") + "}",
            object_pairs_hook=_members,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_constant,
        )
    # RecursionError: nesting beyond what any object of ours has.
    except (ValueError, RecursionError) as error:
        raise _corrupt(key, f"is no JSON of ours ({error})") from error
    return body


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return members


def _int(digits: str) -> int:
    if len(digits) > _LONGEST_INT or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError("an integer exceeds 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number overflows")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _corrupt(key: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"'{key}' {what}; the object is damaged: load an earlier step, or run `dscheck verify`", key=key
    )
