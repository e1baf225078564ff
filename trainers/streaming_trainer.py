"""A trl SFTTrainer for streamed models.

From trl come data preparation (chat templates, completion- and assistant-only loss), packing, optimizers, schedules,
logging, checkpoints and data parallelism. What changes:

- Gradient accumulation happens inside the engine's visits: the loop hands the model all micro-batches of an optimizer
  step at once, and each block computes them one after the other with the matrices it dequantized once. Where trl lays
  a batch in one row (padding-free) and the family's attention can't be taken apart (GPT-J, Falcon, Bloom, Gemma 2),
  transformers accumulates as it always does, and every micro-batch costs a pair of dequantizations of its own.
- The loss comes from the model, slice by slice of the vocabulary, not from trl's fused head, which needs a dense one.
- Recomputation is the engine's, so gradient checkpointing is off.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_fedlarge.budget import parse_bytes
from hf_fedlarge.data import FORMS, TOOLS, from_tokens, list_lengths
from hf_fedlarge.encoding import IGNORED, encode_example, warn_of_cut
from hf_fedlarge.errors import ConfigError, OutputError
from hf_fedlarge.memory import give_back_freed_memory
from hf_fedlarge.package import save_adapter
from hf_fedlarge.positions import check_length

logger = logging.getLogger(__name__)

# What rests on dense logits or weights, which a streamed model has not, or would recompute its blocks once more.
_UNSUPPORTED = {
    "label_smoothing_factor": 0.0,
    "loss_type": "nll",
    "use_liger_kernel": False,
    "activation_offloading": False,
    "torch_compile": False,
    "fp16": False,
    "auto_find_batch_size": False,
    "activation_checkpointing": False,
}
_NO_LOGITS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
# With these, `encode_example` does what trl's preparation does.
_PLAIN = {
    "assistant_only_loss": False,
    "completion_only_loss": None,
    "dataset_num_proc": None,
    "dataset_text_field": "text",
    "truncation_mode": "keep_start",
}


def _cut_at(args: SFTConfig, packing: bool) -> int | None:
    """The tokens that are left of a longer example; None: all are. Of the ways to pack one cuts."""
    return None if packing and args.packing_strategy != "bfd" else args.max_length


@dataclass
class StreamingLoraConfig(SFTConfig):
    """trl's SFTConfig with defaults for LoRA on a client; every argument of it may be given.

    `per_device_train_batch_size` sequences are computed at a time, `gradient_accumulation_steps` times, for a step.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "LoRA wants ten times what full fine-tuning does."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "A round is short and others follow it."})
    activation_checkpointing: bool | None = field(default=False, metadata={"help": "The engine recomputes already."})
    report_to: str = field(default="none", metadata={"help": "Where to report; nowhere unless asked."})
    save_steps: float = field(default=50, metadata={"help": "Steps between checkpoints, for resuming."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept while training."})
    include_num_input_tokens_seen: str = field(default="non_padding", metadata={"help": "Counts tokens; leave it."})
    memory_budget: str | None = field(
        default=None,
        metadata={"help": "What this process may take of the GPU's memory, or of the machine's, such as 2GiB."},
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Batches of token ids are tiny."})

    def __post_init__(self) -> None:
        for name, supported in _UNSUPPORTED.items():
            if (getattr(self, name) or supported) != supported:
                raise ConfigError(
                    f"--{name} {getattr(self, name)} can't be used with a streamed model, which has no dense "
                    f"logits or weights and recomputes its blocks itself; leave it at {supported}."
                )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        # Without CUDA transformers would choose another accelerator it finds, on which the engine was never tested.
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()


class StreamingLoraTrainer(SFTTrainer):
    """Trains the LoRA adapters of a streamed model.

    Args:
        model: from `load_package` and `attach_lora`.
        args: its batch and accumulation are moved to `engine.micro_batch_size`, where the engine can divide batches.
        proximal: FedProx's μ (arXiv 1812.06127): the loss gains μ/2 ‖w − w₀‖² over the trainable factors, w₀ being
            their values now. Clipping sees the gradient of the sum, the logged loss is without it.
        kwargs: as for SFTTrainer, but for what needs logits.

    Raises:
        ConfigError: an argument that needs logits, a `max_length` for which the model has no positions, or a memory
            budget that is too small: now, or in the first batch where it is for the largest one.
    """

    _saves_checkpoint = False

    def __init__(self, model: PeftModel, args: StreamingLoraConfig, proximal: float = 0.0, **kwargs: Any) -> None:
        for name in _NO_LOGITS:
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name} needs logits, which a streamed model doesn't make in training; leave it out."
                )
        check_length(model.architecture.model_type, model.architecture.positions, args.max_length)
        model.engine.micro_batch_size = args.per_device_train_batch_size
        # Where a batch is one row, only an engine that takes it apart again can compute it in pieces.
        one_row = args.padding_free or (args.packing and args.packing_strategy.startswith("bfd"))
        if model.engine.takes_apart or not one_row:
            args.per_device_train_batch_size *= args.gradient_accumulation_steps
            args.gradient_accumulation_steps = 1
        # transformers would put several GPUs of one process under DataParallel, whose replicas share the engine's only
        # arena. `n_gpu` is read first because its first reading sets it.
        if args.n_gpu > 1:
            args._n_gpu = 1
        if args.world_size > 1:
            frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            buffers = [name for name, _ in model.named_buffers()]
            # Frozen weights are the same everywhere and hold placeholders: there is nothing to broadcast.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
        super().__init__(model=model, args=args, **kwargs)
        if args.memory_budget is not None:
            give_back_freed_memory()  # what making tokens took
            model.engine.set_memory_budget(parse_bytes(args.memory_budget), self._largest_batch(one_row))
        # Now, as training may begin by loading a checkpoint.
        self._proximal, self._centre = proximal, []
        if proximal:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._centre = [(parameter, parameter.detach().clone()) for parameter in trainable]

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """As trl does, but that plain examples become tokens at once.

        trl takes five passes through Arrow, and a fingerprint of the whole tokenizer for each, which takes longer than
        a step of a small client. A test compares the two.

        Examples without a labelled token within `max_length` are left out, and longer ones are cut, which is said. Of
        the training data `labelled_examples` is afterwards how many have one, `example_lengths` how many tokens each
        has as a whole.
        """
        if not hasattr(dataset, "__len__"):  # a stream
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        is_plain = formatting_func is None and all(getattr(args, name) == value for name, value in _PLAIN.items())
        if not is_plain or set(dataset.column_names or ()) - {TOOLS} not in map(set, FORMS):
            whole = copy(args)  # for lengths
            whole.max_length, whole.shuffle_dataset = None, False
            tokens = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
            prepared = super()._prepare_dataset(tokens, processing_class, args, packing, None, dataset_name)
            labelled = len(tokens if packing else prepared)
            self._count(labelled, list_lengths(tokens, "input_ids"), args, packing, dataset_name)
            return prepared
        longest, within = None if packing else args.max_length, _cut_at(args, packing)
        labelled, lengths = 0, array("I")

        def encoded() -> Iterator[dict[str, list[int]]]:
            nonlocal labelled
            for row in dataset:
                tokens = encode_example(row, processing_class, None)
                lengths.append(len(tokens["input_ids"]))
                counts = any(label != IGNORED for label in tokens["labels"][:within])
                labelled += counts
                if counts or packing:
                    yield {name: values[:longest] for name, values in tokens.items()}

        tokens = from_tokens(encoded())
        self._count(labelled, lengths, args, packing, dataset_name)
        if len(tokens):
            dataset = tokens
            if not packing:
                return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _count(self, labelled: int, lengths: Sequence[int], args: SFTConfig, packing: bool, dataset_name: str) -> None:
        if dataset_name == "train":
            self.labelled_examples, self.example_lengths = labelled, lengths
        if args.process_index != 0:
            return
        given, within = len(lengths), _cut_at(args, packing)
        if within is not None and (cut := sum(length > within for length in lengths)):
            warn_of_cut(cut, given, dataset_name, within)
        if 0 < labelled < given:
            logger.warning(
                "%d of %d examples (%s) have no labelled token within max_length (%s) tokens and are left out.",
                given - labelled,
                given,
                dataset_name,
                args.max_length,
            )

    def _largest_batch(self, one_row: bool) -> list[int]:
        """Lengths of the sequences in the largest batch there can be, as a block computes it; empty where unknown.

        `one_row`: whether a batch is laid in one row.
        """
        data = self.train_dataset
        if not hasattr(data, "__len__") or not len(data) or "input_ids" not in getattr(data, "column_names", ()):
            return []
        rows = sorted(list_lengths(data, "input_ids"))[-self.args.train_batch_size :]
        if not self.model.engine.takes_apart:
            return [sum(rows)] if one_row else [rows[-1]] * len(rows)
        if self.args.neftune_noise_alpha is not None:
            return [rows[-1]] * len(rows)
        if "seq_lengths" not in data.column_names:
            return rows
        longest, total = max(map(max, data["seq_lengths"])), sum(rows)
        return [longest] * (total // longest) + [total % longest]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Loss and gradient of a batch; the proximal term's gradient comes once an optimizer step, without a graph."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for parameter, centre in self._centre:
                parameter.grad.add_(parameter.detach() - centre, alpha=self._proximal)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss. Across processes gradients are averaged, so their share is scaled up to a sum."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What `save_model` writes: the adapter of the full model. A checkpoint to resume from has the package's."""
        if self._saves_checkpoint:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _push_from_checkpoint(self, *args: Any) -> None:
        """Nothing: a checkpoint's adapter fits the package alone. `push_to_hub` pushes what `save_model` writes."""

    def _save_checkpoint(self, *args: Any) -> None:
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(*args)
        except (SafetensorError, RuntimeError) as error:
            # What safetensors and torch make of a full disk: no OSError.
            cause = str(error).partition("\n")[0]
            raise OutputError(
                f"A checkpoint in {self.args.output_dir} could not be written: {cause}; look for free space there."
            ) from error
        finally:
            self._saves_checkpoint = False

    def _send_telemetry(self) -> None:
        """Nothing: trl would report each training to its authors from a thread of its own. A client calls nobody."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a training checkpoint is no publication."""
