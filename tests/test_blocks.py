"""The copied blocks: byte for byte the same in every file that carries them.

`python tests/test_blocks.py` copies the blocks of training_sft.py into the other scripts after an edit there.
"""

import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MASTER = "training_sft.py"
CARRIERS = {
    "base": ["training_sft.py", "training_reward_model.py", "training_rl.py", "merge_with_lora.py"],
    "flags": ["training_sft.py", "training_reward_model.py", "training_rl.py"],
    "text": ["training_sft.py", "training_reward_model.py", "training_rl.py"],
    "run": ["training_sft.py", "training_reward_model.py", "training_rl.py"],
}


def find_block(text, name):
    """(start, end) of the block `name`, with its opening and closing comment lines."""
    match = re.search(rf"^# >>> block {name}: .*?^# <<< block {name}$", text, re.MULTILINE | re.DOTALL)
    assert match, f"block {name} is missing"
    return match.span()


def read_block(file, name):
    text = (ROOT / file).read_text(encoding="utf-8")
    start, end = find_block(text, name)
    return text[start:end]


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in CARRIERS.items() for file in files])
def test_blocks_are_the_same_in_every_script(name, file):
    master, copy = read_block(MASTER, name), read_block(file, name)
    diff = difflib.unified_diff(master.splitlines(), copy.splitlines(), MASTER, file, lineterm="")
    assert master == copy, "\n".join(diff)


@pytest.mark.parametrize("name", CARRIERS)
def test_the_opening_line_names_the_files_and_this_test(name):
    opening = read_block(MASTER, name).splitlines()[0]
    assert re.findall(r"\w+\.py", opening) == [*CARRIERS[name], "test_blocks.py"]


@pytest.mark.parametrize("file", sorted({file for files in CARRIERS.values() for file in files}))
def test_no_script_carries_a_block_that_is_not_listed(file):
    names = re.findall(r"^# >>> block (\w+):", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(name for name, files in CARRIERS.items() if file in files)


if __name__ == "__main__":
    for name, files in CARRIERS.items():
        for file in files:
            path = ROOT / file
            if not path.exists():
                continue
            text = path.read_text(encoding="utf-8")
            start, end = find_block(text, name)
            path.write_text(text[:start] + read_block(MASTER, name) + text[end:], encoding="utf-8")
