"""Damages objects again and again in a process of its own, so that a crash or a huge allocation is seen.

`python -m tests.manifest.attack SEED KIND=COUNT ...` prints how many damaged objects of each kind were refused and how
many were read as other valid ones. Address space is limited to what is in use after the first decodes plus SPARE_BYTES.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from dscheck.errors import CorruptCheckpointError
from dscheck.manifest.arrow import decode_files, encode_files
from dscheck.manifest.objects import decode_object, decode_objects, encode_objects
from dscheck.manifest.record import decode_record, decode_term
from tests.manifest.stored import BATCH, HEAD, decoded_batch, decoded_head
from tests.manifest.test_arrow import file_rows
from tests.manifest.test_objects import EXAMPLES
from tests.manifest.test_plan import PLAN
from tests.manifest.test_record import RECORD, TERM, TOMBSTONE

SPARE_BYTES = 256 << 20
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    63,
    64,
    255,
    2**15,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32,
    2**34,
    2**40,
    2**62,
    2**63 - 1,
    -(2**63),
)


def read_objects(data: bytes) -> bytes:
    objects, options = decode_objects(data, "k")
    for value in (*objects.values(), *(o for named in options.values() for o in named.values())):
        decode_object(value)
    return encode_objects(objects, options)


def text_of_objects() -> bytes:
    tagged = {name: tagged for name, (_, tagged) in EXAMPLES.items()}
    return encode_objects(tagged, {"o": {"a": {"lr": 0.1}, "b": {"lr": 0.1}}})


SAID = repr(decoded_head(HEAD))
KINDS: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "head": (HEAD, lambda data: HEAD if repr(decoded_head(data)) == SAID else b""),
    "batch": (BATCH, lambda data: BATCH if decoded_batch(data) == PLAN.fragments else b""),
    "files": (encode_files(file_rows()), lambda data: encode_files(decode_files(data, "k"))),
    "record": (RECORD.encode(), lambda data: decode_record(data, "records/300-2.json").encode()),
    "tombstone": (TOMBSTONE.encode(), lambda data: decode_record(data, "records/300-2.json").encode()),
    "term": (TERM.encode(), lambda data: decode_term(data, "terms/2.json").encode()),
    "objects": (text_of_objects(), read_objects),
}
SEALED = KINDS.keys() - {"head", "batch", "files"}
TAIL_BYTES = 78


def damage(data: bytearray, rng: random.Random) -> None:
    """One change of the bytes, of a kind that disks, bugs and attackers make."""
    at = rng.randrange(len(data))
    how = rng.randrange(6)
    if how < 2:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 2:
        code = rng.choice("iqH")
        number = rng.choice(NUMBERS) & (1 << 8 * struct.calcsize(code)) - 1
        size = struct.calcsize(code)
        data[at // size * size : at // size * size + size] = number.to_bytes(size, "little")
    elif how == 3:
        del data[at : at + rng.choice((1, 4, 8, len(data)))]
    elif how == 4:
        data[at:at] = data[rng.randrange(len(data)) :][: rng.choice((1, 8, 64))]
    else:
        other = rng.randrange(len(data))
        data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]


def damage_text(data: bytearray, rng: random.Random) -> None:
    """One change that leaves more of the JSON whole: a value becomes another."""
    places = [i for i, byte in enumerate(data) if byte in b":[,"]
    if not places or rng.randrange(2):
        damage(data, rng)
        return
    at = rng.choice(places) + 1
    end = at
    while end < len(data) and data[end] not in b",]}":
        end += 1
    values = (b"null", b"true", b"-1", b"1e999", b"NaN", b'"$"', b"[]", b"{}", b'{"$":"int","v":"0x1"}', b"[" * 99_999)
    data[at:end] = rng.choice((*values, str(rng.choice(NUMBERS)).encode()))


def attack(kind: str, count: int, rng: random.Random) -> dict[str, float]:
    whole, decode = KINDS[kind]
    found = {"refused": 0, "equal": 0, "other": 0, "slowest_s": 0.0}
    for _ in range(count):
        data = bytearray(whole[:-TAIL_BYTES] if kind in SEALED else whole)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            if data:
                (damage_text if kind in SEALED else damage)(data, rng)
        if kind in SEALED:
            data += b',"sha256":"' + hashlib.sha256(data).hexdigest().encode() + b'"}\n'
        begun = time.process_time()
        try:
            found["equal" if decode(bytes(data)) == whole else "other"] += 1
        except CorruptCheckpointError:
            found["refused"] += 1
        found["slowest_s"] = max(found["slowest_s"], time.process_time() - begun)
    return found


def main(seed: str, *wanted: str) -> None:
    for whole, decode in KINDS.values():
        assert decode(whole) == whole
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SPARE_BYTES, in_use + SPARE_BYTES))
    rng = random.Random(int(seed))
    for kind, _, count in (argument.partition("=") for argument in wanted):
        print(json.dumps({"kind": kind, "count": int(count), **attack(kind, int(count), rng)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
