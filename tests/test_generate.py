"""What a model answers to prompts, against transformers' own `generate`, and the files it is asked and answers in."""

import json

import pytest
import torch
from families import make_checkpoint
from federation import LORA, make_federation, make_update
from transformers import AutoModelForCausalLM

from hf_fedlarge.artifacts import describe_files
from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.data import load_prompts
from hf_fedlarge.errors import ConfigError, DataError
from hf_fedlarge.evaluation import generate_texts, load_model
from hf_fedlarge.generate import generate, read_prompts
from hf_fedlarge.package import load_tokenizer, stream_checkpoint

CHAT = [{"role": "user", "content": "Say red 3."}]
ROWS = [{"prompt": "a longer text, of which more tokens come"}, {"prompt": CHAT}, {"prompt": "Say"}]
TOOL = {"type": "function", "function": {"name": "look", "description": "It looks.", "parameters": {}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, its package, and an adapter that changes much."""
    path = tmp_path_factory.mktemp("generate")
    make_federation(path)
    make_update(path / "update", path / "package", "ann", lora=LORA)
    aggregate_updates([path / "update"], path / "package", path / "adapter")
    return path


def run(*words):
    return main([str(word) for word in words])


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_answer(model, tokenizer, ids, **how):
    output = model.generate(torch.tensor([ids]), do_sample=False, pad_token_id=tokenizer.pad_token_id, **how)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def test_prompts_answered_together_are_answered_as_each_alone_by_transformers(home):
    tokenizer = load_tokenizer(home / "checkpoint")
    stock = AutoModelForCausalLM.from_pretrained(home / "checkpoint", dtype=torch.float32)
    streamed = stream_checkpoint(home / "checkpoint", dtype=torch.float32).eval()
    chats = [row["prompt"] if row["prompt"] is CHAT else [{"role": "user", "content": row["prompt"]}] for row in ROWS]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    expected = [plain_answer(stock, tokenizer, row, max_new_tokens=12) for row in ids]
    done = []
    assert generate_texts(streamed, tokenizer, ROWS, max_new_tokens=12, batch_size=2, progress=done.append) == expected
    assert done == sorted(done)
    assert done[-1] == 36
    assert len(done) > 20  # a step is a token of each
    assert len(set(expected)) == 3

    # One ends before the others.
    last = stock.generate(torch.tensor([ids[1]]), do_sample=False, max_new_tokens=4)[0, -1].item()
    for model in (stock, streamed):
        model.generation_config.eos_token_id = last
    expected = [plain_answer(stock, tokenizer, row, max_new_tokens=12) for row in ids]
    assert generate_texts(streamed, tokenizer, ROWS, max_new_tokens=12) == expected


def test_texts_are_continued_plainly_where_that_is_asked_for_or_there_is_no_template(home):
    tokenizer = load_tokenizer(home / "checkpoint")
    stock = AutoModelForCausalLM.from_pretrained(home / "checkpoint", dtype=torch.float32)
    streamed = stream_checkpoint(home / "checkpoint", dtype=torch.float32).eval()
    expected = plain_answer(stock, tokenizer, tokenizer("Say")["input_ids"], max_new_tokens=6)
    rows = [{"prompt": "Say", "tools": "of a text nobody looks at these"}]
    assert generate_texts(streamed, tokenizer, rows, max_new_tokens=6) != [expected]
    assert generate_texts(streamed, tokenizer, rows, max_new_tokens=6, plain=True) == [expected]
    tokenizer.chat_template = None
    assert generate_texts(streamed, tokenizer, rows, max_new_tokens=6) == [expected]
    with pytest.raises(DataError, match="no chat template"):
        generate_texts(streamed, tokenizer, [{"prompt": CHAT}], plain=True)


def test_a_chat_s_tools_are_rendered(home, monkeypatch):
    tokenizer, seen = load_tokenizer(home / "checkpoint"), []
    plain = tokenizer.apply_chat_template

    def render(*args, **options):
        seen.append(options["tools"])
        return plain(*args, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", render)
    rows = [{"prompt": CHAT, "tools": [TOOL]}, {"prompt": CHAT, "tools": json.dumps([TOOL])}, {"prompt": CHAT}]
    generate_texts(load_model(home / "package"), tokenizer, rows, max_new_tokens=1)
    assert seen == [[TOOL], [TOOL], None]


def test_more_tokens_than_there_are_positions_are_refused(tmp_path):
    model = load_model(make_checkpoint(tmp_path / "gpt2", "gpt2", tokenizer=True))
    with pytest.raises(
        ConfigError, match="A prompt of 500 tokens and 13 new ones are more than the 512 that this gpt2"
    ):
        generate_texts(model, load_tokenizer(tmp_path / "gpt2"), [{"prompt": "x" * 500}], max_new_tokens=13, plain=True)


def test_rows_are_read_with_what_is_expected_and_all_else(tmp_path):
    answer = {"role": "assistant", "content": "red"}
    texts = write(
        tmp_path / "texts.jsonl",
        {"prompt": "Say red.", "completion": "red", "id": 7},
        {"prompt": "Say blue.", "id": 8},
        {"prompt": CHAT, "completion": "", "id": 9},
    )
    assert read_prompts(str(texts)) == [
        {"prompt": "Say red.", "id": 7, "expected": "red"},
        {"prompt": "Say blue.", "id": 8},
        {"prompt": CHAT, "id": 9},
    ]
    chats = write(tmp_path / "chats.jsonl", {"messages": [*CHAT, answer, *CHAT, answer, answer]}, {"messages": CHAT})
    assert read_prompts(str(chats)) == [
        {"prompt": [*CHAT, answer, *CHAT], "expected": [answer, answer]},
        {"prompt": CHAT},
    ]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "a"}, "has the columns text; expected 'messages', or 'prompt'."),
        ({"prompt": " "}, "Row 1 of .* has an empty 'prompt'"),
        ({"prompt": [{"role": "user"}]}, "Row 1 of .* has a message in 'prompt' without a role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "Row 1 of .* has 'messages' of the assistant alone"),
    ],
)
def test_rows_that_ask_nothing_are_refused(tmp_path, row, sentence):
    with pytest.raises(DataError, match=sentence):
        read_prompts(str(write(tmp_path / "rows.jsonl", row)))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no examples"):
        load_prompts(str(write(tmp_path / "rows.jsonl")))


def test_answers_are_printed(home, capsys, monkeypatch):
    assert run("generate", home / "package", "--prompt", "Say red.", "--max-new-tokens", 4) == 0
    said = capsys.readouterr()
    assert said.err.startswith("computing on ")
    [text] = generate(home / "package", [{"prompt": "Say red."}], max_new_tokens=4)
    assert len(said.out) >= len(text)
    [other] = generate(home / "package", [{"prompt": "Say red."}], adapter=home / "adapter", max_new_tokens=4)
    assert other != text

    # A model may write what a terminal would obey.
    monkeypatch.setattr("hf_fedlarge.generate.generate", lambda *args, **how: ["a\tb\n\x1b[2Jc", "d"])
    assert run("generate", home / "package", "--prompt", "Say\nred.", "Say blue.") == 0
    assert capsys.readouterr().out == "[1] Say red.\na       b\n?[2Jc\n[2] Say blue.\nd\n"


def test_answers_are_written_whole_or_not_at_all(home, tmp_path, capsys, monkeypatch):
    prompts = write(
        tmp_path / "prompts.jsonl", {"prompt": "Say é.", "completion": "é", "id": 1}, {"prompt": CHAT, "id": 2}
    )
    words = ["generate", home / "checkpoint", "--adapter", home / "adapter", "--prompts", prompts]
    words += ["--max-new-tokens", 3, "-o", tmp_path / "answers.jsonl"]
    before = describe_files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("hf_fedlarge.generate.generate_texts", None)
        with pytest.raises(TypeError):
            run(*words)
    assert describe_files(tmp_path) == before

    assert run(*words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'answers.jsonl'}: 2 answers\n"
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    expected = generate(home / "checkpoint", read_prompts(str(prompts)), adapter=home / "adapter", max_new_tokens=3)
    assert rows == [
        {"prompt": "Say é.", "completion": expected[0], "id": 1, "expected": "é"},
        {"prompt": CHAT, "completion": expected[1], "id": 2},
    ]
    before = describe_files(tmp_path)
    assert run(*words) == 2
    assert "answers.jsonl exists already; choose another file, or remove it." in capsys.readouterr().err
    assert describe_files(tmp_path) == before
