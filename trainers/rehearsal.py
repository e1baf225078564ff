"""`join --check`: what can be known of a client before its first round, and two steps of training. Nothing is sent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, PackageManifest, writing
from hf_fedlarge.encoding import IGNORED
from hf_fedlarge.orders import OrderDocument
from hf_fedlarge.progress import spell_seconds
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.client import ClientArguments, train_client
from hf_fedlarge.trainers.launch import training_config
from hf_fedlarge.trainers.sites import Site
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraTrainer
from hf_fedlarge.trainers.training import Look
from hf_fedlarge.voice import Ear

STEPS = 2
_QUIET = {"max_steps": STEPS, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
_MOST_LETTERS, _LETTERS = 1500, 400  # of an example that is shown, and of each of its parts


def rehearse(url: str, site: Site, report: Callable[[str], None], package: Path | None = None, show: int = 0) -> None:
    """Try all that a client does in a round but sending: read, fetch the package as `join` does, train two steps.

    Args:
        url: the store's.
        site: what the client brings.
        report: told in lines what was found.
        package: its directory, where the store has no order that names one; None: nothing is trained then.
        show: of so many examples it is told, too, what the model sees of them and what counts.

    Raises:
        FedLargeError: what would keep it from taking part.
    """
    check_in = site.check_in()
    memory = check_in.memory_bytes
    size = f"{memory / 1e9:.1f} GB" if memory >= 1e9 else f"{memory / 1e6:.0f} MB"
    report(f"{site.client} would check in with {check_in.examples} examples and {size} of memory")
    store = Store(url)
    with writing(site.directory):
        site.directory.mkdir(parents=True, exist_ok=True)
        report(f"{site.directory} has {shutil.disk_usage(site.directory).free / 1e9:.1f} GB free")
        scratch = TemporaryDirectory(prefix=".check-", dir=site.directory)
    with scratch as directory:
        order = Ear(store, site.client, Path(directory), site.server_key, report).order()
        report(f"{store.url} {_found(order, site.client, store)}")
        home, look = Path(directory), partial(_describe, report=report, show=show)
        if order is not None and order.work:
            _rehearse_order(site, store, order, home, report, look)
        elif package is not None:
            report(_steps(site, None, {"package": str(package)}, home, look))
        else:
            report("no package is named there yet, so no step was tried (--package DIR tries one); nothing was sent")


def _found(order: OrderDocument | None, client: str, store: Store) -> str:
    if order is None and not store.names(""):
        return "isn't there or holds nothing: no server has begun there yet, or the URL is another one"
    if order is None:
        return "can be read; it has no order yet"
    if order.state == "open":
        return f"asks for round {order.round}" + ("" if order.work_of(client) else f", though not {client}")
    return f"can be read; its federation {'is over' if order.state == 'over' else 'asks for nothing now'}"


def _rehearse_order(
    site: Site, store: Store, order: OrderDocument, home: Path, report: Callable[[str], None], look: Look
) -> None:
    work = order.work_of(site.client) or order.work[0]
    package = site.package(work.package)
    report(f"the package of {work.package_bytes / 1e6:.1f} MB is {'here' if package.exists() else 'fetched'}")
    site.package_store(store).get(work.package, package, PackageManifest, most_bytes=work.package_bytes)
    adapter = home / "adapter"
    store.get(work.adapter, adapter, AdapterManifest, most_bytes=work.adapter_bytes, leave_out=SERVER_FILES)
    arguments = {
        "package": str(package),
        "adapter": str(adapter),
        "round": order.round,
        "proximal": order.proximal,
        "codec": order.codec.name,
        "topk_share": order.codec.topk_share,
    }
    report(_steps(site, order, arguments, home, look))


def _steps(site: Site, order: OrderDocument | None, arguments: dict[str, Any], home: Path, look: Look) -> str:
    """Train; returns what that took."""
    config = training_config(site.training(order) | _QUIET)
    own = {"data": site.data, "client": site.client, "output": str(home / "update"), "state": str(home / "state")}
    manifest = train_client(ClientArguments(**arguments | own, eval_examples=0), config, look=look)
    second = manifest.measured["train_seconds"] / manifest.measured["steps"]
    peak = manifest.measured["peak_memory_bytes"]
    if config.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(config.device)
    ordered = order.training.max_steps if order else None
    all_of_them = f", {ordered} of them {spell_seconds(second * ordered)}" if ordered else ""
    return (
        f"a step takes {second:.2f} s{all_of_them}, {peak / 1e9:.1f} GB at most (mapped files in it); nothing was sent"
    )


def _describe(trainer: StreamingLoraTrainer, report: Callable[[str], None], show: int) -> None:
    """Tell what became of the examples."""
    lengths, data = trainer.example_lengths, trainer.train_dataset
    report(
        f"{trainer.labelled_examples} examples have a labelled token within {trainer.args.max_length} tokens; the "
        f"median length is {median(lengths):.0f}, the longest {max(lengths)}"
    )
    for number in range(min(show, len(data))):
        report(f"{number + 1} of {len(data)} as the model sees it, what counts behind >:")
        for line in _parts(data[number], trainer.processing_class):
            report(line)


def _parts(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A line for each part of which all or nothing counts, as Python writes text: nothing in it moves a terminal."""
    room = _MOST_LETTERS
    for counts, part in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORED):
        text = repr(tokenizer.decode([token for token, _ in part]))
        if len(text) > _LETTERS:
            text = f"{text[: _LETTERS // 2]} … {text[-_LETTERS // 2 :]}"
        room -= len(text)
        if room < 0:
            yield "  …"
            return
        yield f"{'>' if counts else ' '} {text}"
