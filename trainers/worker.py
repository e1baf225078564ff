"""A loaded package that trains one client after another, each as if it were the first.

Loading a package, its tokenizer and its adapters takes seconds, training a simulated client sometimes less. A `Worker`
keeps what is the same for all clients and lends it to each; afterwards everything that training set on it is put back,
so that an update has the bytes that a process of its own would have given (tests/test_worker.py). It is an object that
the launcher holds for a run: nothing outlives it. A model on which a client failed is not lent again.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_fedlarge.adapters import attach_lora, read_factors, set_factors, set_trainable
from hf_fedlarge.architectures import Architecture
from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, PackageManifest, verify_files
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.memory import give_back_freed_memory
from hf_fedlarge.package import load_package, load_tokenizer
from hf_fedlarge.tensors import Factors


@dataclass(frozen=True)
class Opened:
    """A package with adapters on it: its manifest, the model, its tokenizer."""

    package: PackageManifest
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def architecture(self) -> Architecture:
        """The package's own."""
        return self.model.get_base_model().architecture


class Worker:
    """Keeps the package that was lent last, with its adapters, and the adapter read last, until others are asked for.

    From the second client on, Python's garbage collector leaves out what was there before: accelerate calls it for
    every client, and with the whole model to look through it took longer than all else.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._opened: Opened | None = None
        self._read: tuple[Path, str, dict[str, Factors]] | None = None
        self._frozen: weakref.finalize | None = None

    def read(self, directory: Path, adapter: AdapterManifest) -> dict[str, Factors]:
        """An adapter's factors by module, not to be changed; its files are checked when they are read.

        Raises:
            ArtifactError: a file is not what the manifest says.
        """
        if self._read is None or self._read[:2] != (directory.resolve(), adapter.digest):
            verify_files(directory, adapter, unneeded=SERVER_FILES)
            self._read = directory.resolve(), adapter.digest, read_factors(directory)
        return self._read[2]

    @contextmanager
    def lend(
        self,
        directory: Path,
        package: PackageManifest,
        lora: LoraSettings,
        factors: dict[str, Factors],
        *,
        trains: Literal["both", "A", "B"] = "both",
        dtype: torch.dtype,
        device: torch.device,
        verify: bool,
    ) -> Iterator[Opened]:
        """A model to train within the `with`, whatever was trained on it before.

        Args:
            directory: the package.
            package: its manifest.
            lora: the adapters' settings.
            factors: module in global numbers → A (R, I) and B (O, R) to start from, for every adapter of the package.
            trains: which factors are trainable.
            dtype: of the computation.
            device: where to compute.
            verify: check the package's digests before it is loaded; not again while it is kept.

        Raises:
            ArtifactError: the package is damaged.
        """
        key = (directory.resolve(), package.digest, lora.model_dump_json(), dtype, torch.device(device))
        opened = self._opened if key == self._key else None
        self._key = self._opened = None
        if opened is not None and self._frozen is None:
            gc.collect()
            gc.freeze()
            self._frozen = weakref.finalize(self, gc.unfreeze)
        if opened is None:
            if self._frozen is not None:
                self._frozen()
                self._frozen = None
            model = load_package(directory, dtype=dtype, device=device, verify=verify)
            adapted = attach_lora(model, model.architecture, lora)
            opened = Opened(package, adapted, load_tokenizer(directory))
        model = opened.model
        set_trainable(model, trains)
        set_factors(model, factors, opened.architecture, package.kept_layers)
        model.get_base_model().engine.start_over()
        # accelerate and trl give the model another `forward`, trl names a padding token, and all leave marks.
        marked = [model, model.get_base_model(), model.config, model.get_base_model().generation_config]
        before = [dict(vars(each)) for each in marked]
        pad_token = opened.tokenizer.pad_token
        yield opened
        for each, attributes in zip(marked, before, strict=True):
            vars(each).clear()
            vars(each).update(attributes)
        opened.tokenizer.pad_token = pad_token
        model.zero_grad(set_to_none=True)
        give_back_freed_memory()
        self._key, self._opened = key, opened


class Steps(TrainerCallback):
    """Times a client's optimizer steps, and keeps its Trainer from a checkpoint of the last, as the update comes next;
    but not where the best one is loaded at the end.

    Attributes:
        seconds: the time of all steps so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if state.global_step >= state.max_steps:
            control.should_save &= args.load_best_model_at_end
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._started
