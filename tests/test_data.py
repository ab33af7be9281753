"""The example data: enough of it, one schema a file, no prompt in two splits, and the preference that it states."""

import itertools
import json
import re
from pathlib import Path

import datasets
import pytest
from conftest import ROOT

from quickstart import follows_rule

DATA = ROOT / "data"
FILES = {  # file -> columns, least rows, split it loads as
    "finetune/train.jsonl": (["prompt", "response"], 400, "train"),
    "finetune/chats/chats.jsonl": (["messages"], 80, "train"),
    "reward/train.jsonl": (["prompt", "chosen", "rejected"], 500, "train"),
    "evaluation/test.jsonl": (["prompt", "chosen", "rejected"], 120, "test"),
    "rl/prompts.jsonl": (["prompt"], 250, "train"),
}


def read(file):
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


def prompts(file):
    """The prompts of a file; of a chat, its first question."""
    return [
        row["prompt"]
        if "prompt" in row
        else next(turn["content"] for turn in row["messages"] if turn["role"] == "user")
        for row in read(file)
    ]


def test_these_are_all_the_files():
    assert sorted(path.relative_to(DATA).as_posix() for path in DATA.rglob("*.jsonl")) == sorted(FILES)


@pytest.mark.parametrize("file", FILES)
def test_rows_have_the_columns_and_there_are_enough(file):
    columns, least, _ = FILES[file]
    assert len(read(file)) >= least
    for row in read(file):
        assert list(row) == columns
        for text in [row[column] for column in columns if column != "messages"]:
            assert text == text.strip() != ""


@pytest.mark.parametrize("file", FILES)
def test_files_are_utf8_with_plain_line_ends(file):
    content = (DATA / file).read_bytes()
    content.decode("utf-8")
    assert b"\r" not in content and content.endswith(b"\n") and b"\n\n" not in content


def test_chats_take_turns():
    for row in read("finetune/chats/chats.jsonl"):
        roles = [turn["role"] for turn in row["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(set(turn) == {"role", "content"} and turn["content"].strip() for turn in row["messages"])
    counts = {len(row["messages"]) for row in read("finetune/chats/chats.jsonl")}
    assert len(counts) > 2  # some have a system turn, some go on for several questions


@pytest.mark.parametrize("file", FILES)
def test_a_folder_loads_as_the_readme_says(file):
    columns, _, split = FILES[file]
    loaded = datasets.load_dataset("json", data_dir=str((DATA / file).parent))
    assert {name: (rows.column_names, len(rows)) for name, rows in loaded.items()} == {
        split: (columns, len(read(file)))
    }


def test_no_prompt_is_in_two_splits():
    words = {file: [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts(file)] for file in FILES}
    for one, two in itertools.combinations(FILES, 2):
        for a, b in itertools.product(words[one], words[two]):
            assert len(a & b) <= 0.7 * len(a | b), f"{one} and {two}: {sorted(a)}, {sorted(b)}"


@pytest.mark.parametrize("file", FILES)
def test_prompts_differ_and_are_no_template(file):
    found = prompts(file)
    assert len({prompt.lower() for prompt in found}) == len(found)
    openings = [" ".join(prompt.split()[:3]) for prompt in found]
    assert max(openings.count(opening) for opening in set(openings)) <= len(found) / 8


@pytest.mark.parametrize("file", ["reward/train.jsonl", "evaluation/test.jsonl"])
def test_chosen_answers_follow_the_rule_and_rejected_ones_seldom_do(file):
    rows = read(file)
    assert [row["chosen"] for row in rows if not follows_rule(row["chosen"])] == []
    rejected = [row["rejected"] for row in rows]
    assert sum(map(follows_rule, rejected)) <= 0.15 * len(rows)  # the short ones that hedge or go in a circle
    # The ways in which they miss it are all there.
    assert sum("\n" in text for text in rejected) >= 0.05 * len(rows)  # lists
    assert sum(not re.search(r"[.!?)]$", text) for text in rejected) >= 0.1 * len(rows)  # broken off
    assert sum(len(text.split()) > 60 for text in rejected) >= 0.2 * len(rows)  # rambling


def test_the_finetuning_answers_leave_the_preference_open():
    short = [follows_rule(row["response"]) for row in read("finetune/train.jsonl")]
    assert 0.25 <= sum(short) / len(short) <= 0.45


def test_the_readme_counts_are_right():
    table = (DATA / "README.md").read_text(encoding="utf-8")
    counts = {
        Path(file).as_posix(): int(rows) for file, rows in re.findall(r"^\| `(\S+\.jsonl)` \| (\d+) ", table, re.M)
    }
    assert counts == {file: len(read(file)) for file in FILES}
