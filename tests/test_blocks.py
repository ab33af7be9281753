"""The text block, schema to text and token ids, is byte for byte the same in the three training scripts."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARRIERS = ["training_sft.py", "training_reward_model.py", "training_rl.py"]


def read_block(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    match = re.search(r"^# >>> (block )?text: .*?^# <<< (block )?text$", text, re.MULTILINE | re.DOTALL)
    assert match, f"{file} has no text block"
    return match[0]


def test_the_text_block_is_the_same_in_every_training_script():
    assert len({read_block(file) for file in CARRIERS}) == 1
