import importlib
import re
from itertools import pairwise

import pytest
import yaml
from markdown_it import MarkdownIt

from hf_fedlarge.artifacts import (
    AdapterManifest,
    CheckpointManifest,
    PackageManifest,
    UpdateManifest,
    describe_files,
    read_manifest,
    write_manifest,
)
from hf_fedlarge.cards import MARKER, PRIVACY, format_ranges, render_card
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.entries import BaseModelEntry, Contribution, HealedEntry, LayerEntry, SurrogateEntry
from hf_fedlarge.errors import ArtifactError

BASE = BaseModelEntry(id="org/base", revision="b" * 40, digest="0" * 64, license="apache-2.0")
SUMMARY = {
    "loss": {"base": 3.408, "package": 3.934, "merged": 2.906},
    "rounds": [
        {
            "round": 1,
            "loss_small": 3.5,
            "loss_full": 3.1,
            "bytes_down_per_client": 4_000_000,
            "bytes_up_per_client": 2_500_000,
            "seconds": 61.25,
            "clients": [
                {"client": "anna", "weight": 0.75, "examples": 30, "tokens": 900},
                {"client": "ben", "weight": 0.25, "examples": 10, "tokens": 300},
            ],
            "refused": [{"client": "eve", "reason": "/home/eve/mine.jsonl: no space left; s3://bucket/inbox"}],
        }
    ],
    "bytes_down": 8_000_000,
    "bytes_up": 5_000_000,
    "seconds": 61.25,
    "peak_memory_bytes": 911_000_000,
    "data": "docstrings of the standard library",
    "aggregator": "exact",
    "held_out_examples": 64,
}


def make_artifact(directory, kind, files, **fields):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    fields.setdefault("base", BASE)
    write_manifest(directory, kind(files=describe_files(directory), **fields))
    return directory


def make_package(directory, embeddings="int8", **fields):
    files = {"config.json": b"{}", "model.safetensors": b"four bits", "tokenizer.json": b"{}"}
    layers = [LayerEntry(layer=0, block=0), LayerEntry(layer=1, block=1), LayerEntry(layer=2, block=None)]
    fields = {"model_type": "llama", "layers": [*layers, LayerEntry(layer=3, block=2)]} | fields
    codecs = {"a": "nf4", "b": "nf4", "norm": "dense"}
    return make_artifact(directory, PackageManifest, files, embeddings=embeddings, codecs=codecs, **fields)


def make_adapter(directory, weights=b"adapter", files=(), **fields):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": weights, **dict(files)}
    contributions = [Contribution(client="carla", digest="c" * 64, weight=1.0, examples=8, tokens=80)]
    fields = {"parent": None, "round": 4, "layers": [0, 1, 3], "contributions": contributions} | fields
    lora = LoraSettings(rank=8, alpha=16.0, targets=["q_proj"])
    common = {"package": "d" * 64, "lora": lora, "aggregator": "exact", "weighting": "examples"}
    return make_artifact(directory, AdapterManifest, files, **common, **fields)


def make_checkpoint(directory, files=(), **fields):
    files = {"config.json": b"{}", "model.safetensors": b"sixteen bits", **dict(files)}
    merged = ["model.layers.0.q.weight", "model.layers.3.q.weight"]
    return make_artifact(directory, CheckpointManifest, files, adapter="e" * 64, merged=merged, **fields)


def metadata(card):
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def rows(card):
    """Each table row of the card as a browser would show it: cells as text, in order."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    cells = [
        (token.map, "".join(child.content for child in token.children))
        for before, token in pairwise(tokens)
        if before.type in ("td_open", "th_open")
    ]
    table = {}
    for line, text in cells:
        table.setdefault(line[0], []).append(text)
    return list(table.values())


def test_package_card_tells_layers_codecs_and_base(tmp_path):
    card = render_card(make_package(tmp_path / "p"), "me/small", None)
    assert metadata(card) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["hf-fedlarge", "federated-learning", "lora", "hf-fedlarge-package"],
    }
    facts = {row[0]: row[1] for row in rows(card) if len(row) == 2}
    assert facts["layers kept"] == "3 of 4: 0-1, 3"
    assert facts["layers dropped"] == "2"
    assert facts["embeddings"] == "int8"
    assert facts["corrections of its matrices"] == "none"
    assert facts["codecs, and how many weights"] == (
        "dense (not quantized): 1; nf4 (4-bit NormalFloat in blocks of 64, their scales quantized again): 2"
    )
    assert facts["revision of the base"] == BASE.revision
    assert facts["digest of the base's weights (SHA-256)"] == BASE.digest
    assert facts["size"] == "13 B"
    assert MARKER in card
    assert "Differential privacy: none. Dropping layers" in card  # of updates there are none
    assert "## Rounds" not in card
    trained = render_card(tmp_path / "p", "me/small", {"rounds": [{"round": 1}], "privacy": None})
    assert PRIVACY in trained


@pytest.mark.parametrize(
    ("embeddings", "line"),
    [
        ("bf16", 'AutoModelForCausalLM.from_pretrained("me/small")'),
        ("int8", 'load_package(snapshot_download("me/small"))'),
        ("nf4", 'load_package(snapshot_download("me/small"))'),
    ],
)
def test_package_card_says_how_to_load_it(tmp_path, embeddings, line):
    card = render_card(make_package(tmp_path / "p", embeddings), "me/small", None)
    assert line in card
    assert ("from hf_fedlarge import" in card) == (embeddings != "bf16")


def test_package_card_tells_of_surrogates(tmp_path):
    surrogates = [SurrogateEntry(layers=[2], codec="nf4", unexplained=0.456)]
    card = render_card(make_package(tmp_path / "p", "bf16", surrogates=surrogates), "me/small", None)
    facts = {row[0]: row[1] for row in rows(card) if len(row) == 2}
    described = "for 2 (4-bit NormalFloat in blocks of 64, their scales quantized again): 46%"
    assert facts["surrogates, and what they leave unexplained"] == described
    # Stock transformers would leave them out.
    assert "AutoModelForCausalLM" not in card
    assert 'load_package(snapshot_download("me/small"))' in card


def test_package_card_tells_of_neurons(tmp_path):
    layers = [LayerEntry(layer=0, block=0, neurons=1024), LayerEntry(layer=1, block=1, neurons=512)]
    card = render_card(make_package(tmp_path / "p", "bf16", layers=layers), "me/small", None)
    facts = {row[0]: row[1] for row in rows(card) if len(row) == 2}
    assert facts["neurons kept in their feed-forward layers"] == "512 to 1024"
    assert "AutoModelForCausalLM" not in card
    layers += [LayerEntry(layer=2, block=None), LayerEntry(layer=3, block=2), LayerEntry(layer=4, block=3)]
    card = render_card(make_package(tmp_path / "whole", "bf16", layers=layers), "me/small", None)
    assert ["neurons kept in their feed-forward layers", "512 to 1024; all in 3-4"] in rows(card)
    plain = render_card(make_package(tmp_path / "q", "bf16"), "me/small", None)
    assert ["neurons kept in their feed-forward layers", "all"] in rows(plain)
    assert "AutoModelForCausalLM" in plain


def test_package_card_tells_of_corrections(tmp_path):
    healed = HealedEntry(rank=8, without=0.51234, divergence=0.3)
    card = render_card(make_package(tmp_path / "p", "bf16", healed=healed), "me/small", None)
    facts = {row[0]: row[1] for row in rows(card) if len(row) == 2}
    assert facts["corrections of its matrices"].startswith("of rank 8;")
    assert "from 0.512 to 0.3 nats a token" in facts["corrections of its matrices"]
    assert "AutoModelForCausalLM" not in card


def test_adapter_card_without_a_summary_uses_the_manifest_and_invents_nothing(tmp_path):
    card = render_card(make_adapter(tmp_path / "a"), "me/adapter", None)
    head = metadata(card)
    assert (head["base_model_relation"], head["library_name"]) == ("adapter", "peft")
    table = rows(card)
    assert ["LoRA", "rank 8, alpha 16, scale 2"] in table
    assert ["aggregator", "exact"] in table
    assert ["weighting", "examples"] in table
    assert ["layers with an adapter", "3: 0-1, 3"] in table
    assert ["4", "carla", "1", "8", "80"] in table
    assert ["base", "not recorded"] in table
    assert "Rounds: not recorded." in card
    assert "Held-out examples: not recorded. Data: not recorded." in card
    assert "Sent to clients: not recorded. Sent by clients: not recorded." in card
    assert f'AutoModelForCausalLM.from_pretrained("org/base", revision="{"b" * 40}")' in card
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in card


def test_adapter_card_says_what_peft_does_not_load(tmp_path):
    fact = "energy in carry.safetensors, which peft leaves out"
    fields = {"files": {"carry.safetensors": b"rest"}, "carry_rank": 8, "energy_carried": 0.1234}
    card = render_card(make_adapter(tmp_path / "a", **fields), "me/adapter", SUMMARY)
    assert [fact, "0.123"] in rows(card)
    assert "`hf-fedlarge merge BASE ADAPTER -o merged`" in card.partition("PeftModel.from_pretrained")[2]
    plain = render_card(make_adapter(tmp_path / "b"), "me/adapter", SUMMARY)
    assert "carry.safetensors" not in plain
    assert "hf-fedlarge merge" not in plain


def test_a_card_says_who_saw_updates_where_that_is_known(tmp_path):
    adapter, merged = make_adapter(tmp_path / "a"), make_checkpoint(tmp_path / "c")
    nobody = make_adapter(tmp_path / "n", contributions=[])
    securely, plainly = {"secure": {"clients": 3}}, {"secure": None}
    not_secure = "Updates were not encrypted or securely aggregated."
    secure = "Updates were securely aggregated: a server that kept to the protocol saw a round's sum"
    unknown = "Whether updates were securely aggregated is not recorded."
    for artifact, rounds, sentence in (
        (adapter, [], not_secure),
        (adapter, [securely], secure),
        (merged, [securely, plainly], not_secure),
        (merged, [], unknown),
        (nobody, [], unknown),
    ):
        assert sentence in render_card(artifact, "me/it", {"rounds": rounds})


def test_a_checkpoints_card_says_none_of_privacy_only_where_a_summary_does(tmp_path):
    merged = make_checkpoint(tmp_path / "c")
    for summary in (None, SUMMARY):
        card = render_card(merged, "me/model", summary)
        assert "Differential privacy: not recorded." in card
        assert "Differential privacy: none" not in card
    assert "Differential privacy: none." in render_card(merged, "me/model", SUMMARY | {"privacy": None})
    assert "Differential privacy: none." in render_card(make_adapter(tmp_path / "a"), "me/it", None)


def test_a_secure_round_had_the_clients_that_were_summed_up(tmp_path):
    rounds = [{"round": 1, "clients": [], "secure": {"clients": 3, "of": 4, "lost": ["dora"]}}]
    card = render_card(make_checkpoint(tmp_path / "c"), "me/model", {"rounds": rounds})
    assert ["1", "3", "0", *["not recorded"] * 5] in rows(card)
    assert "dora" not in card


def test_a_card_says_where_data_lay_only_as_far_as_that_is_known(tmp_path):
    artifacts = make_adapter(tmp_path / "a"), make_checkpoint(tmp_path / "c")
    stayed, simulated, unknown = (
        "data that stayed with",
        "simulated on one machine, where all",
        "is not recorded, nor who",
    )
    kept, all_of_it = "Clients kept their data", "trained on org/texts, split among simulated clients"
    made_of = {"data": "org/texts", "held_out_examples": 9}
    for directory in artifacts:
        for summary, present, data in (
            ({"simulated": True} | made_of, (simulated, all_of_it), "org/texts"),
            ({"simulated": True, "eval_data": "public.jsonl"} | made_of, (simulated, all_of_it), "public.jsonl"),
            ({"simulated": False, "eval_data": "public.jsonl", "data": None}, (stayed, kept), "public.jsonl"),
            ({}, (unknown,), "not recorded"),
            (None, (unknown,), "not recorded"),
        ):
            card = " ".join(render_card(directory, "me/it", summary).split())
            assert {text for text in (stayed, simulated, unknown, kept, all_of_it) if text in card} == set(present)
            assert f"Data: {data}." in card


def test_checkpoint_card_takes_its_figures_from_the_summary(tmp_path):
    copy = {"package": {"layers": 4, "kept": [0, 2, 3], "embeddings": "int8"}}
    card = render_card(make_checkpoint(tmp_path / "c"), "me/model", SUMMARY | copy)
    head = metadata(card)
    assert (head["base_model_relation"], head["library_name"]) == ("finetune", "transformers")
    assert "3 of 4: 0, 2-3" in card
    assert "4-bit NormalFloat in blocks of 64, their scales quantized again; embeddings int8" in card
    table = rows(card)
    for row in (
        ["rounds", "1"],
        ["weights changed", "2"],
        ["aggregator", "exact"],
        ["base", "3.4080"],
        ["package, before training", "3.9340"],
        ["base with the adapter merged", "2.9060"],
        ["1", "2", "1", "3.5000", "3.1000", "4.0 MB", "2.5 MB", "61.2 s"],
        ["1", "anna", "0.75", "30", "900"],
        ["1", "ben", "0.25", "10", "300"],
        ["1", "eve"],
    ):
        assert row in table, row
    assert "eve/" not in card  # reasons may name paths and stores
    assert "bucket" not in card
    assert "Held-out examples: 64. Data: docstrings of the standard library." in card
    assert "Sent to clients: 8.0 MB. Sent by clients: 5.0 MB. Time: 61.2 s. Peak memory: 911.0 MB." in card
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in card


def test_every_key_of_the_summary_may_be_missing(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c")
    assert "Rounds: not recorded." in render_card(checkpoint, "me/model", {})
    partial = {"rounds": [{"clients": [{"client": "anna"}], "refused": [{}]}], "of_another_version": 1}
    table = rows(render_card(checkpoint, "me/model", partial))
    assert ["not recorded", "1", "1", *["not recorded"] * 5] in table
    assert ["not recorded", "anna", *["not recorded"] * 3] in table


def test_a_summary_of_the_wrong_shape_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"doesn't fit a model card: rounds\.0\.seconds"):
        render_card(make_checkpoint(tmp_path / "c"), "me/model", {"rounds": [{"seconds": "long"}]})


def test_a_summary_of_another_run_is_refused(tmp_path):
    adapter, merged = make_adapter(tmp_path / "a"), make_checkpoint(tmp_path / "c")
    own = {adapter: read_manifest(adapter, AdapterManifest).digest, merged: "e" * 64}
    for directory, what in ((adapter, "is"), (merged, "was merged from")):
        sentence = (
            f"ended with the adapter 111111111111…, but {directory} {what} {own[directory][:12]}…; give the summary"
        )
        with pytest.raises(ArtifactError, match=re.escape(sentence)):
            render_card(directory, "me/it", SUMMARY | {"adapter": "1" * 64})
        assert "2.9060" in render_card(directory, "me/it", SUMMARY | {"adapter": own[directory]})
    assert "2.9060" in render_card(make_package(tmp_path / "p"), "me/it", SUMMARY | {"adapter": "1" * 64})


def test_names_cannot_break_out_of_table_code_or_front_matter(tmp_path):
    evil = "x | 1 |\n\n# Hi <script>alert(1)</script> [a](http://b) `c` **d** \u202e {{ 7 * 7 }} &lt; http://e.f"
    summary = {"rounds": [{"round": 1, "clients": [{"client": evil, "weight": 1.0}], "refused": []}], "data": evil}
    base = BASE.model_copy(update={"license": "mine:\n- {x}", "id": 'o"rg`|\n```\n---\nlicense: mit'})
    card = render_card(make_adapter(tmp_path / "a", base=base), "me/adapter", summary)

    head = metadata(card)
    assert head["license"] == "other"
    assert re.fullmatch(r"[a-z0-9.-]+", head["license_name"])
    assert "base_model" not in head
    client = next(row for row in rows(card) if row[0] == "1" and len(row) == 5)
    assert client[1].startswith("x | 1 | # Hi <script>alert(1)</script> [a](http://b) `c` **d** {{ 7 * 7 }}")
    assert client[2:] == ["1", "not recorded", "not recorded"]

    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    inline = [child for token in tokens for child in token.children or []]
    assert not {token.type for token in [*tokens, *inline]} & {"html_inline", "link_open", "strong_open", "image"}
    html = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert html == [MARKER]
    assert [token.type for token in tokens].count("fence") == 1
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert headings == ["me/adapter", "Use", "Evaluation", "Rounds", "Clients", "Privacy", "Limits"]


def test_a_local_base_is_no_metadata_the_hub_would_refuse(tmp_path):
    base = BaseModelEntry(id="SmolLM2-135M", digest="0" * 64)
    card = render_card(make_adapter(tmp_path / "a", base=base), "me/adapter", None)
    assert not {"base_model", "base_model_relation", "license"} & metadata(card).keys()
    assert "none: the base was a local directory" in card
    assert "license of the base | not recorded" in card
    assert 'from_pretrained("SmolLM2-135M")  # your copy' in card


def test_licenses_the_hub_does_not_list_are_named(tmp_path):
    def of(name, text):
        directory = make_checkpoint(tmp_path / name, base=BASE.model_copy(update={"license": text}))
        return metadata(render_card(directory, "me/model", None))

    assert of("spdx", "Apache-2.0")["license"] == "apache-2.0"
    own = of("own", "Our Licence (v2)")
    assert (own["license"], own["license_name"]) == ("other", "our-licence-v2")


@pytest.mark.parametrize(
    ("link", "of_adapter", "of_checkpoint"),
    [
        ("https://org.ai/terms", "https://org.ai/terms", "https://org.ai/terms"),
        ("LICENSE", f"https://huggingface.co/org/base/blob/{BASE.revision}/LICENSE", "LICENSE"),
        (None, None, None),
    ],
)
def test_a_licence_of_its_own_keeps_its_name_and_link(tmp_path, link, of_adapter, of_checkpoint):
    base = BASE.model_copy(update={"license": "Org Research", "license_link": link})
    merged = make_checkpoint(tmp_path / "c", {"LICENSE": b"terms"}, base=base)
    for directory, where in ((make_adapter(tmp_path / "a", base=base), of_adapter), (merged, of_checkpoint)):
        card = render_card(directory, "me/it", None)
        head = metadata(card)
        assert (head["license"], head["license_name"], head.get("license_link")) == ("other", "org-research", where)
        fact = f"Org Research: {where}" if where else "Org Research"
        assert ["license of the base", fact] in rows(card)


def test_a_link_to_a_file_of_a_local_base_is_left_out(tmp_path):
    base = BaseModelEntry(id="copy", digest="0" * 64, license="other", license_link="LICENSE")
    head = metadata(render_card(make_adapter(tmp_path / "a", base=base), "me/it", None))
    assert head["license"] == "other"
    assert not {"license_name", "license_link"} & head.keys()


def test_a_base_without_a_link_keeps_its_digest():
    assert "license_link" not in BASE.model_dump()


def test_an_adapters_size_is_that_of_what_is_published(tmp_path):
    files = {"server_momentum.safetensors": b"x" * 1000, "carry.safetensors": b"rest"}
    card = render_card(make_adapter(tmp_path / "a", files=files), "me/it", None)
    assert ["size", "13 B"] in rows(card)


def test_a_crowd_of_clients_is_cut_and_counted(tmp_path):
    clients = [{"client": f"c{number}"} for number in range(1000)]
    card = render_card(make_checkpoint(tmp_path / "c"), "me/model", {"rounds": [{"round": 1, "clients": clients}]})
    assert "| c299 |" in card
    assert "| c300 |" not in card
    assert "700 more rows are not shown." in card


def test_the_same_artifact_gives_the_same_card(tmp_path):
    adapter = make_adapter(tmp_path / "a")
    assert render_card(adapter, "me/adapter", SUMMARY) == render_card(adapter, "me/adapter", SUMMARY)


def test_updates_and_foreign_directories_have_no_card(tmp_path):
    update = make_update(tmp_path / "u")
    with pytest.raises(ArtifactError, match="is of kind 'update'; only a package, an adapter"):
        render_card(update, "me/update", None)
    with pytest.raises(ArtifactError, match=r"has no manifest of hf-fedlarge \(fedlarge.json\)"):
        render_card(tmp_path, "me/nothing", None)


def make_update(directory):
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"private")
    fields = {"client": "anna", "round": 1, "package": "d" * 64, "adapter": None, "lora": LoraSettings()}
    manifest = UpdateManifest(files=describe_files(directory), examples=1, tokens=1, **fields)
    write_manifest(directory, manifest)
    return directory


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], "none"), ([5], "5"), ([3, 1, 2, 2], "1-3"), ([0, 1, 2, 4, 6, 7], "0-2, 4, 6-7")],
)
def test_ranges(numbers, text):
    assert format_ranges(numbers) == text


def test_templates_are_part_of_the_installed_package():
    assert importlib.import_module("hf_fedlarge.model_cards").__doc__
