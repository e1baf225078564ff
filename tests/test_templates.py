"""A package's chat template takes no more of a client's machine than it may, and nothing it says is ever run."""

import time

import pytest
from federation import make_examples, make_federation
from test_hostile import reseal

from hf_fedlarge import templates
from hf_fedlarge.cli import main
from hf_fedlarge.data import load_examples
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.package import load_tokenizer
from hf_fedlarge.templates import MAX_TEMPLATE_BYTES, check_length, check_rendering

CHAT = [{"messages": [{"role": "user", "content": "x"}]}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    home = tmp_path_factory.mktemp("templates")
    return make_federation(home)[1]


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (LOOPS, "took more than 1 s"),
        ("{{ 'x' * 10**9 }}", "took more than 256 MiB of memory"),
        ("{{ 'x'.ljust(10**10) }}", "took more than 256 MiB of memory"),
        (
            "{% set n = namespace(x='x' * 9) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "took more than 256 MiB of memory",
        ),
        ("{{ 'x' * 10**6 }}", "made a text longer than the example by more than 262144 letters"),
    ],
)
def test_one_that_takes_too_much_is_refused_with_the_limit(monkeypatch, template, cause):
    if template == LOOPS:
        monkeypatch.setattr(templates, "MAX_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(ArtifactError, match=f"^The package's chat template {cause}, .*ask who made the package"):
        check_rendering(template, CHAT, {})
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ joiner.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ messages.__class__.__init__.__globals__.os.system('touch CANARY') }}",
        "{% include 'CANARY' %}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_one_that_reaches_for_more_than_it_may_see_runs_nothing(package, tmp_path, template):
    """The trainer's own rendering says what is wrong, at once: nothing here takes long."""
    template = template.replace("CANARY", str(tmp_path / "canary"))
    check_rendering(template, CHAT, {})
    with pytest.raises(Exception, match=r"."):
        load_tokenizer(package).apply_chat_template(CHAT[0]["messages"], chat_template=template, tokenize=False)
    assert not (tmp_path / "canary").exists()


def test_a_sound_one_passes_and_is_tried_once_in_a_process_of_its_own(package, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(package)
    examples = load_examples(str(make_examples(tmp_path / "data.jsonl")))
    monkeypatch.setattr(templates, "_passed", set())
    for _ in range(2):
        check_rendering(tokenizer.chat_template, examples, tokenizer.special_tokens_map)
        monkeypatch.setattr(templates.subprocess, "run", None)
    assert templates._passed == {tokenizer.chat_template}
    check_rendering(LOOPS, [{"text": "nothing to render"}], {})
    check_rendering(None, CHAT, {})
    several = {"default": tokenizer.chat_template, "rag": LOOPS, "tool_use": "{{ 'x' * 10**6 if tools else '' }}"}
    check_rendering(several, CHAT, {})
    monkeypatch.undo()
    del several["default"]
    with pytest.raises(ArtifactError, match="made a text longer than the example"):
        check_rendering(several, [CHAT[0] | {"tools": '[{"name": "weather"}]'}], {})


def test_one_that_is_too_long_is_not_loaded(package, tmp_path):
    check_length("x" * MAX_TEMPLATE_BYTES, "it")
    for template in ("é" * MAX_TEMPLATE_BYTES, {"default": "x", "other": "x" * (MAX_TEMPLATE_BYTES + 1)}):
        with pytest.raises(ArtifactError, match=r"has \d+ bytes; expected at most 131072"):
            check_length(template, "it")
    [path] = package.glob("chat_template*")
    sound = path.read_text()
    path.write_text("{# " + "x" * MAX_TEMPLATE_BYTES + " #}")
    try:
        with pytest.raises(ArtifactError, match=r"The chat template of .* expected at most 131072"):
            load_tokenizer(package)
    finally:
        path.write_text(sound)


def test_a_client_refuses_a_package_whose_template_never_ends(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(templates, "MAX_SECONDS", 1)
    [path] = package.glob("chat_template*")
    sound = path.read_text()
    path.write_text(LOOPS)
    reseal(package)
    data = make_examples(tmp_path / "data.jsonl")
    words = ["train", "--package", package, "--data", data, "--output", tmp_path / "update", "--disable_tqdm", "True"]
    assert main([str(word) for word in words]) == 2
    assert "The package's chat template took more than 1 s" in capsys.readouterr().err
    assert not (tmp_path / "update").exists()
    path.write_text(sound)
    reseal(package)
