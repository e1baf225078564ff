"""Packages for which a server learned something of its model from calibration text: what to drop, and what to fit.

Calibration text is public; clients' data is not needed for it. The checkpoint is streamed, so it may be larger than
memory.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_fedlarge.architectures import load_config
from hf_fedlarge.artifacts import (
    PackageManifest,
    check_output,
    read_manifest,
    staged_directory,
    write_manifest,
    writing,
)
from hf_fedlarge.choice import choose
from hf_fedlarge.config import PackageSettings
from hf_fedlarge.data import load_examples
from hf_fedlarge.encoding import encode_example
from hf_fedlarge.errors import ConfigError, DataError
from hf_fedlarge.fit import FitPlan, Fitted, fit, last_states
from hf_fedlarge.heal import Healed, Truth, heal
from hf_fedlarge.layers import parse_layers
from hf_fedlarge.package import load_package, load_tokenizer, stream_checkpoint
from hf_fedlarge.quantize import BLOCK
from hf_fedlarge.shrink import CORRECTIONS_NAME, ShrinkPlan, plan_shrink, shrink, write_tensors
from hf_fedlarge.stdlib_corpus import standard_library_prose
from hf_fedlarge.tensors import checkpoint_digest
from hf_fedlarge.walk import Walk
from hf_fedlarge.widths import choose_widths

logger = logging.getLogger(__name__)

TOKENS = 32_768
LENGTH = 128
_CODECS = {"nf4": "nf4", "int8": "int8", "bf16": "dense"}
Progress = Callable[[int], None]


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[dict[str, Any]], tokens: int = TOKENS, length: int = LENGTH
) -> list[torch.Tensor]:
    """Calibration text as sequences of one length, each (1, S), that begin as training examples do.

    The first token draws the attention of all others and has states like no other, so there must be many of them: short
    examples follow each other until S is reached, the next sequence begins with the next example; long ones are cut,
    and what the tokenizer puts before a text (BOS) stands before each piece.

    Args:
        tokenizer: the model's.
        examples: in any of the three forms of `data.load_examples`, taken in order.
        tokens: how many to take, if there are as many.
        length: S.

    Raises:
        DataError: the text is too short for one sequence.
    """
    sequences: list[list[int]] = []
    begun: list[int] = []
    leading = _leading(tokenizer)
    for example in examples:
        ids = begun + encode_example(example, tokenizer, sys.maxsize)["input_ids"]
        head = leading if ids[: len(leading)] == leading else []  # a chat's template may begin in another way
        step = length - len(head)
        pieces = [head + ids[start : start + step] for start in range(len(head), len(ids) - step + 1, step)]
        sequences += pieces[:1] if begun else pieces
        begun = [] if pieces else ids
        if len(sequences) * length >= tokens:
            break
    if not sequences:
        raise DataError(f"The calibration text has {len(begun)} tokens; expected {length} or more, better {TOKENS}.")
    return [torch.tensor(ids)[None] for ids in sequences[: max(1, tokens // length)]]


def _leading(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens before every text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[: whole.index(bare[0])] if bare else []


def plan_package(
    checkpoint: Path,
    settings: PackageSettings,
    progress: Progress | None = None,
    sequences: Sequence[torch.Tensor] = (),
) -> ShrinkPlan:
    """`shrink.plan_shrink`, with layers and their widths chosen by what they do on calibration text, as asked for.

    Args:
        checkpoint: the full model's directory.
        settings: where `keep_layers` lists layers, there is nothing to choose.
        progress: called with the layers that are done.
        sequences: from `calibration_sequences`; none: those of the text that `settings` names, once it is needed.

    Raises:
        FedLargeError: as `plan_shrink`, or the calibration text can't be used.
    """
    plan, wanted = _even_plan(checkpoint, settings)
    _say_unused(plan, settings)
    if not plan.undecided:
        return replace(plan, sequences=sequences)
    sequences = sequences or calibration_text(checkpoint, settings)
    known: dict[str, Any] = {"sequences": sequences}
    kept = plan.kept
    if "layers" in plan.undecided:
        choice = choose(checkpoint, sequences, settings.layer_choice, len(plan.kept), progress)
        gc.collect()  # the model, which is a cycle, and its adapter's gradients
        wanted["keep_layers"] = kept = choice.kept
        known |= {"scores": tuple(choice.scores), "scored": choice.cost}
    if "widths" in plan.undecided:
        (mean,) = set(plan.widths.values())
        wanted["keep_neurons"] = choose_widths(checkpoint, kept, sequences, mean, progress)
    return replace(plan_shrink(checkpoint, **wanted), **known)


def _say_unused(plan: ShrinkPlan, settings: PackageSettings) -> None:
    """Warn of settings that have nothing to act on; with tiers they may be meant for another package."""
    causes: dict[str, str] = {}
    if not settings.heal_steps:
        causes["heal_rank"] = "heal_steps is 0"
    if _is_listed(plan, settings):
        causes["layer_choice"] = "keep_layers says which layers stay"
    if settings.surrogate == "none":
        causes |= dict.fromkeys(("surrogate_codec", "surrogate_rank"), "surrogate is none")
    if not plan.dropped:
        causes |= dict.fromkeys(("layer_choice", "surrogate_codec", "surrogate_rank"), "no layer is dropped")
        if not plan.widths and not settings.heal_steps:
            causes["calibration"] = "there is nothing to fit"
    for name, cause in causes.items():
        if getattr(settings, name) != PackageSettings.model_fields[name].default:
            logger.warning("%s has no effect: %s.", name, cause)


def check_plan(checkpoint: Path, settings: PackageSettings) -> ShrinkPlan:
    """Refuse what `plan_package` would refuse; no layer is computed.

    Returns:
        The plan with layers evenly spread and all of one width, and what of that is undecided.

    Raises:
        FedLargeError: as `plan_package`.
    """
    plan, _ = _even_plan(checkpoint, settings)
    if settings.calibration:
        calibration_text(checkpoint, settings)
    return plan


def _even_plan(checkpoint: Path, settings: PackageSettings) -> tuple[ShrinkPlan, dict[str, Any]]:
    """The plan of `check_plan`, and what `plan_shrink` was given for it."""
    keep_layers, keep_neurons = settings.kept
    wanted = {"keep_layers": keep_layers, "keep_neurons": keep_neurons, "embeddings": settings.embeddings}
    plan = plan_shrink(checkpoint, **wanted)
    if settings.surrogate != "none" and plan.kept[0] != 0:
        raise ConfigError(
            "A surrogate stands behind a kept layer, but layer 0 is dropped: keep it, or use no surrogate."
        )
    to_choose = {
        "layers": settings.layer_choice != "uniform" and plan.dropped and not _is_listed(plan, settings),
        "widths": settings.width_choice != "uniform" and max(plan.widths.values(), default=0) > BLOCK,
    }
    return replace(plan, undecided=tuple(what for what, wanted in to_choose.items() if wanted)), wanted


def _is_listed(plan: ShrinkPlan, settings: PackageSettings) -> bool:
    """Whether the settings name the layers that stay."""
    return isinstance(parse_layers(settings.kept[0], plan.layers), list)


def calibration_text(checkpoint: Path, settings: PackageSettings) -> list[torch.Tensor]:
    """The text that `settings` names, as `calibration_sequences` makes them, filled up to `TOKENS`.

    What a small text lacks is taken from Python's documentation: the fits have more unknowns than it has tokens, and
    some other text tells them more than none.

    Raises:
        FedLargeError: it can't be read or used.
    """
    longest = getattr(load_config(checkpoint), "max_position_embeddings", None) or LENGTH
    tokenizer, length, found = load_tokenizer(checkpoint), min(LENGTH, longest), []
    if settings.calibration:
        found = calibration_sequences(tokenizer, load_examples(settings.calibration), TOKENS, length)
    missing = TOKENS - length * len(found)
    if missing >= length:
        found += calibration_sequences(tokenizer, standard_library_prose(), missing, length)
    return found


def make_package(
    plan: ShrinkPlan,
    settings: PackageSettings,
    output: Path,
    *,
    base_id: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    fitting: Progress | None = None,
    writing: Progress | None = None,
    healing: Progress | None = None,
) -> PackageManifest:
    """Fit what the plan needs fitted on calibration text, and write the package.

    The fit is kept in a hidden directory beside `output` until the package is there, so that one that was interrupted
    goes on where it was.

    Args:
        plan: from `plan_package`.
        settings: the same.
        output, base_id, revision, overwrite: see `shrink.shrink`.
        fitting: called with the layers that are fitted.
        writing: called with the bytes that are written.
        healing: called with the steps of healing that are done.

    Raises:
        FedLargeError: as `shrink.shrink`, or the calibration text can't be used.
    """
    check_output(output, overwrite)
    options = {"base_id": base_id, "revision": revision, "overwrite": overwrite, "progress": writing}
    surrogate_codec = _CODECS[settings.surrogate_codec] if settings.surrogate != "none" and plan.dropped else None
    if surrogate_codec is None and not plan.widths and not settings.heal_steps:
        return shrink(plan, output, **options)
    sequences = plan.sequences or calibration_text(plan.checkpoint, settings)
    full = plan.architecture
    widths = {layer: plan.widths.get(layer, full.neuron_count) for layer in plan.kept}
    fit_plan = FitPlan(
        kept=plan.kept, surrogate_codec=surrogate_codec, widths=widths, surrogate_rank=settings.surrogate_rank
    )
    with _fit_directory(output, plan, fit_plan, sequences) as work:
        fitted = fit_package(plan, fit_plan, sequences, work, fitting)
        if not settings.heal_steps:
            return shrink(plan, output, fitted=fitted, **options)
        whole = work / "package"
        shrink(plan, whole, fitted=fitted, stock=False, **options | {"overwrite": True})
        healed = heal_package(whole, plan, settings, torch.cat(list(sequences)), last_states(work), healing)
        if healed is None:
            return shrink(plan, output, fitted=fitted, **options)
        return with_corrections(whole, output, healed, overwrite)


def heal_package(
    package: Path,
    plan: ShrinkPlan,
    settings: PackageSettings,
    ids: torch.Tensor,
    states: torch.Tensor,
    progress: Progress | None = None,
) -> Healed | None:
    """`heal.heal` for a package that was fitted.

    Args:
        package: without corrections.
        plan: what it was made by.
        settings: rank and steps.
        ids: the calibration text (T, S).
        states: the full model's after its last block, (T, S, D); may be written over.
        progress: called with the steps that are done.
    """
    teacher = Walk(stream_checkpoint(plan.checkpoint), ids[:1])
    width = teacher.head.weight.shape[1]  # another than the blocks' where a projection stands between
    finished = states if states.shape[-1] == width else states.new_empty(*ids.shape, width)  # there are many
    for place, own in enumerate(ids):
        finished[place] = teacher.finish(states[place][None], own[None])[0]
    truth = Truth(ids, finished, teacher.head)
    teacher.forget()
    del teacher
    gc.collect()  # models are cycles, and hold an arena each
    model = load_package(package, verify=False)
    return heal(model, truth, settings.heal_rank, settings.heal_steps, progress=progress)


def with_corrections(package: Path, output: Path, healed: Healed, overwrite: bool) -> PackageManifest:
    """Write a package with its corrections.

    Raises:
        OutputError: `output` exists or can't be written.
    """
    manifest = read_manifest(package, PackageManifest)
    with staged_directory(output, overwrite=overwrite) as staging:
        for name in manifest.files:
            shutil.copy2(package / name, staging / name)
        files = manifest.files | {CORRECTIONS_NAME: write_tensors(staging / CORRECTIONS_NAME, healed.tensors)}
        manifest = manifest.model_copy(update={"files": files, "healed": healed.entry})
        write_manifest(staging, manifest)
    return manifest


def fit_package(
    plan: ShrinkPlan,
    fit_plan: FitPlan,
    sequences: Sequence[torch.Tensor],
    work: Path,
    progress: Progress | None = None,
) -> Fitted:
    """`fit.fit` for the checkpoint of a plan, streamed.

    Args:
        plan: what is shrunk.
        fit_plan: what is fitted.
        sequences: from `calibration_sequences`.
        work: see `fit.fit`.
        progress: called with the layers that are done.
    """
    full = plan.architecture
    fitted = {name for layer in fit_plan.widths for name in full.linear_weights(layer)}
    stored_as = {}
    for name, codec in plan.codecs.items():
        block = full.layer_of(name)
        stored_as[name if block is None else full.in_layer(name, plan.kept[block])] = codec
    for name in fitted:  # rounded when they are
        del stored_as[name]
    teacher = Walk(stream_checkpoint(plan.checkpoint), sequences[0])
    student = Walk(stream_checkpoint(plan.checkpoint, stored_as=stored_as), sequences[0])
    return fit(teacher, student, full, fit_plan, sequences, work, progress)


@contextmanager
def _fit_directory(
    output: Path, plan: ShrinkPlan, fit_plan: FitPlan, sequences: Sequence[torch.Tensor]
) -> Iterator[Path]:
    """Where a fit is kept: what is there of another one is removed, and all of it once the package is there."""
    identity = hashlib.sha256(
        repr((checkpoint_digest(plan.checkpoint), fit_plan, sorted(plan.codecs.items()))).encode()
        + b"".join(ids.numpy().tobytes() for ids in sequences)
    ).hexdigest()
    everything = output.with_name(f".{output.name}.fit")
    retired = everything.with_name(f"{everything.name}.retired")
    work = everything / identity
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if retired.exists():
            shutil.rmtree(retired)
        if everything.exists() and not work.exists():
            _remove(everything, retired)
        work.mkdir(parents=True, exist_ok=True)
        yield work
    _remove(everything, retired)


def _remove(everything: Path, retired: Path) -> None:
    """Remove a directory by way of another name, so that what is left of it if this is killed isn't taken for a fit."""
    everything.replace(retired)
    shutil.rmtree(retired)
