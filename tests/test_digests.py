"""A large file's digest is read once, and again as soon as anything touched the file."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from hf_fedlarge import cache, digests
from hf_fedlarge.cache import cache_directory
from hf_fedlarge.digests import remembered_sha256

DAY = 86_400


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that counts as large, and whose last change is not a moment ago: the clock is a day ahead."""
    monkeypatch.setattr(digests, "_REMEMBERED_BYTES", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + DAY * 10**9)
    path = tmp_path / "weights"
    path.write_bytes(b"the weights")
    return path


@pytest.fixture
def read(monkeypatch):
    """The files that were read, in order."""
    paths, real = [], digests.sha256_of
    monkeypatch.setattr(digests, "sha256_of", lambda path: paths.append(path) or real(path))
    return paths


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept() -> list[Path]:
    return sorted((cache_directory() / "digests").iterdir())


def test_a_file_is_read_once(file, read):
    assert [remembered_sha256(file) for _ in range(3)] == [sha256(file)] * 3
    assert read == [file]
    assert len(kept()) == 1


def test_a_link_is_the_file_it_names(file, read):
    link = file.with_name("link")
    link.symlink_to(file)
    assert remembered_sha256(file) == remembered_sha256(link)
    assert read == [file]


def rewritten(path):
    path.write_bytes(b"other bytes")  # as many


def rewritten_in_its_old_time(path):
    before = path.stat()
    path.write_bytes(b"other bytes")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"other bytes")
    other.replace(path)


@pytest.mark.parametrize("change", [rewritten, rewritten_in_its_old_time, replaced])
def test_a_file_that_was_touched_is_read_again(file, read, change):
    before = remembered_sha256(file)
    time.sleep(0.02)  # more than the system's clock takes from one time to the next
    change(file)
    assert remembered_sha256(file) == sha256(file) != before
    assert read == [file, file]


def test_what_changed_a_moment_ago_may_change_again_unseen(file, read, monkeypatch):
    monkeypatch.setattr(digests.time, "time_ns", lambda: file.stat().st_ctime_ns + 10**9)
    assert [remembered_sha256(file) for _ in range(2)] == [sha256(file)] * 2
    assert read == [file, file]


def test_what_changes_while_it_is_read_is_not_remembered(file, monkeypatch):
    def changing(path):
        time.sleep(0.02)
        path.write_bytes(b"other bytes")
        return "0" * 64

    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256_of", changing)
        assert remembered_sha256(file) == "0" * 64
    assert remembered_sha256(file) == sha256(file)


def test_small_files_are_not_remembered(file, read, monkeypatch):
    monkeypatch.setattr(digests, "_REMEMBERED_BYTES", 100)
    assert [remembered_sha256(file) for _ in range(2)] == [sha256(file)] * 2
    assert read == [file, file]


@pytest.mark.parametrize("content", [b"", b"0" * 63, b"\xff" * 64, b"0" * 64 + b"\n"])
def test_a_damaged_memory_is_mended(file, read, content):
    remembered_sha256(file)
    kept()[0].write_bytes(content)
    assert [remembered_sha256(file) for _ in range(2)] == [sha256(file)] * 2
    assert read == [file, file]


def test_nobody_else_is_believed(file, read, monkeypatch):
    remembered_sha256(file)
    kept()[0].write_text("0" * 64)
    monkeypatch.setattr(cache.os, "getuid", lambda: file.stat().st_uid + 1)
    assert remembered_sha256(file) == sha256(file)


def test_without_a_cache_it_is_read_each_time(file, read, monkeypatch):
    (file.parent / "cache").write_text("no folder")
    assert [remembered_sha256(file) for _ in range(2)] == [sha256(file)] * 2
    assert read == [file, file]


def test_without_a_home_it_is_read_each_time(file, read, monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert remembered_sha256(file) == sha256(file)
    assert read == [file]


def test_a_file_that_is_not_there_is_the_callers_error(file):
    with pytest.raises(FileNotFoundError):
        remembered_sha256(file.with_name("none"))
