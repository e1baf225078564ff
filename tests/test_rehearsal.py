"""`join --check`: everything but sending, before a federation begins."""

import json
import re
import uuid

import pytest
from federation import LORA, make_examples, make_federation

from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, PackageManifest, read_manifest
from hf_fedlarge.cli import main
from hf_fedlarge.data import load_examples
from hf_fedlarge.encoding import warn_of_cut
from hf_fedlarge.errors import ArtifactError, ConfigError, DataError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.orders import ORDER, OrderDocument, TrainingOrder, Work, write_document
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.rehearsal import rehearse
from hf_fedlarge.trainers.sites import Site

TRAINING = {"max_steps": 500, "per_device_train_batch_size": 2, "max_length": 64, "save_steps": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, the adapter to start from, and examples."""
    path = tmp_path_factory.mktemp("rehearsal")
    make_federation(path)
    start_adapter(path / "package", path / "start", LORA, seed=0)
    make_examples(path / "data.jsonl")
    return path


@pytest.fixture
def store():
    return Store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def check(home, store, tmp_path):
    """Rehearses as ann; gives what was said, with nothing new in the store and only the package in the cache."""

    def check(package=None, show=0, **options):
        before, said = _all(store), []
        site = Site(**{"client": "ann", "data": str(home / "data.jsonl"), "cache": tmp_path / "cache"} | options)
        try:
            rehearse(store.url, site, said.append, package, show)
        finally:
            assert _all(store) == before
            left = [path.name for path in (tmp_path / "cache").glob("*")]
            assert set(left) <= {"packages"}
        return "\n".join(said)

    return check


def _all(store):
    return {home: store.names(home) for home in ("", "check_ins", "inbox", "inbox/0001", "verdicts")}


@pytest.fixture
def published(home, store):
    """Publishes an order for round 1 that asks `client`."""
    package, start = (
        read_manifest(home / name, kind) for name, kind in (("package", PackageManifest), ("start", AdapterManifest))
    )

    def publish(client="ann", **changes):
        store.put(home / "package")
        store.put(home / "start", leave_out=SERVER_FILES)
        work = Work(
            clients=[client],
            package=package.digest,
            package_bytes=package.total_bytes,
            adapter=start.digest,
            adapter_bytes=start.total_bytes,
            update_bytes=10**6,
        )
        training = TrainingOrder(**TRAINING | changes)
        order = {"run": "f" * 32, "state": "open", "round": 1, "attempt": 1, "work": [work], "training": training}
        write_document(store, ORDER, OrderDocument(**order))

    return publish


def test_two_steps_of_what_is_ordered_are_tried_and_nothing_is_sent(published, check, store, tmp_path):
    published()
    said = check()
    assert "ann would check in with 12 examples and " in said
    assert f"{tmp_path / 'cache'} has " in said
    assert f"{store.url} asks for round 1\nthe package of " in said
    assert "MB is fetched\n12 examples have a labelled token within 64 tokens; the median length is " in said
    took = r"\na step takes \d+\.\d\d s, 500 of them \d[^\n]*, \d\.\d GB at most \(mapped files in it\)"
    assert re.search(took + "; nothing was sent$", said)
    published(client="ben")
    said = check()
    assert "asks for round 1, though not ann\n" in said
    assert "MB is here\n" in said
    assert said.endswith("nothing was sent")


def test_without_an_order_a_package_may_be_given(home, check, capsys, store, tmp_path):
    assert " isn't there or holds nothing: no server has begun there yet, or the URL is another one\n" in check()
    store.write("package/x", b"1")
    said = check()
    assert " can be read; it has no order yet\n" in said
    assert said.endswith("so no step was tried (--package DIR tries one); nothing was sent")
    words = [
        "join",
        store.url,
        "--client",
        "ann",
        "--data",
        str(home / "data.jsonl"),
        "--cache",
        str(tmp_path / "other"),
    ]
    assert main([*words, "--check", "--package", str(home / "package")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("computing on the CPU, 1 thread\nann would check in")
    assert re.search(r"within 1024 tokens; the median length is \d+, the longest \d+\n", printed)
    for option in (["--package", str(home / "package")], ["--show", "1"]):
        assert main([*words, *option]) == 2
        assert f"{' '.join(option)} is for --check" in capsys.readouterr().err


def test_examples_are_shown_as_the_model_sees_them(published, home, check, tmp_path):
    published()
    lines = check(show=2).splitlines()
    place = lines.index("1 of 12 as the model sees it, what counts behind >:")
    example = load_examples(str(home / "data.jsonl"))[0]
    assert lines[place + 1 : place + 4] == [
        f"  '<|im_start|>user\\n{example['prompt'][0]['content']}<|im_end|>\\n<|im_start|>assistant\\n'",
        f"> '{example['completion'][0]['content']}<|im_end|>\\n'",
        "2 of 12 as the model sees it, what counts behind >:",
    ]
    published(assistant_only_loss=True, max_length=4096)
    turns = [{"role": role, "content": "\x1b[2J" + role * 100} for role in ("user", "assistant") * 2]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    lines = check(show=2, data=str(tmp_path / "long.jsonl")).splitlines()
    place = lines.index("1 of 1 as the model sees it, what counts behind >:")
    shown = lines[place + 1 : -1]
    assert shown[-1] == "  …"
    assert [line[0] for line in shown[:-1]] == [" ", ">", " "]
    assert shown[1].startswith("> '\\x1b[2Jassistantassistant")
    assert " … " in shown[1]
    assert sum(map(len, shown)) < 1600


def test_packing_that_splits_long_documents_may_be_ordered(published, check, tmp_path, caplog):
    rows = [{"text": "long " * 100}] * 3
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warn_of_cut.cache_clear()
    for strategy, cut in (("bfd_split", False), ("bfd", True)):
        published(packing=True, packing_strategy=strategy)
        said = check(data=str(tmp_path / "long.jsonl"))
        assert "3 examples have a labelled token within 64 tokens; the median length is 501, the longest 501" in said
        assert ("3 of 3 examples (train) are longer than max_length (64) tokens" in caplog.text) == cut


def test_what_would_keep_a_client_from_training_is_said(published, check):
    published(max_length=4)
    with pytest.raises(DataError, match="has no example with a labelled token within 4 tokens"):
        check()
    published()
    with pytest.raises(ConfigError, match=r"The memory budget of 1 MB is too small"):
        check(memory_budget="1MB")
    with pytest.raises(ArtifactError, match="is not signed; expected a signature"):
        check(server_key="0" * 64)
