"""One file in each way."""

from __future__ import annotations

from pathlib import Path

import pytest

from dscheck.probe import Way, read_file, write_file


@pytest.mark.parametrize("way", [Way(False), Way(False, 1 << 20, 3), Way(True, 1 << 20, 2)])
@pytest.mark.parametrize("nbytes", [1, 4096, (3 << 20) + 5])
def test_a_file_has_the_wanted_length_in_whole_pages(tmp_path: Path, nbytes: int, way: Way) -> None:
    path = tmp_path / "file"
    try:
        write_file(path, nbytes, way)
    except OSError:
        if not way.direct:
            raise
        pytest.skip("no direct I/O here")
    assert 0 <= path.stat().st_size - nbytes < 4096
    read_file(path, nbytes, way)


def test_a_file_that_is_cut_short_is_not_read_as_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, 3 << 20, Way(False, 1 << 20, 2))
    path.write_bytes(bytes((2 << 20) + 1))
    with pytest.raises(OSError, match="short"):
        read_file(path, 3 << 20, Way(False, 1 << 20, 2))
