"""An adapter and its carry as one adapter of a higher rank, for peft and what serves its adapters."""

from __future__ import annotations

import json
from pathlib import Path

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterWriter, read_state
from hf_fedlarge.artifacts import (
    CARRY_WEIGHTS,
    UNPUBLISHED_FILES,
    AdapterManifest,
    read_manifest,
    staged_directory,
    verify_files,
    write_json,
)
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.merge import check_carry
from hf_fedlarge.tensors import read_header
from hf_fedlarge.untrusted import printable

_README = """\
# A LoRA adapter of rank {rank}

For the model `{base}`. It is the adapter {digest} of a federation's round {round} together with what that one's rank
had no room for (`carry.safetensors`), written by `hf-fedlarge export` as one adapter that peft loads by itself:

```python
model = PeftModel.from_pretrained(base, directory)
```

It is for serving. `hf-fedlarge merge`, `evaluate`, `push` and the next round take the adapter that it was made of.
"""


def export_adapter(adapter: Path, output: Path) -> LoraSettings:
    """Write an adapter and its carry as a directory of peft's: A's above each other, B's side by side, zeros behind.

    It gets no manifest, so that nothing here takes it for an adapter that a round left.

    Args:
        adapter: an adapter of ours.
        output: the directory to make.

    Returns:
        The settings of what was written.

    Raises:
        ArtifactError: not an adapter, or damaged.
        OutputError: `output` exists, or can't be written.
    """
    manifest = read_manifest(adapter, AdapterManifest)
    with staged_directory(output) as staging:
        verify_files(adapter, manifest, published=True, unneeded=UNPUBLISHED_FILES)
        if CARRY_WEIGHTS in manifest.files:
            shapes = {name: info.shape for name, info in read_header(adapter / ADAPTER_WEIGHTS).items()}
            check_carry(adapter, shapes.keys(), shapes)
        lora, factors = read_state(adapter, manifest.lora)
        config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        changed = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
        write_json(staging / ADAPTER_CONFIG, config | changed)
        with AdapterWriter(staging) as writer:
            for module in sorted(factors):
                writer.write(module, factors[module])
        base, digest = printable(manifest.base.id).replace("`", "'"), manifest.digest[:12]
        text = _README.format(rank=lora.rank, base=base, digest=digest, round=manifest.round)
        (staging / "README.md").write_text(text, encoding="utf-8")
    return lora
