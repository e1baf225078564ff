"""Safetensors checkpoints read and written one tensor at a time.

`CheckpointReader` maps a shard for as long as one tensor of it is used, so the pages of a large shard never pile up
in memory. `SafetensorsWriter` writes the header first, from shapes known in advance, then the tensors as they come:
the library's own `save_file` wants all of them in memory at once. Reading and all checks of the format stay with
`safetensors`. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hf_fedlarge.artifacts import file_entry
from hf_fedlarge.digests import remembered_sha256
from hf_fedlarge.entries import FileEntry
from hf_fedlarge.errors import ArtifactError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_WRITTEN_BYTES = 2**18
_BEHIND_BYTES = 2**24  # that hashing may be behind writing
_CACHED_BYTES = 2**28  # the end of a file that stays in the page cache

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it looks like, from its shard's header."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a directory with `model.safetensors` or an index of shards.

    Raises:
        ArtifactError: no safetensors there (only pickled weights, say), or a shard is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index: dict | None = None
        index = directory / INDEX_NAME
        if (directory / SINGLE_NAME).is_file():  # first, as transformers does where both are there
            self.files = [SINGLE_NAME]
        elif index.is_file():
            try:
                self.index = json.loads(index.read_bytes())
                self.files = sorted(set(self.index["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ArtifactError(f"{index} is not an index of shards ({error!r}); fetch it again.") from error
        else:
            found = sorted(path.name for path in directory.glob("*.bin")) + sorted(
                path.name for path in directory.glob("*.gguf")
            )
            hint = f" (found {', '.join(found[:3])}: convert it with save_pretrained)" if found else ""
            raise ArtifactError(f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}.")
        self.infos: dict[str, TensorInfo] = {}
        for file in self.files:
            if not isinstance(file, str) or Path(file).name != file:
                raise ArtifactError(f"{index} names {file!r}, which is not a plain file name.")
            self.infos.update(read_header(directory / file))
        for name, file in (self.index["weight_map"] if self.index else {}).items():
            if name not in self.infos or self.infos[name].file != file:
                raise ArtifactError(f"{index} says {file} holds {name}, but it does not; fetch the checkpoint again.")

    def metadata(self, file: str) -> dict[str, str]:
        """The `__metadata__` of one shard's header."""
        with safe_open(self.directory / file, framework="pt") as opened:
            return opened.metadata() or {}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped from its file; its pages are given back when it is no longer referenced."""
        with safe_open(self.directory / self.infos[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The rows [start, stop) of a tensor, mapped; 0-d comes as it is."""
        info = self.infos[name]
        if not info.shape:
            return self.read(name)
        # Mapped anew for each block: the pages of the earlier ones are given back.
        with safe_open(self.directory / info.file, framework="pt") as file:
            return file.get_slice(name)[start:stop]

    def row_ranges(self, name: str, max_bytes: int, multiple: int = 1) -> list[tuple[int, int]]:
        """(start, stop) of blocks of about `max_bytes`, all but the last of a multiple of `multiple` rows."""
        info = self.infos[name]
        rows = info.shape[0] if info.shape else 1
        step = max(1, max_bytes * rows // max(1, info.nbytes) // multiple) * multiple
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors in one safetensors file, in the order of their data, which isn't read.

    Raises:
        ArtifactError: the file is missing, damaged, or holds a dtype that is not supported.
    """
    try:
        infos = {}
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                view = file.get_slice(name)
                code = view.get_dtype()
                if code not in _DTYPES:
                    raise ArtifactError(f"{path} holds {name!r:.200} in {code}; supported are {', '.join(_DTYPES)}.")
                infos[name] = TensorInfo(name, path.name, _DTYPES[code], tuple(view.get_shape()))
        return infos
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; fetch the checkpoint again.") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from error


def file_bytes(infos: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Size of the file that `SafetensorsWriter` makes of these, with its usual metadata."""
    head, places = _plan_file(infos, None)
    return len(head) + max((end for _, end in places.values()), default=0)


def header_bytes(infos: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """What of that comes before the tensors."""
    return len(_plan_file(infos, None)[0])


def _plan_file(
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What a safetensors file begins with, and where each tensor's data lies after that."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for name, (dtype, shape) in infos.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        places[name] = offset, end
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, places


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor; what is written in the order of `infos` is hashed meanwhile.

    It goes to the disk meanwhile, too (on Linux), so that whoever flushes the file at the end waits for little. Of a
    large file only the end stays in the page cache; all of it would push out what is read again, such as packages.

    Args:
        path: the file to make.
        infos: name → (dtype, shape), as they will lie in the file. Wider dtypes first keeps every tensor aligned.
        metadata: the header's `__metadata__`; transformers wants `{"format": "pt"}`.
    """

    def __init__(
        self, path: Path, infos: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
    ) -> None:
        self.path = path
        head, places = _plan_file(infos, metadata)
        self._next = {name: start for name, (start, _) in places.items()}
        self._end = {name: end for name, (_, end) in places.items()}
        self._start = len(head)
        self._hash: Any = hashlib.sha256(head)
        self._hashed = 0
        self._beside = ThreadPoolExecutor(1)
        self._hashing: deque[tuple[int, Future[None]]] = deque()
        self._behind = 0
        self._file = path.open("wb")
        self._file.write(head)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, or the next rows of one; the sizes must be those announced, the order may be any.

        Its values must stay as they are until `close`: they may be hashed later.
        """
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
        offset = self._next[name]
        assert offset + data.nbytes <= self._end[name], f"{name}: more bytes than announced"
        self._next[name] += data.nbytes
        if self._hash is not None and offset == self._hashed:
            # What is done goes at once: a file of many small tensors would be in memory, and looked through, here.
            while self._hashing and (self._hashing[0][1].done() or self._behind + data.nbytes > _BEHIND_BYTES):
                size, hashed = self._hashing.popleft()
                hashed.result()
                self._behind -= size
            self._hashing.append((data.nbytes, self._beside.submit(self._hash.update, data)))
            self._behind += data.nbytes
            self._hashed += data.nbytes
        elif data.nbytes:
            self._hash = None
        self._file.seek(self._start + offset)
        # Linux took twice as long over megabytes at once (docs/log.md).
        for piece in range(0, data.nbytes, _WRITTEN_BYTES):
            self._file.write(data[piece : piece + _WRITTEN_BYTES])
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write what is called not needed. An fsync here would stop the writing until it is done.
            # Called so again once it is written it leaves the page cache, where it would take the place of other files.
            for begin in (self._start + offset, self._start + offset - _CACHED_BYTES):
                if begin >= 0:
                    os.posix_fadvise(self._file.fileno(), begin, data.nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> FileEntry:
        """End the file and give its size and SHA-256."""
        missing = [name for name, end in self._end.items() if self._next[name] != end]
        assert not missing, f"not written: {missing[0]}"
        self._beside.shutdown()
        self._file.close()
        return (
            file_entry(self.path)
            if self._hash is None
            else FileEntry(size=self.path.stat().st_size, sha256=self._hash.hexdigest())
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._beside.shutdown()
            self._file.close()
        elif not self._file.closed:
            self.close()


def plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names grouped into shards of at most `max_shard_bytes`, in order; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """The names transformers expects: `model.safetensors`, or `model-00001-of-0000N.safetensors`."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def checkpoint_digest(directory: Path) -> str:
    """What a checkpoint computes, as one SHA-256: over its config, its shards and their index, by name and content.

    Tokenizer, card and templates are left out: they may change without a weight changing. Reads every byte once, unless
    it did so before and nothing touched the files since.

    Raises:
        ArtifactError: the directory is not a safetensors checkpoint with a config.
    """
    reader = CheckpointReader(directory)
    names = ["config.json", *reader.files, *([INDEX_NAME] if reader.index else [])]
    if not (directory / "config.json").is_file():
        raise ArtifactError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint.")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(names, pool.map(remembered_sha256, (directory / name for name in names)), strict=True))
    return hashlib.sha256(json.dumps(digests, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Factors(NamedTuple):
    """One module's LoRA matrices (arXiv 2106.09685) in fp32: the module adds `LoraSettings.scale` · B A x.

    Attributes:
        A_RI: (rank, in) the down-projection.
        B_OR: (out, rank) the up-projection, which PEFT starts at zero.
    """

    A_RI: torch.Tensor
    B_OR: torch.Tensor

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A_RI)

    @property
    def width(self) -> int:
        """I."""
        return self.A_RI.shape[1]


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """Factors that are read whenever they are iterated over, and not kept: of any number, one is in memory.

    Attributes:
        read: gives them.
        shapes: (R, I) and (O, R).
        fill: writes them into two fp32 arrays of these shapes, which spares a copy; None: only `read` can.
    """

    read: Callable[[], Factors]
    shapes: tuple[Sequence[int], Sequence[int]]
    fill: Callable[[np.ndarray, np.ndarray], None] | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.shapes[0][0]

    @property
    def width(self) -> int:
        """I."""
        return self.shapes[0][1]

    @property
    def nbytes(self) -> int:
        """What they take once they are read."""
        return 4 * sum(math.prod(shape) for shape in self.shapes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """A_RI and B_OR."""
        return iter(self.read())

    def read_into(self, A_RI: np.ndarray, B_OR: np.ndarray) -> None:
        """Write them into fp32 arrays of their shapes, each of which lies in one piece."""
        if self.fill is not None:
            self.fill(A_RI, B_OR)
        else:
            A_RI[:], B_OR[:] = (factor.numpy() for factor in self.read())
