"""What is said while something is waited for."""

from types import SimpleNamespace

from hf_fedlarge.patience import Patience, Trouble


def test_what_goes_on_being_wrong_is_said_at_growing_pauses(monkeypatch):
    now, said = 0.0, []
    monkeypatch.setattr("hf_fedlarge.patience.time", SimpleNamespace(monotonic=lambda: now))
    trouble = Trouble(lambda line: said.append((now, line)))
    while now < 7200:
        trouble("the line is dead")
        if now == 100:
            trouble("the disk is full")
        now += 5
    assert said[:5] == [(0, "the line is dead"), (60, "the line is dead"), (100, "the disk is full")] + [
        (when, "the line is dead") for when in (180, 420)
    ]
    assert len(said) == 12


def test_progress_is_said_when_it_changes_and_names_some_of_many():
    said = []
    patience = Patience(said.append, poll=1, seconds=1)
    for there in (0, 0, 1, 1, 30):
        patience.progress(f"{there} of 30", [f"c{number}" for number in range(there, 30)])
    assert [line.partition(";")[0] for line in said] == ["0 of 30", "1 of 30", "30 of 30"]
    assert said[0].endswith("c18, c19 and 10 more")
    assert said[2] == "30 of 30"
