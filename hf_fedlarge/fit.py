"""What a shrunk model needs besides the layers it keeps, fitted on calibration text one block at a time.

The full model and the small one are walked side by side. The small one, which doesn't exist yet, is the full one with
its weights as they will be stored and the dropped layers left out. In the place of dropped layers comes a linear
surrogate (`surrogate`); the output matrices of the others, which may lose neurons, are fitted anew (`neurons`), and all
their matrices are rounded so that errors make up for one another (`gptq`). Each fit is made on what the fits before it
give, so it also corrects what they left. Both models are streamed from the checkpoint, so it may be larger than memory;
results and the hidden states are written down after every block, and a fit that was interrupted goes on from there.

Shapes: N tokens, S of a sequence, D hidden, F neurons, K that stay, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hf_fedlarge.architectures import Architecture
from hf_fedlarge.artifacts import sync
from hf_fedlarge.entries import SurrogateEntry
from hf_fedlarge.gptq import add_inputs, compensated
from hf_fedlarge.neurons import NeuronFit
from hf_fedlarge.quantize import DenseWeight, FrozenWeight
from hf_fedlarge.rounding import dense, round_trip
from hf_fedlarge.surrogate import RIDGE, Regression, store_surrogate
from hf_fedlarge.tensors import SafetensorsWriter
from hf_fedlarge.walk import Walk, check_finite, hooked, token_weights

_TOGETHER = 8  # sequences in a step
_PROBE = 0.05  # the share of a change in a feed-forward layer's output that may be lost where it is just added
Progress = Callable[[int], None]


@dataclass(frozen=True)
class FitPlan:
    """What is to be fitted.

    Attributes:
        kept: global numbers of the layers that stay; the first layer is among them where any surrogate is wanted.
        surrogate_codec: how surrogates are stored: `nf4`, `int8` or `dense` (bf16); None: nothing stands for dropped
            layers.
        widths: layer → how many of its neurons stay (0: they can't be told apart), for the kept layers whose matrices
            are fitted.
        matrix_codec: how those are stored; in `nf4` errors make up for one another.
        surrogate_ridge, surrogate_rank: see `surrogate.store_surrogate`.
    """

    kept: tuple[int, ...]
    surrogate_codec: str | None
    widths: Mapping[int, int]
    matrix_codec: str = "nf4"
    surrogate_ridge: float = RIDGE
    surrogate_rank: int | None = None


@dataclass(frozen=True)
class Fitted:
    """What was fitted.

    Attributes:
        surrogates: what stands for dropped layers; their stored tensors are among `tensors`.
        neurons: layer → numbers of the neurons that stay (K,), sorted, where some go.
        matrices: the full model's parameter name → the matrix (O, I) as it is to be stored, bf16.
        tensors: the surrogates' stored tensors by name.
    """

    surrogates: list[SurrogateEntry] = field(default_factory=list)
    neurons: dict[int, torch.Tensor] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def fit(
    teacher: Walk,
    student: Walk,
    architecture: Architecture,
    plan: FitPlan,
    sequences: Sequence[torch.Tensor],
    work: Path,
    progress: Progress | None = None,
) -> Fitted:
    """Fit what `plan` asks for.

    Memory: the hidden states of all sequences in both models, in the models' dtypes, one block of each, and where
    output matrices are fitted some three matrices (F, F) in fp32.

    Args:
        teacher: the full model.
        student: the full model with its weights as the package will store them; matrices that are fitted not rounded
            yet.
        architecture: of the full model.
        plan: what to fit.
        sequences: calibration tokens, each (1, S), all of one length.
        work: an existing directory of this fit's own; what is found there of an earlier, interrupted one with the same
            arguments is used.
        progress: called with the layers that are done.

    Raises:
        ArtifactError: the full model's states are not finite.
    """
    journal = _Journal(work)
    done, truth, states = journal.resume()
    if not done:
        batches = torch.cat(list(sequences)).split(_TOGETHER)
        truth, states = [teacher.embed(ids) for ids in batches], [student.embed(ids) for ids in batches]
    for layer in range(done, len(teacher)):
        result: dict[str, torch.Tensor] = {}
        note: dict[str, str] = {}
        after = [teacher.step(layer, hidden) for hidden in truth]
        check_finite(layer, after)
        if layer in plan.widths:
            states, result = _fit_block(teacher, student, architecture, layer, plan, truth, after, states)
        elif layer in plan.kept:
            states = [student.step(layer, hidden) for hidden in states]
        truth = after
        if layer not in plan.kept and plan.surrogate_codec and (layer + 1 == len(teacher) or layer + 1 in plan.kept):
            run = list(range(max(kept for kept in plan.kept if kept < layer) + 1, layer + 1))
            regression = Regression.between(states, truth)
            entry, result, stand_in = store_surrogate(
                regression, run, plan.surrogate_codec, states[0].dtype, plan.surrogate_ridge, plan.surrogate_rank
            )
            note = {"surrogate": entry.model_dump_json()}
            states = [stand_in(hidden) for hidden in states]
        journal.write(layer, result, note, truth, states)
        for walk in (teacher, student):
            walk.forget()
        if progress:
            progress(layer + 1)
    return journal.results()


def last_states(work: Path) -> torch.Tensor:
    """The full model's states after its last block, (T, S, D) for T sequences, of a fit that is done."""
    return _Journal(work).truth()


def _fit_block(
    teacher: Walk,
    student: Walk,
    architecture: Architecture,
    layer: int,
    plan: FitPlan,
    truth: list[torch.Tensor],
    after: list[torch.Tensor],
    states: list[torch.Tensor],
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The states after a block whose matrices are fitted, and what was fitted.

    `truth` and `after` are the full model's states before and after it, `states` the small one's before it.
    """
    attention, feed_forward = architecture.attention_output, architecture.feed_forward
    found: dict[str, FrozenWeight] = {}
    kept_K: torch.Tensor | None = None

    def forget() -> None:
        """Solving and rounding take most of a fit's memory, and need no block."""
        for walk in (teacher, student):
            walk.forget()

    def store(path: str, values_OI: torch.Tensor, gram_II: torch.Tensor) -> FrozenWeight:
        if plan.matrix_codec == "nf4":
            values_OI = compensated(values_OI, gram_II)
        _, found[path] = round_trip(path, plan.matrix_codec, values_OI.to("cpu", torch.bfloat16).contiguous())
        return found[path]

    def reround(paths: Sequence[str]) -> dict[str, FrozenWeight]:
        matrices, grams = _inputs(student, layer, paths, states)
        forget()
        return {path: store(path, matrices.pop(path), grams[path]) for path in paths}

    def refit(path: str, count: int, wanted: Iterable[torch.Tensor]) -> dict[str, FrozenWeight]:
        nonlocal kept_K
        sums = _sums(student, layer, path, states, wanted)
        forget()
        neurons, (stay_K, V_KD, gram_KK) = sums.neurons, sums.solve(count)
        del sums
        weight = store(path, V_KD.T, gram_KK)
        if count < neurons:
            kept_K = stay_K.cpu()
            values_OI = torch.zeros(V_KD.shape[1], neurons, dtype=torch.bfloat16)
            values_OI[:, kept_K] = dense(weight, torch.bfloat16)
            weight = DenseWeight(values_OI)
        return {path: weight}

    with ExitStack() as fitted:

        def put(matrices: dict[str, FrozenWeight]) -> None:
            fitted.enter_context(student.storing(layer, matrices))

        if feed_forward is None:  # nor are the states in front of it known: all matrices are rounded, none is fitted
            for path in architecture.linears:
                put(reround([path]))
        else:
            others = {attention, *feed_forward.inputs, feed_forward.output}
            put(reround([path for path in architecture.linears if path not in others]))
            if attention:
                # With a silent feed-forward layer a block gives the states between the two.
                silent = [*feed_forward.inputs, feed_forward.output]
                with teacher.silent(layer, silent), student.silent(layer, silent):
                    between = (teacher.step(layer, hidden) for hidden in truth)
                    given = refit(attention, student.dense(layer, attention).shape[0], between)
                put(given)
            put(reround(feed_forward.inputs))
            put(refit(feed_forward.output, plan.widths[layer], after))
        states = [student.step(layer, hidden) for hidden in states]
    result = {}
    for path, weight in found.items():
        # Rounded once more for the package, scales move by a thousandth.
        values_OI = dense(weight, torch.bfloat16)
        is_narrowed = kept_K is not None and path in feed_forward.inputs
        result[f"{architecture.blocks}.{layer}.{path}.weight"] = values_OI[kept_K] if is_narrowed else values_OI
    return states, result if kept_K is None else result | {"neurons": kept_K.to(torch.int32)}


def _inputs(
    student: Walk, layer: int, paths: Sequence[str], states: list[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Some of a block's matrices (O, I) and the second moments of their inputs (I, I), by their paths."""
    grams: dict[str, torch.Tensor] = {}
    shares: dict[str, str] = {}  # path → the first that is given the same
    for hidden in states:
        given = student.inputs(layer, paths, hidden)
        shares = shares or {path: next(one for one in given if given[one] is x) for path, x in given.items()}
        for path in dict.fromkeys(shares.values()):
            x_NI = given[path].flatten(0, -2)
            gram_II = grams.setdefault(path, torch.zeros(x_NI.shape[-1], x_NI.shape[-1], device=x_NI.device))
            add_inputs(gram_II, x_NI, token_weights(x_NI.float()))
    return {path: student.dense(layer, path).T for path in paths}, {path: grams[shares[path]] for path in paths}


def _sums(
    student: Walk, layer: int, path: str, states: list[torch.Tensor], wanted: Iterable[torch.Tensor]
) -> NeuronFit:
    """What an output matrix is fitted to, that the block, given `states`, comes closer to `wanted`."""
    share = _share_added(student, layer, path, states[0])
    sums = NeuronFit(student.dense(layer, path))
    for hidden, target in zip(states, wanted, strict=True):
        a_NF, given = student.step_with_input(layer, path, hidden)
        y_ND = target.flatten(0, 1).float()
        e_ND = (y_ND - given.flatten(0, 1).float()) / share if share else None
        sums.add(a_NF.flatten(0, -2), e_ND, token_weights(y_ND))
    return sums


def _share_added(student: Walk, layer: int, path: str, hidden: torch.Tensor) -> float:
    """What share of a matrix' output the block just adds to its own; 0 where a norm stands between."""
    plain = student.step(layer, hidden).float()
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(plain.shape[-1], generator=generator).to(plain.device) * plain.square().mean().sqrt()
    with hooked(student.block(layer), path, lambda _, args, value: value + push.to(value.dtype)):
        moved = student.step(layer, hidden).float() - plain
    share = float((moved @ push).mean() / (push @ push))
    lost = (moved - share * push).square().sum() / moved.square().sum()
    return share if lost < _PROBE**2 else 0.0


class _Journal:
    """What is done of a fit: a file for each layer's results, and one with the states after the last of them."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._states = directory, directory / "states.safetensors"

    def resume(self) -> tuple[int, list[torch.Tensor], list[torch.Tensor]]:
        """How many layers are done, and the states of both models after them; none where a layer's file is missing."""
        if not self._states.exists():
            return 0, [], []
        with safe_open(self._states, framework="pt") as file:
            done = int(file.metadata()["done"])
            truth, states = (list(file.get_tensor(name).split(_TOGETHER)) for name in ("truth", "states"))
        if not all(self._file(layer).exists() for layer in range(done)):
            return 0, [], []
        return done, truth, states

    def truth(self) -> torch.Tensor:
        """The full model's states after the layer that was done last."""
        with safe_open(self._states, framework="pt") as file:
            return file.get_tensor("truth")

    def write(
        self,
        layer: int,
        result: dict[str, torch.Tensor],
        note: dict[str, str],
        truth: list[torch.Tensor],
        states: list[torch.Tensor],
    ) -> None:
        """A layer is done; the states come last, so that what they follow is there."""
        self._save({name: [tensor] for name, tensor in result.items()}, self._file(layer), note)
        self._save({"truth": truth, "states": states}, self._states, {"done": str(layer + 1)})

    def results(self) -> Fitted:
        """All of it; tensors are mapped from their files."""
        fitted = Fitted()
        for path in sorted(self._directory.glob("layer-*.safetensors")):
            layer = int(path.stem.rpartition("-")[2])
            with safe_open(path, framework="pt") as file:
                found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                note = file.metadata() or {}
            if "surrogate" in note:
                fitted.surrogates.append(SurrogateEntry.model_validate_json(note["surrogate"]))
                fitted.tensors.update(found)
            else:
                if "neurons" in found:
                    fitted.neurons[layer] = found.pop("neurons").long()
                fitted.matrices.update(found)
        return fitted

    def _file(self, layer: int) -> Path:
        """What a layer gave; there is one, be it empty, for each that is done."""
        return self._directory / f"layer-{layer:05}.safetensors"

    def _save(self, tensors: dict[str, list[torch.Tensor]], path: Path, metadata: dict[str, str]) -> None:
        """Write tensors that come in pieces, whole or not at all."""
        partial = path.with_suffix(".partial")
        # Wider types first, so that every tensor is aligned to its type when the file is mapped.
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1][0].dtype.itemsize))
        infos = {
            name: (pieces[0].dtype, (sum(map(len, pieces)), *pieces[0].shape[1:])) for name, pieces in ordered.items()
        }
        with SafetensorsWriter(partial, infos, metadata) as file:
            for name, pieces in ordered.items():
                for piece in pieces:
                    file.write(name, piece.cpu())
        sync(partial)
        os.replace(partial, path)
