"""Model cards: what a published artifact is, told only with figures from its manifest and its run's summary.

A figure that neither of them holds is printed as "not recorded". The templates, in `model_cards/`, are prose; every
value they print passes `_print`, which escapes Markdown and HTML, so that no client's name can break out of a table.

Left out: benchmarks, dates and the author's name (a card has to be the same for the same artifact), and evaluation
results as YAML metadata, which the Hub would show as if somebody had verified them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from hf_fedlarge.artifacts import (
    CARRY_WEIGHTS,
    UNPUBLISHED_FILES,
    AdapterManifest,
    CheckpointManifest,
    PackageManifest,
    manifest_kind,
    read_manifest,
)
from hf_fedlarge.entries import BaseModelEntry, Contribution
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.layers import format_ranges
from hf_fedlarge.ledger import PrivacyEntry
from hf_fedlarge.summary import ClientRow, PackageFacts, Summary, read_summary

MARKER = "<!-- written by hf-fedlarge -->"
# By whether updates were securely aggregated; None: nobody wrote it down.
_SEEN = {
    False: "Updates were not encrypted or securely aggregated.",
    True: "Updates were securely aggregated: a server that kept to the protocol saw a round's sum, and no single one.",
    None: "Whether updates were securely aggregated is not recorded.",
}
NOT_RECORDED = "not recorded"
_PRIVACY = "Differential privacy: {known}. {seen}Dropping layers and quantizing protects nothing by itself."
PRIVACY = _PRIVACY.format(known="none", seen=f"{_SEEN[False]} ")
_PRIVATE = (
    "Differential privacy of each client as a whole, one replaced by any other: {spent}, after {rounds}. Changes were "
    "clipped to the norm {clip:g}; the noise multiplier was {noise:g}; rounds asked {draws}. That holds against who "
    "sees adapters, not against the server, nor against who learned whom a round asked. {seen} Losses "
    "on held-out data and the number of answers are not covered. No single client's figures are on this card. Dropping "
    "layers and quantizing protects nothing by itself."
)

PublishedManifest = PackageManifest | AdapterManifest | CheckpointManifest
PUBLISHED_KINDS: dict[str, type[PackageManifest] | type[AdapterManifest] | type[CheckpointManifest]] = {
    "package": PackageManifest,
    "adapter": AdapterManifest,
    "checkpoint": CheckpointManifest,
}

# A run of a thousand clients has tables nobody reads; the rest is counted, not printed.
_MAX_ROWS = 300
_MAX_TEXT = 300

# The Hub refuses a card whose `license` is not an identifier of its list, so any other becomes `other` with a name.
# https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
    """.split()  # noqa: SIM905 (one word a line would take a page)
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_RELATIONS = {"package": "quantized", "adapter": "adapter", "checkpoint": "finetune"}
_CODECS = {
    "nf4": "4-bit NormalFloat in blocks of 64, their scales quantized again",
    "int8": "8-bit integers",
    "dense": "not quantized",
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~#!&$])")


def render_card(directory: Path, repo_id: str, summary: dict[str, Any] | None) -> str:
    """The model card of a package, an adapter or a merged checkpoint, as Markdown with YAML front matter.

    Args:
        directory: the artifact; only its manifest is read.
        repo_id: the Hub repository the card is for, `owner/name`.
        summary: the run's `summary.json`, if there is one.

    Raises:
        ArtifactError: the directory is not an artifact that can be published, or the summary holds a wrong type or is
            another's.
    """
    manifest = read_published(directory)
    run = read_summary(summary or {})
    _check_belongs(directory, manifest, run)
    facts = {"package": _package_facts, "adapter": _adapter_facts, "checkpoint": _checkpoint_facts}[manifest.kind]
    contributions, cut = _contributions(manifest, run)
    private = manifest.privacy if isinstance(manifest, AdapterManifest) else run.privacy
    refusals = [] if private else [(entry.round, refusal) for entry in run.rounds for refusal in entry.refused]
    return (
        _environment()
        .get_template(f"{manifest.kind}.md.jinja")
        .render(
            front_matter=Markup(_front_matter(manifest)),  # safe_dump has quoted it
            marker=Markup(MARKER),
            privacy=_privacy(private, manifest, run),
            private=private is not None,
            repo_id=repo_id,
            manifest=manifest,
            base=manifest.base,
            base_on_hub=_is_hub_id(manifest.base),
            run=run,
            summarized=summary is not None,
            facts=[*_base_facts(manifest), *facts(manifest, run)],
            clients=contributions,
            clients_cut=cut,
            refusals=refusals[:_MAX_ROWS],
            refusals_cut=max(0, len(refusals) - _MAX_ROWS),
        )
    )


def read_published(directory: Path) -> PublishedManifest:
    """The manifest of a package, adapter or merged checkpoint.

    Raises:
        ArtifactError: the directory is none of the three, or its manifest doesn't hold together.
    """
    kind = manifest_kind(directory)
    if kind not in PUBLISHED_KINDS:
        found = f"is of kind {kind!r}" if kind else "has no manifest of hf-fedlarge (fedlarge.json)"
        raise ArtifactError(f"{directory} {found}; only a package, an adapter or a merged checkpoint is published.")
    return read_manifest(directory, PUBLISHED_KINDS[kind])


def _check_belongs(directory: Path, manifest: PublishedManifest, run: Summary) -> None:
    """A summary's figures are those of one adapter, and of what was merged from it."""
    if run.adapter is None or isinstance(manifest, PackageManifest):
        return
    own = manifest.digest if isinstance(manifest, AdapterManifest) else manifest.adapter
    if run.adapter != own:
        what = "is" if isinstance(manifest, AdapterManifest) else "was merged from"
        raise ArtifactError(
            f"The summary is of a run that ended with the adapter {run.adapter:.12}…, but {directory} {what} "
            f"{own[:12]}…; give the summary of the run that made it, or none."
        )


def _is_secure(manifest: PublishedManifest, run: Summary) -> bool | None:
    """Whether the server saw sums of updates alone; None: who looks at this can't know."""
    if run.rounds:
        return all(entry.secure is not None for entry in run.rounds)
    # An adapter that names what went into it was made of updates that somebody saw.
    return False if isinstance(manifest, AdapterManifest) and manifest.contributions else None


def _privacy(entry: PrivacyEntry | None, manifest: PublishedManifest, run: Summary) -> str:
    seen = _SEEN[_is_secure(manifest, run)]
    if entry is None:
        # Of a merged checkpoint only the run's summary says it; a package is made before any update is.
        unknown = isinstance(manifest, CheckpointManifest) and "privacy" not in run.model_fields_set
        none = isinstance(manifest, PackageManifest) and not run.rounds
        return _PRIVACY.format(known=NOT_RECORDED if unknown else "none", seen="" if none else f"{seen} ")
    rounds = sum(draw.rounds for draw in entry.draws)
    return _PRIVATE.format(
        seen=seen,
        spent=entry.sentence,
        rounds="1 round" if rounds == 1 else f"{rounds} rounds",
        clip=entry.clip,
        noise=entry.noise_multiplier,
        draws=" or ".join(f"{draw.cohort} of {draw.of} clients" for draw in entry.draws) or "none",
    )


def _base_facts(manifest: PublishedManifest) -> list[tuple[str, Any]]:
    base, link = manifest.base, _license_link(manifest)
    local = None if _is_hub_id(base) else "none: the base was a local directory, not a Hub repository"
    return [
        ("base model", _code(base.id)),
        ("revision of the base", _code(base.revision) if base.revision else local),
        ("digest of the base's weights (SHA-256)", _code(base.digest)),
        ("license of the base", f"{base.license}: {link}" if link else base.license),
    ]


def _package_facts(manifest: PackageManifest, run: Summary) -> list[tuple[str, Any]]:
    kept, every = manifest.kept_layers, [entry.layer for entry in manifest.layers]
    counts = Counter(manifest.codecs.values())
    return [
        ("layers kept", f"{len(kept)} of {len(every)}: {format_ranges(kept)}"),
        ("layers dropped", format_ranges(set(every) - set(kept))),
        ("neurons kept in their feed-forward layers", _neurons(manifest)),
        (
            "surrogates, and what they leave unexplained",
            "; ".join(
                f"for {format_ranges(entry.layers)} ({_CODECS[entry.codec]}): {entry.unexplained:.0%}"
                for entry in manifest.surrogates
            )
            or "none",
        ),
        ("corrections of its matrices", _healed(manifest)),
        ("embeddings", manifest.embeddings),
        (
            "codecs, and how many weights",
            "; ".join(f"{name} ({_CODECS[name]}): {counts[name]}" for name in sorted(counts)),
        ),
        ("size", _bytes(manifest.total_bytes)),
        ("digest of this package", _code(manifest.digest)),
    ]


def _healed(manifest: PackageManifest) -> str:
    if (healed := manifest.healed) is None:
        return "none"
    moved = f"from {healed.without:.3g} to {healed.divergence:.3g} nats a token"
    return f"of rank {healed.rank}; they bring KL(full model ‖ package) on calibration text {moved}"


def _neurons(manifest: PackageManifest) -> str:
    counts = sorted({entry.neurons for entry in manifest.layers if entry.neurons is not None})
    whole = [entry.layer for entry in manifest.layers if entry.neurons is None and entry.block is not None]
    if not counts:
        return "all"
    some = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{some}; all in {format_ranges(whole)}" if whole else some


def _adapter_facts(manifest: AdapterManifest, run: Summary) -> list[tuple[str, Any]]:
    lora, carried = manifest.lora, f"{manifest.energy_carried:.3g}"
    return [
        ("round", manifest.round),
        ("layers with an adapter", f"{len(manifest.layers)}: {format_ranges(manifest.layers)}"),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, scale {lora.scale:g}{' (rsLoRA)' if lora.rslora else ''}"),
        ("LoRA targets", ", ".join(lora.targets) if lora.targets else None),
        ("aggregator", manifest.aggregator or run.aggregator),
        ("weighting", manifest.weighting),
        ("energy dropped by truncation", f"{manifest.energy_dropped:.3g}"),
        *([(f"energy in {CARRY_WEIGHTS}, which peft leaves out", carried)] if CARRY_WEIGHTS in manifest.files else []),
        ("size", _bytes(sum(entry.size for name, entry in manifest.files.items() if name not in UNPUBLISHED_FILES))),
        ("digest of the package trained on", _code(manifest.package)),
        ("digest of the adapter before this round", _code(manifest.parent) if manifest.parent else "none: the first"),
        ("digest of this adapter", _code(manifest.digest)),
    ]


def _checkpoint_facts(manifest: CheckpointManifest, run: Summary) -> list[tuple[str, Any]]:
    return [
        *_clients_copy(run.package),
        ("rounds", len(run.rounds) or None),
        ("weights changed", len(manifest.merged)),
        ("aggregator", run.aggregator),
        ("size", _bytes(manifest.total_bytes)),
        ("digest of the adapter folded in", _code(manifest.adapter)),
        ("digest of this checkpoint", _code(manifest.digest)),
    ]


def _clients_copy(package: PackageFacts | None) -> list[tuple[str, Any]]:
    """What the clients had of the model while they trained."""
    if package is None:
        return [("layers that the clients had", None), ("codec of the clients' copy", None)]
    kept = f"{len(package.kept)} of {package.layers}: {format_ranges(package.kept)}"
    codec = f"{_CODECS['nf4']}; embeddings {package.embeddings}"
    return [("layers that the clients had", kept), ("codec of the clients' copy", codec)]


def _contributions(manifest: PublishedManifest, run: Summary) -> tuple[list[tuple[int | None, Any]], int]:
    """(round, client) rows of the run, else those of the adapter's own round, and how many rows were cut."""
    rows: list[tuple[int | None, ClientRow | Contribution]]
    rows = [(entry.round, client) for entry in run.rounds for client in entry.clients]
    if not rows and isinstance(manifest, AdapterManifest):
        rows = [(manifest.round, contribution) for contribution in manifest.contributions]
    return rows[:_MAX_ROWS], max(0, len(rows) - _MAX_ROWS)


def _front_matter(manifest: PublishedManifest) -> str:
    metadata: dict[str, Any] = {}
    if _is_hub_id(manifest.base):
        metadata["base_model"] = manifest.base.id
        metadata["base_model_relation"] = _RELATIONS[manifest.kind]
    metadata["library_name"] = "peft" if manifest.kind == "adapter" else "transformers"
    if manifest.base.license:
        identifier = manifest.base.license.strip().lower()
        if identifier in _HUB_LICENSES and manifest.base.license_link is None:
            metadata["license"] = identifier
        else:
            metadata["license"] = "other"
            if identifier != "other":
                metadata["license_name"] = re.sub(r"[^a-z0-9.]+", "-", identifier)[:80].strip("-") or "unnamed"
            if link := _license_link(manifest):
                metadata["license_link"] = link
    metadata["tags"] = ["hf-fedlarge", "federated-learning", "lora", f"hf-fedlarge-{manifest.kind}"]
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _license_link(manifest: PublishedManifest) -> str | None:
    """Where the base's own licence is to be read: beside its weights, if that is a file which doesn't come along."""
    base, link = manifest.base, manifest.base.license_link
    if link is None or link in manifest.files or re.match(r"https?://", link):
        return link
    return f"https://huggingface.co/{base.id}/blob/{base.revision or 'main'}/{link}" if _is_hub_id(base) else None


def _is_hub_id(base: BaseModelEntry) -> bool:
    """Whether the base is a Hub repository: it has a revision, or an owner. A local directory's name has neither."""
    return _HUB_ID.fullmatch(base.id) is not None and (base.revision is not None or "/" in base.id)


def _environment() -> Environment:
    directory = files("hf_fedlarge.model_cards")
    environment = Environment(
        loader=FunctionLoader(lambda name: (directory / name).read_text(encoding="utf-8")),
        finalize=_print,  # in autoescape's place, which knows HTML but not Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(bytes=_bytes, loss=_loss, seconds=_seconds, share=_share, code=_code, literal=_literal)
    return environment


def _print(value: Any) -> str:
    """What a template prints for `value`: all text is escaped, save what this module marked as finished."""
    if value is None:
        return NOT_RECORDED
    if isinstance(value, Markup):
        return str(value)
    escaped = _MARKDOWN.sub(r"\\\1", _one_line(str(value)))
    return escaped.replace("://", ":\\//")  # or GitHub's Markdown turns an address into a link


def _one_line(text: str) -> str:
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def _code(text: str) -> Markup:
    # Backslashes do not escape inside `code`, so what would end it, or a table's cell, is replaced.
    cleaned = _one_line(text).replace("`", "'").replace("|", "/")
    return Markup(f"`{cleaned}`")


def _literal(text: str) -> Markup:
    """A Python string literal for a code block; it has no newline, so it can't close the block."""
    return Markup(json.dumps(_one_line(text)))


def _bytes(count: int | None) -> str | None:
    if count is None:
        return None
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while abs(size) >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} s"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def read_license(checkpoint: Path) -> tuple[str | None, str | None]:
    """The licence that the checkpoint's model card declares, where it is `other` by its name; and the link to that."""
    card = checkpoint / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        header = None
    keys = ("license", "license_name", "license_link")
    found, name, link = (header.get(key) if isinstance(header, dict) else None for key in keys)
    if not isinstance(found, str):
        return None, None
    if found.strip().lower() != "other":
        return found, None
    return name if isinstance(name, str) else found, link if isinstance(link, str) else None
