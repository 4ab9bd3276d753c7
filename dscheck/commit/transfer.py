"""The objects of a step from one storage to another, under the same keys: each is proved on the way, none replaced."""

from __future__ import annotations

from collections.abc import Callable

from dscheck.commit.blocks import FileBlocks, verified
from dscheck.commit.contents import Contents
from dscheck.commit.listing import StepRef, read_step
from dscheck.commit.once import put_once, read_if_there
from dscheck.commit.parts import Direct, Part
from dscheck.commit.publish import check_files, put_files, put_same
from dscheck.commit.stored import proved
from dscheck.commit.term import assert_condition, assert_honest, read_term
from dscheck.commit.workers import Stop, ahead
from dscheck.errors import CorruptCheckpointError, StorageError, SupersededError
from dscheck.manifest.keys import files_key, record_key, term_key
from dscheck.manifest.record import Record, Tombstone, decode_record, decode_term
from dscheck.storage.base import Storage


def copy_claims(source: Storage, destination: Storage, terms: range) -> None:
    """The claims of these terms, ascending, are at `destination`, byte for byte as at `source`.

    Raises SupersededError where another job has one of the numbers there: the two hold different histories.
    """
    if terms:
        assert_condition(destination)
    for number in terms:
        claim = read_term(source, number)
        stored = read_if_there(destination, term_key(number))
        if stored is None:
            stored = put_once(destination, term_key(number), claim.encode())
            assert_honest(destination, decode_term(stored, term_key(number)))
        other = decode_term(stored, term_key(number))
        if other != claim:
            raise SupersededError(
                f"{destination.url}: term {number} there was claimed on host '{other.host}' for run {other.run}, and "
                f"in {source.url} on host '{claim.host}' for run {claim.run}; the two hold different histories, and "
                "none is ever written over: choose an empty root, or one that holds this run",
                id=other.id,
                term=number,
                host=other.host,
                time=other.time,
            )


def copy_file(
    contents: Contents,
    rank: int,
    blocks: FileBlocks,
    destination: Storage,
    advance: Callable[[int], None],
    stop: Stop,
) -> None:
    """The data file of one saved rank is at `destination`, whole and durable; every byte was proved on the way.

    One that is there already is proved instead. What a killed copy left of it is deleted first; only an attempt without
    a record may have such. `stop` is called between two parts and may raise; `advance` is told their bytes.
    """
    key, size = contents.key(rank), contents.files[rank].size
    found = {entry.key: entry.size for entry in destination.list(key)}.get(key)
    if found is not None:
        if found == size and _is_whole(contents, rank, blocks, destination, stop, advance):
            return
        _discard(contents.record, destination, key)
    writer = destination.create(key)
    try:
        for part in ahead(verified(contents.storage, contents, rank, blocks), "dscheck-copy-read"):
            stop()
            writer.write(part)
            advance(len(part))
        stop()
        written = writer.commit()
    except BaseException:
        writer.abort()
        raise
    if written != size:
        raise StorageError(f"{destination.url}/{key}: {written} bytes stored, {size} written", key=key)


def finish(contents: Contents, destination: Storage) -> None:
    """The step exists at `destination`: what its record names is there, and the record last (P7, P8).

    The plan comes after the data, so that a gc there sees the attempt before a plan that no record names (P32).
    Raises StorageError when a data file is missing or has another size, SupersededError for a tombstone.
    """
    record, source = contents.record, contents.storage
    check_files(destination, record.step, record.term, contents.files)
    part = Part(files_key(record.step, record.term), 0, record.files.size)
    (files,) = proved(source.url, [(part, record.files.sha256)], Direct(source))
    put_files(destination, record.step, record.term, files)
    put_same(destination, contents.plan.key, contents.plan.raw())
    key = record_key(record.step, record.term)
    stored = decode_record(put_once(destination, key, record.encode()), key)
    if not is_same(destination, stored, record):
        raise given_up(destination, record)


def is_same(destination: Storage, stored: Record | Tombstone | None, record: Record) -> bool:
    """Whether `record` is the one that is stored; not so for none and a tombstone. Raises StorageError for another."""
    if isinstance(stored, Record) and stored != record:
        key = record_key(record.step, record.term)
        raise StorageError(
            f"{destination.url}/{key}: another attempt has committed this step there ({stored.id}, to be copied was "
            f"{record.id}); the two hold different histories: choose another root",
            url=destination.url,
            key=key,
        )
    return isinstance(stored, Record)


def given_up(destination: Storage, record: Record) -> SupersededError:
    return SupersededError(
        f"{destination.url}: step {record.step} of term {record.term} was deleted there, and a step that was deleted "
        "does not come back: copy it to another root",
        step=record.step,
        term=record.term,
    )


def _is_whole(
    contents: Contents,
    rank: int,
    blocks: FileBlocks,
    destination: Storage,
    stop: Callable[[], None],
    advance: Callable[[int], None],
) -> bool:
    try:
        for part in verified(destination, contents, rank, blocks):
            stop()
            advance(len(part))
    except CorruptCheckpointError:
        return False
    return True


def _discard(record: Record, destination: Storage, key: str) -> None:
    """Delete what no record names and nobody writes any more."""
    if read_step(destination, StepRef(record.step, record.term)) is not None:
        raise StorageError(
            f"{destination.url}/{key}: it is not what step {record.step} has there, by size or checksums, and its "
            "record is there: the step is damaged; delete it, or copy to another root",
            url=destination.url,
            key=key,
        )
    destination.delete(key)
