"""How long sequences may be. Some families have a table of positions, behind whose end nothing can be computed.

Most have none and compute positions of any number (rotary embeddings); their `max_position_embeddings` says only how
long the sequences were that they were trained on.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from hf_fedlarge.errors import ConfigError

_RESERVED = 2  # rows that OPT's table has before the first position


def count_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has a table of, be it trained (GPT-2, OPT) or computed (GPT-J); None: no table."""
    count = getattr(model.config, "max_position_embeddings", None)
    if count is None:
        return None
    tokens = model.get_input_embeddings()
    trained = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    is_table = any(0 <= table.num_embeddings - count <= _RESERVED for table in trained)
    is_table = is_table or any(buffer.dim() == 2 and len(buffer) == count for buffer in model.buffers())
    return count if is_table else None


def check_length(model_type: str, positions: int | None, max_length: int | None) -> None:
    """Refuse sequences for which a model has no positions.

    Args:
        model_type: the family.
        positions: from `count_positions`.
        max_length: tokens that examples are cut at; None: they aren't.

    Raises:
        ConfigError: `max_length` is more than there are positions.
    """
    if positions is not None and (max_length is None or max_length > positions):
        raise ConfigError(
            f"This {model_type} model has positions for {positions} tokens, but max_length is {max_length}; give a "
            f"max_length of {positions} or less."
        )
