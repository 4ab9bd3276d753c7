"""A checkpoint reader in plain Python, written from docs/format.md and docs/commit.md alone: no dscheck, no torch.
`read(root)` verifies every byte of the newest step and returns all of it. Slow, and short enough to be read whole."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import zstandard

SIZES = {
    1: "bool int8 uint8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2",
    2: "int16 uint16 float16 bfloat16",
    4: "int32 uint32 float32 complex32",
    8: "int64 uint64 float64 complex64",
    16: "complex128",
}
ITEMSIZE = {name: size for size, names in SIZES.items() for name in names.split()}
PARTS = ("checksums", "ours", "mine")
COLUMNS = {
    "tensors": "name:str dtype:str shape:*i64 aliases:*str",
    "fragments": "tensor:i32 start:*i64 stop:*i64 writer:i32 offset:i64 nbytes:i64 first_block:i64 holders:i32",
    "ranks": "rank:i32 host:str mesh_dims:*str mesh_coordinates:*i32 end:i64 blocks:i64",
    "holders": "ranks:*i32",
    "batches": "offset:i64 size:i64 rows:i32 first:i32 last:i32 low:*i64 high:*i64 sha256:sha",
    "files": "rank:i32 size:i64 blocks:i64" + "".join(f" {p}_offset:i64 {p}_size:i64 {p}_sha256:sha" for p in PARTS),
}
ARROW = {"i32": pa.int32(), "i64": pa.int64(), "str": pa.utf8(), "sha": pa.binary(32)}
ARROW |= {f"*{name}": pa.list_(pa.field("item", kind, nullable=False)) for name, kind in ARROW.items()}
TABLE = list(range(256))
for _ in range(8):
    TABLE = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in TABLE]


def check(holds: bool, what: object) -> None:
    if not holds:
        raise ValueError(f"damaged: {what}")


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = TABLE[(value ^ byte) & 255] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def sealed(data: bytes, *kinds: str) -> dict:
    text, digest = data[:-78], re.fullmatch(rb',"sha256":"([0-9a-f]{64})"\}\n', data[-78:])
    check(digest is not None and hashlib.sha256(text).hexdigest() == digest[1].decode(), "seal")
    body = json.loads(text.decode("ascii") + "}")
    known = [[], ["codec"]] if body["kind"] == "record" else [[]]
    check(body["version"] == 1 and body["requires"] in known and body["kind"] in kinds, "another version or kind")
    return body


def numbered(root: Path, folder: str, pattern: str, *kinds: str) -> dict[tuple[int, ...], dict]:
    """The texts of a folder whose names are numbers in the given pattern, by those numbers from the last on."""
    number, found = re.compile(pattern.replace("N", "(0|[1-9][0-9]*)"), re.ASCII), {}
    for path in (root / folder).glob("[!.]*"):
        check((match := number.fullmatch(path.name)) is not None, f"the name {path}")
        key, body = tuple(map(int, match.groups()[::-1])), sealed(path.read_bytes(), *kinds)
        found[key] = max(body, found.get(key, body), key=lambda one: one["kind"] == "deletion")
    return found


def newest(root: Path) -> dict:
    """The record of the newest step: the greatest on the ancestry of the term that counts (docs/commit.md P16, P17)."""
    records = numbered(root, "records", r"N-N(?:\.deleted)?\.json", "record", "tombstone", "deletion")
    terms = {number: term for (number,), term in numbered(root, "terms", r"N\.json", "term").items()}
    check(sorted(terms) == list(range(1, len(terms) + 1)), "a gap in the terms")
    for number, term in terms.items():
        check(term["term"] == number and (not term["parent"] or term["parent"]["term"] < number), f"term {number}")
    for key, record in records.items():
        ours = record["kind"] != "record" or record["term_id"] == terms.get(key[0], record)["id"]
        check(key == (record["term"], record["step"]) and key[0] in terms and ours, f"the term of record {key}")
    steps, live, limit = [key for key, record in records.items() if record["kind"] == "record"], [], math.inf
    parents = {n: (term["parent"]["term"], term["parent"]["step"]) for n, term in terms.items() if term["parent"]}
    at = max([n for n in terms if parents.get(n) in steps or n in dict(steps)], default=0)
    while at:
        live += [key for key in steps if key[0] == at and key[1] <= limit]
        at, limit = parents.get(at, (0, 0))[0], min(limit, parents.get(at, (0, 0))[1])
    if not live:
        raise FileNotFoundError(f"no step in {root}")
    return records[max(live)]


def tables(data: bytes, *names: str) -> tuple[list[list[SimpleNamespace]], dict[str, str]]:
    """The rows of Arrow streams back to back, and their metadata. Unsealed ones would need more checks."""
    source, found, metadata = pa.BufferReader(data), [], {}
    for name in names:
        table = pa.ipc.open_stream(source).read_all()
        table.validate(full=True)
        fields = [column.split(":") for column in COLUMNS[name].split()]
        schema = pa.schema([pa.field(column, ARROW[kind], nullable=False) for column, kind in fields])
        metadata |= {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        check(table.schema.equals(schema) and metadata["dscheck.table"] == name, f"columns of {name}")
        found.append([SimpleNamespace(**row) for row in table.to_pylist()])
    check(source.tell() == len(data), "bytes behind the last stream")
    return found, metadata


def digested(data: bytes, size: int, sha256: str) -> bytes:
    check(len(data) == size and hashlib.sha256(data).hexdigest() == sha256, f"the digest {sha256}")
    return data


def whole_plan(data: bytes, size: int, sha256: str) -> tuple[list[list[SimpleNamespace]], list[SimpleNamespace], int]:
    """Tensors, ranks and holders; all fragments; and the size of a block."""
    head, rest, fragments = digested(data[:size], size, sha256), data[size:], []
    (*rows, batches), metadata = tables(head, "tensors", "ranks", "holders", "batches")
    for b in batches:
        fragments += tables(digested(rest[b.offset :][: b.size], b.size, b.sha256.hex()), "fragments")[0][0]
    check(len(rest) == sum(b.size for b in batches), "bytes behind the last batch")
    return rows, fragments, int(metadata["dscheck.block_bytes"])


def plain(value: object) -> object:
    """A stored object as Python's. A torch tensor becomes (dtype, shape, bytes)."""
    if not isinstance(value, dict):
        return [plain(item) for item in value] if isinstance(value, list) else value
    if "$" not in value:
        return {key: plain(item) for key, item in value.items()}
    tag, v = value["$"], value.get("v")
    if tag in ("dict", "OrderedDict", "Counter", "defaultdict"):
        pairs = {plain(key): plain(item) for key, item in v}
        check(len(pairs) == len(v), "a key twice")
        if tag == "defaultdict":
            factories = {"none": None} | {t.__name__: t for t in (bool, int, float, str, list, dict, set, tuple)}
            return defaultdict(factories[value["factory"]], pairs)
        return {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}[tag](pairs)
    if tag == "array":
        data, shape = base64.b64decode(value["data"], validate=True), tuple(value["shape"])
        check(len(data) == math.prod(shape) * ITEMSIZE[value["dtype"]], "an array of another size")
        if value["lib"] == "torch":
            return value["dtype"], shape, data
        array = np.frombuffer(data, np.dtype(value["dtype"]).newbyteorder("<")).reshape(shape)
        return array if value["lib"] == "numpy" else array[()]
    if tag in ("bytes", "int", "float"):
        return {"bytes": base64.b64decode, "int": lambda text: int(text, 16), "float": float}[tag](v)
    build = {"tuple": tuple, "set": set, "frozenset": frozenset, "complex": lambda parts: complex(*parts)}
    return deque(plain(v), value["maxlen"]) if tag == "deque" else build[tag](plain(v))


def frame(data: bytes, size: int) -> bytes:
    """The content of a zstd frame."""
    head = zstandard.get_frame_parameters(data)
    check(head.content_size == size and head.window_size <= max(size, 1024) and not head.dict_id, "a zstd frame")
    raw = zstandard.ZstdDecompressor().decompress(data, size, allow_extra_data=False)
    check(len(raw) == size, "size of a zstd frame")
    return raw


def raw_block(stored: bytes, codec: int, size: int) -> bytes:
    """One block of a coded file, which has matched its checksum."""
    check(codec <= 4 and (len(stored) == size if codec == 0 else 0 < len(stored) < size), "a stored block")
    if codec < 2:
        return frame(stored, size) if codec else stored
    width = (2, 4, 8)[codec - 2]
    sizes, at, planes = np.frombuffer(stored[: 4 * width], "<u4").tolist(), 4 * width, []
    for length in sizes:
        plane, at = stored[at : at + length], at + length
        planes.append(plane if length == size // width else frame(plane, size // width))
    check(at == len(stored) and len(sizes) == width and size % width == 0, "planes")
    return np.frombuffer(b"".join(planes), np.uint8).reshape(width, -1).T.tobytes()


def raw_data(data: bytes, row: SimpleNamespace, checksums: bytes, fragments: list, block: int) -> bytes:
    """The fragments of a coded file where they would lie in a plain one."""
    columns, codecs = np.frombuffer(checksums, "<u4", 3 * row.blocks).reshape(3, -1), checksums[12 * row.blocks :]
    raw, number, free = bytearray(max(f.offset + f.nbytes for f in fragments)), 0, 0
    for fragment in fragments:
        for at in range(0, fragment.nbytes, block):
            stored, size = data[free : free + int(columns[2][number])], min(block, fragment.nbytes - at)
            check(crc32c(stored) == columns[1][number], f"stored block {number}")
            raw[fragment.offset + at : fragment.offset + at + size] = raw_block(stored, codecs[number], size)
            number, free = number + 1, free + len(stored)
    check(number == row.blocks and row.checksums_offset == -(-free // 8) * 8, "end of stored blocks")
    return bytes(raw)


def data_file(folder: Path, row: SimpleNamespace, rank: SimpleNamespace, fragments: list, block: int) -> tuple:
    """The bytes of a data file, every block of which is whole, and its two texts."""
    data = (path := folder / f"data-{row.rank}.bin").read_bytes()
    check(len(data) == row.size == row.mine_offset + row.mine_size, f"size of {path}")
    coded, end = row.blocks > 0 and row.checksums_size == 13 * row.blocks, -(-rank.end // 8) * 8
    check(row.checksums_offset <= end if coded else row.checksums_offset == end, "place of checksums")
    ends = row.checksums_offset + row.checksums_size, row.ours_offset + row.ours_size
    check((row.ours_offset, row.mine_offset) == ends, "places of parts")
    parts = {p: data[getattr(row, f"{p}_offset") :][: getattr(row, f"{p}_size")] for p in PARTS}
    for name, part in parts.items():
        check(hashlib.sha256(part).digest() == getattr(row, f"{name}_sha256"), f"{name} of {path}")
    mine = sorted((f for f in fragments if f.writer == row.rank), key=lambda f: f.offset)
    data = raw_data(data, row, parts["checksums"], mine, block) if coded else data
    sums, number, free = np.frombuffer(parts["checksums"][: 4 * row.blocks], "<u4").tolist(), 0, 0
    for fragment in mine:
        check(fragment.offset >= free and fragment.offset % (4096 if fragment.nbytes >= 1 << 20 else 64) == 0, "offset")
        check(fragment.first_block == number, "first block")
        free = fragment.offset + fragment.nbytes
        for at in range(fragment.offset, free, block):
            check(crc32c(data[at : min(at + block, free)]) == sums[number], f"block {number} of {path}")
            number += 1
    check(number == len(sums) == row.blocks == rank.blocks and free == rank.end, "number of blocks")
    return data, sealed(parts["ours"], "objects"), sealed(parts["mine"], "objects"), coded


def read(root: str | Path) -> SimpleNamespace:
    """The newest step: `tensors` by name as (dtype, array of raw elements), `ours`, `options` and `mine` by rank."""
    root, record = Path(root), newest(Path(root))
    folder = root / "steps" / str(record["step"]) / str(record["term"])
    plan = root / "plans" / f"{record['term']}-{record['plan']['sha256']}.arrow"
    (tensors, ranks, holders), fragments, block = whole_plan(plan.read_bytes(), **record["plan"])
    (files,), _ = tables(digested((folder / "files.arrow").read_bytes(), **record["files"]), "files")
    check([r.rank for r in ranks] == [row.rank for row in files] == list(range(len(ranks))), "ranks")
    stored = [data_file(folder, row, rank, fragments, block) for row, rank in zip(files, ranks, strict=True)]
    check(record["requires"] == ["codec"] * any(coded for *_, coded in stored), "requires")
    whole, nbytes = {}, 0
    for index, tensor in enumerate(tensors):
        raw = f"V{ITEMSIZE[tensor.dtype]}"
        array, seen = np.zeros(tensor.shape, raw), np.zeros(tensor.shape, bool)
        for f in (f for f in fragments if f.tensor == index):
            box = tuple(map(slice, f.start, f.stop))
            check(not seen[box].any() and f.writer in holders[f.holders].ranks, "fragment")
            array[box] = np.frombuffer(stored[f.writer][0][f.offset :][: f.nbytes], raw).reshape(array[box].shape)
            seen[box], nbytes = True, nbytes + f.nbytes
        check(bool(seen.all()), f"cover of {tensor.name}")
        for name in (tensor.name, *tensor.aliases):
            check(name not in whole, "a name twice")
            whole[name] = tensor.dtype, array
    counted = {"tensors": len(tensors), "fragments": len(fragments), "ranks": len(ranks), "bytes": nbytes}
    check(record["counts"] == {**counted, "blocks": sum(row.blocks for row in files)}, "counts")
    ours, mine = ([{p: plain(v) for p, v in texts[i]["objects"].items()} for texts in stored] for i in (1, 2))
    options = [
        {n: {p: plain(o["groups"][g]) for p, g in o["parameters"].items()} for n, o in texts[1]["options"].items()}
        for texts in stored
    ]
    return SimpleNamespace(record=record, tensors=whole, ours=ours, mine=mine, options=options)
