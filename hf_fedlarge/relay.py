"""An aggregate that is itself an update: edges aggregate their clients' updates, a server aggregates the edges'.

Σ w_i P_i may be summed in any grouping, so with weights by tokens or examples the server ends with what it would have
made of all clients' updates at once, but for what an edge's rank left out. `ffa` and `alternate` leave out nothing.
Robust aggregators look at single clients, which the server no longer sees: an edge can use one, a server judges edges.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_fedlarge.artifacts import (
    CARRY_WEIGHTS,
    CONTROL_WEIGHTS,
    AdapterManifest,
    UpdateManifest,
    describe_files,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.keys import read_key, sign_update


def relay_update(
    adapter: Path, client: str, output: Path, *, key: Path | None = None, overwrite: bool = False
) -> UpdateManifest:
    """Make an update of an aggregate, as if one client had all the examples and tokens of those behind it.

    Args:
        adapter: made of one round's updates by `aggregate_updates`, without carry or server optimizer.
        client: the edge's name.
        output: the update directory to make.
        key: the edge's private key, which signs the update; None: it is not signed.
        overwrite: replace an update that is there already.

    Raises:
        ConfigError: `key` is no key.
        ArtifactError: not an aggregate of updates, or it has what an update can't hold.
        OutputError: `output` exists or can't be written.
    """
    private = read_key(key) if key else None
    made = read_manifest(adapter, AdapterManifest)
    verify_files(adapter, made)
    if made.privacy:
        raise ArtifactError(f"{adapter} has noise for privacy, which is added once, by the server that clients trust.")
    if not made.contributions:
        raise ArtifactError(f"{adapter} was not made of updates; expected what `hf-fedlarge aggregate` made of some.")
    if made.server_optimizer or {CARRY_WEIGHTS, CONTROL_WEIGHTS} & set(made.files):
        what = "a control variate" if CONTROL_WEIGHTS in made.files else f"the averages of {made.server_optimizer}"
        what = "a carry" if CARRY_WEIGHTS in made.files else what
        raise ArtifactError(
            f"{adapter} has {what}, which stays with a server; aggregate with svd, ffa, alternate or fedavg and no "
            "server optimizer where the result goes on as an update."
        )
    with staged_directory(output, overwrite=overwrite) as staging:
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            shutil.copyfile(adapter / name, staging / name)
        manifest = UpdateManifest(
            files=describe_files(staging),
            client=client,
            round=made.round,
            package=made.package,
            adapter=made.parent,
            lora=made.lora,
            examples=sum(entry.examples for entry in made.contributions),
            tokens=sum(entry.tokens for entry in made.contributions),
        )
        write_manifest(staging, manifest)
        if private:
            sign_update(staging, manifest, private)
    return manifest
