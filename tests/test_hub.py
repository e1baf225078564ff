import json
import logging
import socket

import pytest
from hub_double import WRITER, connected
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session
from test_cards import SUMMARY, make_adapter, make_checkpoint, make_package, make_update

from hf_fedlarge import hub as hub_module
from hf_fedlarge.artifacts import MANIFEST_NAME
from hf_fedlarge.cards import MARKER
from hf_fedlarge.errors import ArtifactError, ConfigError, HubError
from hf_fedlarge.hub import push, resolve_checkpoint

# huggingface_hub 2.4 itself uploads LFS files with an argument that its HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

CHECKPOINT = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "model.safetensors.index.json": b'{"weight_map": {}}',  # each file its own content: the client fetches none twice
    "tokenizer.json": b'{"model": {}}',
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "LICENSE": b"Apache",
    "NOTICE.md": b"thanks",
    "README.md": b"# base",
}
NEVER = {
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "modeling_evil.py": b"import os",
    "tokenizer.py": b"import sys",
    "LICENSE.py": b"import re",
    "consolidated.safetensors": b"again",
    "onnx/config.json": b"{}",
    "trainer_state.json": b"{}",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with connected(tmp_path, monkeypatch) as double:
        yield double


def published(double, repo_id):
    """Files of the repository's newest commit that an artifact and its card account for."""
    return {name: data for name, data in double.repositories[repo_id].files.items() if name != ".gitattributes"}


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Downloads


def test_a_local_directory_comes_as_it_is(tmp_path, hub):
    directory = make_checkpoint(tmp_path / "model")
    assert resolve_checkpoint(str(directory)) == (directory, None)
    assert hub.requests == []


def test_a_hub_id_is_downloaded_at_its_commit_without_pickles_or_code(hub):
    repository = hub.create("org/base", CHECKPOINT | NEVER)
    directory, commit = resolve_checkpoint("org/base")
    assert commit == repository.commits[-1].oid
    assert contents(directory) == CHECKPOINT
    assert hub.downloaded() == set(CHECKPOINT)


def test_a_revision_is_honoured_and_needs_the_hub_no_more_once_cached(hub):
    repository = hub.create("org/base", CHECKPOINT)
    first = repository.commits[-1].oid
    repository.commit("newer", CHECKPOINT | {"config.json": b'{"newer": true}'})
    directory, commit = resolve_checkpoint("org/base", first)
    assert commit == first
    assert (directory / "config.json").read_bytes() == b"{}"
    hub.status = 500
    assert resolve_checkpoint("org/base", first) == (directory, first)


@pytest.mark.parametrize("path", ["./no", "../no", "/no/such", "~/no-such-model", "a/b/c", "~nobody-here/model"])
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(hub, path):
    with pytest.raises(ArtifactError, match="no such directory"):
        resolve_checkpoint(path)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "my model", "a--b", "org/mod:el", "-x"])
def test_what_is_neither_path_nor_id_is_refused(hub, name):
    with pytest.raises(ConfigError, match=r"empty string|neither a directory here nor a Hub id"):
        resolve_checkpoint(name)
    assert hub.requests == []


def test_a_directory_without_config_says_what_it_holds(tmp_path):
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ArtifactError, match=r"has no config\.json.*found weights\.gguf\.$"):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(ArtifactError, match="is a file; expected a checkpoint's directory"):
        resolve_checkpoint(str(tmp_path / "weights.gguf"))
    with pytest.raises(ConfigError, match="is a local directory, which has no revision 'main'"):
        resolve_checkpoint(str(tmp_path), "main")


def test_a_hub_repository_without_safetensors_says_what_it_holds(hub):
    hub.create("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(ArtifactError, match=r"org/old on the Hub has no \*\.safetensors.*found config\.json\.$"):
        resolve_checkpoint("org/old")
    assert "pytorch_model.bin" not in hub.downloaded()


def test_download_errors_are_one_sentence_that_says_what_to_do(hub):
    hub.create("org/gated", CHECKPOINT, gated=True)
    hub.create("org/hidden", CHECKPOINT, private=True)
    hub.create("org/base", CHECKPOINT)
    for name, revision, words in (
        ("org/missing", None, ["shows no model org/missing", "check the spelling", "hf auth login", "local directory"]),
        ("org/hidden", None, ["shows no model org/hidden", "if it is private"]),
        ("org/gated", None, ["is gated", f"accept its terms at {hub.endpoint}/org/gated", "hf auth login"]),
        ("org/base", "v9", ["has no revision 'v9'", "commits/main"]),
    ):
        with pytest.raises(HubError) as caught:
            resolve_checkpoint(name, revision)
        assert_sentence(caught.value, words)
    for status, words in (
        (401, ["refused your login", "hf auth login"]),
        (403, ["refused your login"]),
        (429, ["too many requests", "wait"]),
        (503, ["The Hub failed on org/new (503)", "try again later"]),
        (418, ["refused a request for org/new (418): as the test wants"]),
    ):
        hub.status = status
        with pytest.raises(HubError) as caught:
            resolve_checkpoint("org/new")
        assert_sentence(caught.value, words)


def test_no_network_is_said_so(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(HubError) as caught:
            resolve_checkpoint("org/base")
    assert_sentence(caught.value, ["can't be reached (ConnectError)", "check the network", "local directory"])


def test_offline_mode_is_said_so_and_serves_the_cache(tmp_path, hub, monkeypatch):
    hub.create("org/base", CHECKPOINT)
    cached = resolve_checkpoint("org/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_checkpoint("org/base") == cached
    with pytest.raises(HubError) as caught:
        resolve_checkpoint("org/other")
    assert_sentence(caught.value, ["HF_HUB_OFFLINE", "org/other is not whole in the cache", "local directory"])
    with pytest.raises(HubError) as caught:
        push(make_adapter(tmp_path / "adapter"), "me/adapter", token=WRITER)
    assert_sentence(caught.value, ["HF_HUB_OFFLINE", "unset it."])


def assert_sentence(error, words):
    text = str(error)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert text.endswith(".")


# Uploads


@pytest.mark.parametrize("make", [make_package, make_adapter, make_checkpoint])
def test_push_makes_a_private_repository_with_everything_in_one_commit(tmp_path, hub, make):
    directory = make(tmp_path / "artifact")
    before = contents(directory)
    address = push(directory, "me/new", token=WRITER)
    repository = hub.repositories["me/new"]
    assert repository.private
    assert len(repository.commits) == 2  # the Hub's own first one, and ours
    assert address == f"{hub.endpoint}/me/new/commit/{repository.commits[-1].oid}"
    files = published(hub, "me/new")
    card = files.pop("README.md").decode()
    assert files == before
    assert card.startswith("---\n")
    assert MARKER in card
    assert contents(directory) == before


def test_push_can_be_public_and_takes_the_summary_and_the_message(tmp_path, hub):
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(SUMMARY))
    directory = make_checkpoint(tmp_path / "merged")
    push(directory, "me/open", private=False, summary=summary, commit_message="Round 1", token=WRITER)
    assert not hub.repositories["me/open"].private
    assert hub.repositories["me/open"].commits[-1].message == "Round 1"
    assert "| base with the adapter merged | 2.9060 |" in published(hub, "me/open")["README.md"].decode()


def test_a_published_checkpoint_can_be_the_next_federations_base(tmp_path, hub):
    directory = make_checkpoint(tmp_path / "merged")
    push(directory, "me/next", private=False, token=WRITER)
    downloaded, commit = resolve_checkpoint("me/next")
    assert commit == hub.repositories["me/next"].commits[-1].oid
    assert contents(downloaded) == published(hub, "me/next")


def test_a_readme_of_somebody_else_stays(tmp_path, hub, caplog):
    hub.create("me/mine", {"README.md": b"# My words"}, private=True)
    with caplog.at_level(logging.WARNING, "hf_fedlarge.hub"):
        push(make_adapter(tmp_path / "adapter"), "me/mine", token=WRITER)
    files = published(hub, "me/mine")
    assert files["README.md"] == b"# My words"
    assert MARKER in files["FEDLARGE.md"].decode()
    assert "me/mine has a README.md that hf-fedlarge did not write; the card is FEDLARGE.md instead." in caplog.messages


def test_our_own_card_is_replaced(tmp_path, hub):
    push(make_adapter(tmp_path / "one"), "me/adapter", token=WRITER)
    first = published(hub, "me/adapter")["README.md"]
    push(make_adapter(tmp_path / "two", b"more trained", round=5), "me/adapter", token=WRITER)
    files = published(hub, "me/adapter")
    assert files["adapter_model.safetensors"] == b"more trained"
    assert files["README.md"] != first
    assert "| round | 5 |" in files["README.md"].decode()
    assert "FEDLARGE.md" not in files


def test_pushing_the_same_again_makes_no_commit(tmp_path, hub):
    adapter = make_adapter(tmp_path / "adapter")
    first = push(adapter, "me/adapter", token=WRITER)
    assert push(adapter, "me/adapter", token=WRITER) == first
    assert len(hub.repositories["me/adapter"].commits) == 2


def test_the_artifacts_own_readme_goes_up_unchanged(tmp_path, hub, caplog):
    directory = make_checkpoint(tmp_path / "merged", {"README.md": b"# The base's words"})
    before = contents(directory)
    push(directory, "me/merged", token=WRITER)
    files = published(hub, "me/merged")
    assert MARKER in files.pop("FEDLARGE.md").decode()
    assert files == before  # so the manifest still describes what is there
    assert contents(directory) == before
    assert f"{directory} has a README.md that hf-fedlarge did not write" in caplog.text


def test_files_of_an_earlier_artifact_do_not_stay_beside_the_new(tmp_path, hub):
    old = {"model-00002-of-00002.safetensors": b"old shard"}
    push(make_checkpoint(tmp_path / "one", old), "me/model", token=WRITER)
    repository = hub.repositories["me/model"]
    repository.commit("by hand", {**repository.files, "figure.png": b"theirs", "FEDLARGE.md": MARKER.encode()})
    push(make_checkpoint(tmp_path / "two"), "me/model", token=WRITER)
    assert set(published(hub, "me/model")) == {*contents(tmp_path / "two"), "README.md", "figure.png"}


def test_a_repository_of_another_kind_is_left_alone(tmp_path, hub):
    push(make_checkpoint(tmp_path / "merged"), "me/model", token=WRITER)
    before = published(hub, "me/model")
    with pytest.raises(HubError, match="me/model holds a published checkpoint, not a adapter; use another repository"):
        push(make_adapter(tmp_path / "adapter"), "me/model", token=WRITER)
    assert published(hub, "me/model") == before


def test_a_manifest_there_that_cannot_be_read_does_not_matter(tmp_path, hub):
    hub.create("me/odd", {MANIFEST_NAME: b"[not ours"}, private=True)
    push(make_adapter(tmp_path / "adapter"), "me/odd", token=WRITER)
    assert published(hub, "me/odd")[MANIFEST_NAME] == (tmp_path / "adapter" / MANIFEST_NAME).read_bytes()


def test_private_things_do_not_go_into_a_public_repository(tmp_path, hub, caplog):
    hub.create("me/open")
    hub.create("me/closed", private=True)
    adapter = make_adapter(tmp_path / "adapter")
    with pytest.raises(HubError, match="me/open exists and is public"):
        push(adapter, "me/open", token=WRITER)
    assert published(hub, "me/open") == {}
    push(adapter, "me/closed", private=False, token=WRITER)
    assert hub.repositories["me/closed"].private
    assert "it stays private" in caplog.text


def test_what_happened_in_the_meantime_is_not_overwritten(tmp_path, hub):
    repository = hub.create("me/busy", private=True)
    hub.before_commit = lambda: repository.commit("somebody", {"README.md": b"# Written just now"})
    with pytest.raises(HubError) as caught:
        push(make_adapter(tmp_path / "adapter"), "me/busy", token=WRITER)
    assert_sentence(caught.value, ["me/busy was changed while this was being published", "publish again"])
    assert published(hub, "me/busy") == {"README.md": b"# Written just now"}


def test_only_whole_artifacts_of_ours_are_published(tmp_path, hub):
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"adapteR")
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors has the digest"):
        push(adapter, "me/adapter", token=WRITER)
    (adapter / MANIFEST_NAME).unlink()
    with pytest.raises(ArtifactError, match="has no manifest of hf-fedlarge"):
        push(adapter, "me/adapter", token=WRITER)
    with pytest.raises(ArtifactError, match="is of kind 'update'"):
        push(make_update(tmp_path / "update"), "me/update", token=WRITER)
    with pytest.raises(ArtifactError, match="has no manifest of hf-fedlarge"):
        push(tmp_path / "nowhere", "me/nowhere", token=WRITER)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["me/a b", "me//b", "me/a--b", "datasets/me/b", "", "b.git", "alone"])
def test_impossible_repository_ids_are_refused_before_anything_else(tmp_path, hub, name):
    with pytest.raises(ConfigError, match=r"expected owner/name|write it as owner/alone"):
        push(tmp_path, name, token=WRITER)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "can't be read: No such file"), ("{", "is not JSON"), ("[]", "holds a list; expected an object")],
)
def test_a_damaged_summary_is_refused_before_anything_is_made(tmp_path, hub, text, message):
    summary = tmp_path / "summary.json"
    if text is not None:
        summary.write_text(text)
    with pytest.raises(ArtifactError, match=message):
        push(make_adapter(tmp_path / "adapter"), "me/adapter", summary=summary, token=WRITER)
    assert hub.requests == []


def test_upload_errors_are_one_sentence_that_says_what_to_do(tmp_path, hub, monkeypatch):
    adapter = make_adapter(tmp_path / "adapter")
    for repo_id, token, words in (
        ("me/adapter", None, ["does not let you write to me/adapter (401)", "hf auth login"]),
        ("me/adapter", "hf_wrong", ["does not let you write to me/adapter (401)"]),
        ("somebody-else/adapter", WRITER, ["does not let you write to somebody-else/adapter (403)", "token"]),
    ):
        with pytest.raises(HubError) as caught:
            push(adapter, repo_id, token=token)
        assert_sentence(caught.value, words)
    # The Hub's own opinion of a card's metadata, should it differ from ours.
    monkeypatch.setattr("hf_fedlarge.hub.render_card", lambda *_: "---\nlicense: ours\n---\n")
    with pytest.raises(HubError) as caught:
        push(adapter, "me/adapter", token=WRITER)
    assert_sentence(caught.value, ["could not be published", '"license" must be one of those'])


def test_no_request_waits_for_ever_and_a_limit_of_the_user_s_own_stays(monkeypatch):
    session = get_session()
    monkeypatch.setattr(session, "timeout", None)
    slow = type("ReadTimeout", (HTTPError,), {})("slow")
    answer = r"gave no answer within 300 s or less \(ReadTimeout\); check the network"
    with pytest.raises(HubError, match=answer), hub_module._explained("me/model"):
        raise slow
    assert session.timeout.read == 300
    session.timeout = 7
    with hub_module._explained("me/model"):
        assert session.timeout.read == 7
