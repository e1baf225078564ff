"""Loading in every form, one clear sentence for every way to fail, and splits that lose no example."""

import csv
import json
import os
import re
import tempfile
import weakref
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import is_conversational

from hf_fedlarge import data, stdlib_corpus
from hf_fedlarge.data import (
    concatenate,
    from_tokens,
    list_lengths,
    load_examples,
    public_name,
    training_columns,
    write_jsonl,
)
from hf_fedlarge.errors import ConfigError, DataError, OutputError
from hf_fedlarge.partition import split_by_column

SAY_HI = [{"role": "user", "content": "hi"}]
HELLO = [{"role": "assistant", "content": "hello — ¡你好! 🙂\u2028\x85"}]

quick = settings(max_examples=25, deadline=None)
filled = st.text(min_size=1, max_size=30).filter(str.strip)


@pytest.fixture(scope="module")
def stdlib():
    return load_examples("stdlib")


def numbered(count):
    return Dataset.from_dict({"text": [f"t{i}" for i in range(count)]})


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Loading


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": SAY_HI + HELLO}, ["messages"]),
        ({"prompt": "2+2=", "completion": "4"}, ["prompt", "completion"]),
        ({"prompt": SAY_HI, "completion": HELLO}, ["prompt", "completion"]),
        ({"text": "2024-01-01"}, ["text"]),
        ({"text": "x", "prompt": "lone"}, ["text"]),
        ({"text": "x", "prompt": "p", "completion": "c"}, ["prompt", "completion"]),
        ({"text": "x", "prompt": "p", "completion": "c", "messages": SAY_HI}, ["messages"]),
    ],
)
def test_form_is_chosen_and_other_columns_stay_until_training(tmp_path, row, form):
    dataset = load_examples(jsonl(tmp_path / "a.jsonl", {**row, "team": "red", "size": 3}))
    assert sorted(dataset.column_names) == sorted([*form, "team", "size"])
    assert dataset[0] == {**{column: row[column] for column in form}, "team": "red", "size": 3}
    assert training_columns(dataset).column_names == form


def test_every_file_kind_gives_the_same_rows(tmp_path):
    rows = [{"text": "eins, zwei\n“drei”", "team": "a"}, {"text": "vier", "team": "b"}]
    jsonl(tmp_path / "x.jsonl", *rows)
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "x.csv").write_text('text,team\n"eins, zwei\n“drei”",a\n\nvier,b\n', encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for path in tmp_path.iterdir():
        assert load_examples(str(path)).to_list() == rows, path


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbftext\r\n\r\na\r\nb\r\n")
    for path in tmp_path.iterdir():
        assert load_examples(str(path))["text"][:] == ["a", "b"]


def test_columns_that_the_first_row_lacks_are_kept(tmp_path):
    dataset = load_examples(jsonl(tmp_path / "x.jsonl", {"text": "a"}, {"text": "b", "team": "red"}))
    assert dataset["team"][:] == [None, "red"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.jsonl", "", "x.jsonl holds no examples."),
        ("x.jsonl", "{}\n", "x.jsonl holds no examples."),
        ("x.csv", "", "x.csv holds no examples."),
        ("x.csv", "text\n", "x.csv holds no examples."),
        ("x.json", "[]", "x.json holds no examples."),
        ("x.jsonl", '{"text": "a"}\n\n{"text": \n', r"Line 3 of .*x.jsonl is not a JSON object: Expecting value"),
        ("x.jsonl", '{"text": "a"}\n["b"]\n', r"Line 2 of .*x.jsonl is not a JSON object; expected one a line."),
        ("x.jsonl", b'{"text": "a\xff"}\n', r"Line 1 of .*x.jsonl is not a JSON object: 'utf-8' codec"),
        ("x.jsonl", "[" * 100_000, "Line 1 of .*x.jsonl is not a JSON object: maximum recursion"),
        ("x.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', "Row 2 of .*x.jsonl has 'text' of type list; expected a str"),
        ("x.jsonl", '{"text": "a", "n": 1' + "0" * 30 + "}", "x.jsonl doesn't fit a table"),
        ("x.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "Line 2 of .*x.jsonl is not a JSON object: .* surrogates"),
        (
            "x.json",
            '{"text": "a"}\n{"text": "b"}\n',
            r"x.json is not JSON \(one object a line belongs in a .jsonl\): E",
        ),
        ("x.json", '{"text": "a"}', "x.json is not a list of JSON objects; "),
        ("x.json", '["a"]', "x.json is not a list of JSON objects; "),
        ("x.csv", "text,team\na,b\nc\n", r"Line 3 of .*x.csv has 1 values; its header names 2 columns."),
        ("x.csv", 'text\n"a\n', "x.csv is not CSV at or after line 2: "),
        ("x.csv", b"text\na\xff\n", "x.csv is not CSV at or after line 0: 'utf-8' codec"),
        ("x.csv", "text,text\na,b\n", "x.csv names a column twice in its header: text, text."),
        ("x.parquet", "not parquet", "x.parquet is not Parquet that can be used: "),
        ("x.txt", "a", r"x.txt exists but is not a file that ends in .jsonl, .json, .csv, .parquet."),
        (
            "x.jsonl",
            '{"body": 1, "n": 2}',
            "has the columns body, n; expected 'messages', 'prompt' with 'completion', or",
        ),
        ("x.jsonl", '{"text": "a"}\n{"text": null}', r"Row 2 of .*x.jsonl has an empty 'text'; fill it or remove"),
        ("x.jsonl", '{"text": "a"}\n{"text": " \\n"}', "Row 2 of .*x.jsonl has an empty 'text'"),
        ("x.csv", "prompt,completion\na,b\nc,\n", "Row 2 of .*x.csv has an empty 'completion'"),
        ("x.jsonl", '{"messages": []}', "Row 1 of .*x.jsonl has an empty 'messages'"),
        ("x.jsonl", '{"text": 5}', "Row 1 of .*x.jsonl has 'text' of type int; expected a string."),
        ("x.jsonl", '{"messages": "hi"}', "Row 1 of .* has 'messages' of type str; expected a list of messages."),
        (
            "x.jsonl",
            '{"prompt": 3, "completion": "a"}',
            "has 'prompt' of type int; expected a string or a list of messages.",
        ),
        ("x.jsonl", '{"messages": ["hi"]}', "has a message in 'messages' without a role or without text as content."),
        ("x.jsonl", '{"messages": [{"role": "user", "content": ""}]}', "without a role or without text"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": null}]}', "without a role or without text"),
        ("x.jsonl", '{"messages": [{"content": "a"}]}', "without a role or without text"),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "a"}], "tools": {"name": "weather"}}',
            "Row 1 of .*x.jsonl has 'tools' that are no list of objects; describe each tool by one.",
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "a"}], "tools": "weather"}',
            "Row 1 of .*x.jsonl has 'tools' that are not JSON: Expecting value",
        ),
        (
            "x.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}',
            "Row 1 of .* mixes a string and messages; 'prompt' and 'completion' must be of the same kind.",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=sentence) as caught:
        load_examples(str(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.jsonl", "There is no such file as missing.jsonl."),
        ("owner/name.parquet", "There is no such file as owner/name.parquet."),
        ("nonsense", "'nonsense' is not a file, 'stdlib', or a Hub data set's id such as 'owner/name'."),
        ("../owner/name", "is not a file"),
        (".", r"\. exists but is not a file"),
    ],
)
def test_a_source_that_is_not_there(tmp_path, monkeypatch, source, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=sentence):
        load_examples(source)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "x.jsonl", {"text": "a"})
    assert len(load_examples("~/x.jsonl")) == 1


def test_an_existing_path_is_never_shadowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stdlib").touch()
    Path("owner/name").mkdir(parents=True)
    for source in ("stdlib", "owner/name"):
        with pytest.raises(DataError, match="exists but is not a file that ends in"):
            load_examples(source)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (None, None),
        ("stdlib", "stdlib"),
        ("org/a.b", "org/a.b"),
        ("/home/anna/x.jsonl", "x.jsonl"),
        ("a/b.CSV", "b.CSV"),
    ],
)
def test_what_data_may_be_called_in_public(source, name):
    assert public_name(source) == name


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "x.jsonl", {"text": "a"})

    def refuse(*args, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a real mode would not stop root
    with pytest.raises(DataError, match=r"x.jsonl can't be read: Permission denied."):
        load_examples(path)


@pytest.mark.parametrize("option", [{"split": "test"}, {"revision": "main"}])
def test_a_local_source_has_no_split_and_no_revision(tmp_path, option):
    for source in (jsonl(tmp_path / "x.jsonl", {"text": "a"}), "stdlib"):
        with pytest.raises(ConfigError, match=r"is local and has no splits or revisions; leave"):
            load_examples(source, **option)


def test_the_hub_is_asked_without_remote_code(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: asked.append((args, named)) or numbered(3))
    assert load_examples("owner/name", split="train[:3]", revision="abc")["text"][:] == ["t0", "t1", "t2"]
    assert asked == [(("owner/name",), {"split": "train[:3]", "revision": "abc"})]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub (ConnectError)"), "Couldn't reach 'owner/name'"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' is gated.\nVisit…"), "Dataset 'x' is gated"),
        (ValueError('Unknown split "x".'), 'Unknown split "x"'),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_hub_errors_become_one_sentence(monkeypatch, error, reason):
    def fail(*args, **named):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=rf"^owner/name can't be loaded from the Hub: {re.escape(reason)}.*\.$"):
        load_examples("owner/name")


def test_the_cause_of_a_generation_error_is_what_is_told(monkeypatch):
    def fail(*args, **named):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from ValueError("row 7 is broken")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"from the Hub: row 7 is broken."):
        load_examples("owner/name")


def test_nothing_is_left_behind_and_nothing_stale_is_served(tmp_path, monkeypatch):
    cache, mine = tmp_path / "cache", tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for word in ("old", "new"):
        for name, content in (("x.jsonl", '{"text": "%s"}'), ("x.json", '[{"text": "%s"}]'), ("x.csv", "text\n%s")):
            (mine / name).write_text(content % word)
        pq.write_table(pa.table({"text": [word]}), mine / "x.parquet")
        for path in mine.iterdir():
            dataset = load_examples(str(path))
            assert dataset["text"][:] == [word]
            # What trainers do with it stays in memory too.
            assert dataset.map(lambda row: {"length": len(row["text"])}).cache_files == []
    assert sorted(path.name for path in mine.iterdir()) == ["x.csv", "x.json", "x.jsonl", "x.parquet"]
    assert not cache.exists()


def test_parquet_metadata_does_not_decide_what_a_column_is(tmp_path):
    table = pa.table({"text": ["a"]}).replace_schema_metadata({"huggingface": "{not json"})
    pq.write_table(table, tmp_path / "x.parquet")
    assert load_examples(str(tmp_path / "x.parquet")).to_list() == [{"text": "a"}]


def calling(name, arguments):
    """A chat with a call of a tool that takes what no other does."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    parameters = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    answer = {"role": "assistant", "tool_calls": [call]}
    return {"messages": [*SAY_HI, answer, {"role": "tool", "content": "ok"}, *HELLO], "tools": [tool]}


CALLS = [calling("weather", {"city": "Paris"}), calling("mail", {"to": "Bob", "copy": None})]
CALLS += [{"messages": SAY_HI + HELLO, "tools": None}]


def test_tool_calls_of_a_line_have_no_arguments_of_other_tools(tmp_path):
    dataset = training_columns(load_examples(jsonl(tmp_path / "x.jsonl", *CALLS)))
    assert dataset.to_list() == CALLS
    write_jsonl(concatenate([dataset.select([0, 2]), dataset.select([1])]), tmp_path / "y.jsonl")
    assert load_examples(str(tmp_path / "y.jsonl")).to_list() == [CALLS[0], CALLS[2], CALLS[1]]


@pytest.mark.parametrize("team", [{}, {"team": "red", "size": None}])
def test_tool_calls_of_parquet_lose_what_its_columns_filled_in(tmp_path, team):
    rows = [CALLS[0] | team, calling("mail", {"to": "Bob"}) | team, calling("ping", {}) | team, CALLS[2] | team]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert load_examples(str(tmp_path / "x.parquet")).to_list() == rows


def test_tools_may_be_json_and_mean_nothing_where_there_is_no_chat(tmp_path):
    row = CALLS[0] | {"tools": json.dumps(CALLS[0]["tools"])}
    assert training_columns(load_examples(jsonl(tmp_path / "x.jsonl", row))).to_list() == [row]
    dataset = load_examples(jsonl(tmp_path / "y.jsonl", {"text": "a", "tools": "hammer"}))
    assert training_columns(dataset).column_names == ["text"]


def test_a_column_beside_the_examples_may_mix_types(tmp_path):
    rows = [{"text": "a", "id": 1, "about": {"n": 1}}, {"text": "b", "id": "x", "about": {"n": "one"}}]
    assert load_examples(jsonl(tmp_path / "x.jsonl", *rows)).to_list() == rows


def test_a_value_of_csv_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "x.csv").write_text("text\n" + "word " * 30_000)
    assert len(load_examples(str(tmp_path / "x.csv"))[0]["text"]) == 150_000
    assert csv.field_size_limit() == limit


# Writing


@quick
@given(
    rows=st.lists(
        st.fixed_dictionaries({"prompt": filled, "completion": filled, "n": st.none() | st.integers(-9, 9)}),
        min_size=1,
        max_size=5,
    ),
    conversational=st.booleans(),
)
def test_written_rows_read_back_identical(rows, conversational):
    if conversational:
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    dataset = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "client.jsonl")
        write_jsonl(dataset, path)
        assert [entry.name for entry in Path(directory).iterdir()] == ["client.jsonl"]
        again = load_examples(str(path))
    assert again.to_list() == rows
    assert again.features == dataset.features


def test_writing_replaces_and_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(numbered(2), path)
    write_jsonl(numbered(3), path)
    with pytest.raises(DataError, match=r"x.jsonl can't be written as JSON, so convert or drop that column: .* bytes"):
        write_jsonl(Dataset.from_dict({"text": [b"\0"]}), path)
    assert len(load_examples(str(path))) == 3
    assert os.listdir(tmp_path) == ["x.jsonl"]
    with pytest.raises(OutputError, match=r"missing/x.jsonl can't be written: No such file or directory."):
        write_jsonl(numbered(2), tmp_path / "missing" / "x.jsonl")
    with pytest.raises(OutputError, match=r"can't be written: Not a directory."):
        write_jsonl(numbered(2), path / "x.jsonl")


# The built-in corpus


def test_standard_library_is_large_uneven_and_conversational(stdlib):
    assert stdlib.column_names == ["prompt", "completion", "package"]
    assert 4000 < len(stdlib) < 9000
    sizes = Counter(stdlib["package"])
    for package, expected in {"tkinter": 570, "asyncio": 238, "email": 209, "logging": 188}.items():
        assert 0.7 * expected < sizes[package] < 1.4 * expected, package
    assert not {"test", "site-packages", "__pycache__"} & set(sizes)
    assert is_conversational(training_columns(stdlib)[0])
    pairs = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in stdlib]
    assert len(set(pairs)) == len(pairs)
    assert all(prompt.startswith("Write the docstring.\n") and prompt.endswith(":") for prompt, _ in pairs)
    assert all(30 <= len(completion) <= 800 for _, completion in pairs)


def test_standard_library_packages_make_clients_that_survive_a_file(stdlib, tmp_path):
    clients = split_by_column(stdlib, "package")
    assert sum(len(part) for part in clients.values()) == len(stdlib)
    write_jsonl(clients["email"], tmp_path / "email.jsonl")
    assert load_examples(str(tmp_path / "email.jsonl")).to_list() == clients["email"].to_list()


LIBRARY = '''
import abc
class Shape:
    class Part:
        async def join(self, *, other: int = 1) -> "Part":
            """Join this part with another one."""
    if abc:
        @property
        def area(self):
            """   The area in square metres.

                Indented.
            """
            def helper(x, /):
                """A helper function inside of a method."""
    def short(self):
        """Too short."""
def again():
    """This very pair stands here twice."""
def again():
    """This very pair stands here twice."""
def escape():
    """An invalid \\d escape warns in the parser."""
'''


def test_pairs_of_a_known_library(tmp_path, monkeypatch):
    for directory in ("shapes", "test", "site-packages/pip", "shapes/tests"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "code.py").write_text(LIBRARY)
    (tmp_path / "again.py").write_text('def again():\n    """This very pair stands here twice."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    pairs = stdlib_corpus.standard_library_pairs()
    assert [(row["package"], row["prompt"][0]["content"].split("\n", 1)[1]) for row in pairs] == [
        ("again", "def again():"),
        ("shapes", "class Part:\n    async def join(self, *, other: int=1) -> 'Part':"),
        ("shapes", "class Shape:\n    def area(self):"),
        ("shapes", "def helper(x, /):"),
        ("shapes", "def escape():"),
    ]
    assert pairs[2]["completion"] == [{"role": "assistant", "content": "The area in square metres.\n\nIndented."}]


def test_an_interpreter_without_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="holds no Python source with docstrings; use another interpreter"):
        load_examples("stdlib")


def test_no_other_module_of_the_library_needs_datasets():
    assert data.datasets is datasets
    source = Path(stdlib_corpus.__file__).read_text(encoding="utf-8")
    assert "datasets" not in source


class Example(dict):
    """An example that can be watched."""


def test_tokens_become_a_table_a_thousand_examples_at_a_time():
    made, alive = [], []

    def examples():
        for number in range(2500):
            example = Example(input_ids=[number] * (number % 7), labels=[-100] * (number % 7))
            made.append(weakref.ref(example))
            if number % 100 == 0:
                alive.append(sum(each() is not None for each in made))
            yield example

    dataset = from_tokens(examples())
    assert max(alive) <= 1002
    assert {str(field.type) for field in dataset.data.schema} == {"list<item: int32>"}
    assert dataset[1003] == {"input_ids": [1003] * 2, "labels": [-100] * 2}
    assert list_lengths(dataset.select([8, 0, 2004]), "labels") == [1, 0, 2]
    assert len(from_tokens([])) == 0
