"""The example data: enough of it, one schema a file, no prompt in two splits, and the preference that it states."""

import itertools
import json
import re

import datasets
import pytest
from conftest import ROOT

from quickstart import follows_rule

DATA = ROOT / "data"
FILES = {  # file: columns, least rows, split it loads as
    "finetune/train.jsonl": (["prompt", "response"], 400, "train"),
    "finetune/chats/chats.jsonl": (["messages"], 80, "train"),
    "reward/train.jsonl": (["prompt", "chosen", "rejected"], 500, "train"),
    "evaluation/test.jsonl": (["prompt", "chosen", "rejected"], 120, "test"),
    "rl/prompts.jsonl": (["prompt"], 250, "train"),
}
ROWS = {file: [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()] for file in FILES}


def prompts(file):
    """The prompts of a file; of a chat, its first question."""
    return [
        row["prompt"] if "prompt" in row else next(m["content"] for m in row["messages"] if m["role"] == "user")
        for row in ROWS[file]
    ]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_what_its_readme_says(file):
    """Columns, number of rows, plain UTF-8 lines, texts without blanks around them, no prompt twice; its folder loads
    as one split."""
    columns, least, split = FILES[file]
    content, rows = (DATA / file).read_bytes(), ROWS[file]
    assert b"\r" not in content and content.endswith(b"\n") and b"\n\n" not in content
    assert len(rows) >= least and all(list(row) == columns for row in rows)
    assert all(row[column] == row[column].strip() != "" for row in rows for column in columns if column != "messages")
    assert len({prompt.lower() for prompt in prompts(file)}) == len(rows)
    loaded = datasets.load_dataset("json", data_dir=str((DATA / file).parent))
    assert {name: (part.column_names, len(part)) for name, part in loaded.items()} == {split: (columns, len(rows))}
    counts = re.findall(r"^\| `(\S+\.jsonl)` \| (\d+) ", (DATA / "README.md").read_text(encoding="utf-8"), re.M)
    assert dict(counts)[file] == str(len(rows))
    assert {path.relative_to(DATA).as_posix() for path in DATA.rglob("*.jsonl")} == set(FILES)


def test_chats_take_turns():
    """Some have a system turn, some go on for several questions; roles alternate and end with the assistant's."""
    for row in ROWS["finetune/chats/chats.jsonl"]:
        roles = [turn["role"] for turn in row["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(set(turn) == {"role", "content"} and turn["content"].strip() for turn in row["messages"])
    assert len({len(row["messages"]) for row in ROWS["finetune/chats/chats.jsonl"]}) > 2


def test_no_prompt_is_in_two_splits():
    """No two prompts of different files share more than seven tenths of their words."""
    words = {file: [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts(file)] for file in FILES}
    for one, two in itertools.combinations(FILES, 2):
        for a, b in itertools.product(words[one], words[two]):
            assert len(a & b) <= 0.7 * len(a | b), f"{one} and {two}: {sorted(a)}, {sorted(b)}"


@pytest.mark.parametrize("file", ["reward/train.jsonl", "evaluation/test.jsonl"])
def test_chosen_answers_follow_the_rule_and_rejected_ones_seldom_do(file):
    """The ways in which rejected answers miss it are all there: lists, broken off, rambling."""
    rejected = [row["rejected"] for row in ROWS[file]]
    assert all(follows_rule(row["chosen"]) for row in ROWS[file])
    assert sum(map(follows_rule, rejected)) <= 0.15 * len(rejected)
    assert sum("\n" in text for text in rejected) >= 0.05 * len(rejected)
    assert sum(not re.search(r"[.!?)]$", text) for text in rejected) >= 0.1 * len(rejected)
    assert sum(len(text.split()) > 60 for text in rejected) >= 0.2 * len(rejected)


def test_the_finetuning_answers_leave_the_preference_open():
    """A quarter to less than half of them follow the rule, so that PPO has something to teach."""
    short = [follows_rule(row["response"]) for row in ROWS["finetune/train.jsonl"]]
    assert 0.25 <= sum(short) / len(short) <= 0.45
