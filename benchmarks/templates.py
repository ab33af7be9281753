"""Every chat template that TRL ships, through the scripts' PromptFormat: which turns are trained on, and what ends them.

    python benchmarks/templates.py    # prints the table and writes benchmarks/results/templates.json

A tiny byte-level tokenizer stands in for each model's own; it gets the special tokens that the template writes.
"""

import json
import re
import sys
from pathlib import Path

import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DIRECTORY = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.jinja"))
# What stands in a template between brackets of these kinds is a special token of its model.
SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_]+\|>|<｜[^｜]+｜>|<\|turn>|<turn\|>|<(?:start|end)_of_(?:turn|utterance)>|\[gMASK\]|<sop>|</?s>|<image>"
)
EOS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "gptoss": "<|return|>", "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>", "llava": "</s>", "muse": "<|eot|>", "nemotron": "<|im_end|>", "qwen": "<|im_end|>",
}  # fmt: skip


def make_tokenizer(name):
    """A byte-level BPE tokenizer with the template `name` and its special tokens; EOS where the model has it."""
    template = (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    # Line breaks stay together whatever follows, as in the tokenizers that these templates come with.
    pieces = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["The quick brown fox.\n\nThe lazy dog.\n\n"] * 3, trainer)
    eos = next((token for start, token in EOS.items() if name.startswith(start)), "<eos>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, pad_token=eos)
    special = {*SPECIAL.findall(template), "<|system|>", "<|user|>", "<|assistant|>"}
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(special)])
    plain = ["<think>", "</think>"] + ["\n", "\n\n"] * name.startswith("gemma")  # added tokens that are not special
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    fast.chat_template = template
    return fast


def make_chat(pairs, system=False):
    """`pairs` questions and answers, some of several lines."""
    chat = [{"role": "system", "content": "Be brief.\nBe kind."}] if system else []
    for i in range(pairs):
        chat.append({"role": "user", "content": f"Question {i}?\n\nPlease."})
        chat.append({"role": "assistant", "content": f"Answer {i}.\nYes, the quick brown fox."})
    return chat


def trained_texts(prompt_format, chat):
    """The stretches of tokens that are trained on, as text, in order."""
    ids, mask = prompt_format.encode(chat)
    stretches = [[]]
    for token, trained in zip(ids, mask):
        if trained:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [prompt_format.tokenizer.decode(stretch) for stretch in stretches if stretch]


def examine(name, sft):
    """One line of the table."""
    try:
        prompt_format = sft.make_eos_end_turns(sft.PromptFormat(make_tokenizer(name), "chat"))
        chat = make_chat(3)
        prompt = prompt_format.encode(chat[:-1], open_end=True)[0]
        assert prompt_format.encode(chat)[0][: len(prompt)] == prompt
        texts = trained_texts(prompt_format, chat)
        before, after = texts[-1].split(chat[-1]["content"])
        earlier = [text.split(turn["content"])[1] for text, turn in zip(texts, chat[1::2])] if len(texts) == 3 else []
    except ValueError as error:
        return {"template": name, "refused": str(error)}
    return {
        "template": name,
        "trained_turns": f"{len(texts)} of 3",
        "before_answer": before,
        "end": after,
        "end_of_earlier_turns": earlier[0] if earlier else None,
        "system": "own turn" if prompt_format.has_system else "opens the first question",
    }


if __name__ == "__main__":
    import training_sft

    rows = [examine(name, training_sft) for name in NAMES]
    print(f"{'template':34}{'trained':9}{'end of turn':38}{'trained before the answer'}")
    for row in rows:
        if "refused" in row:
            print(f"{row['template']:34}refused: {row['refused']}")
            continue
        note = "" if row["end_of_earlier_turns"] in (None, row["end"]) else " (earlier turns: not trained)"
        note += "" if row["system"] == "own turn" else f"; system {row['system']}"
        print(f"{row['template']:34}{row['trained_turns']:9}{row['end'] + note:38} {row['before_answer'] or ''!r}")
    refused = sum("refused" in row for row in rows)
    print(f"{len(rows)} templates: {len(rows) - refused} handled, {refused} refused")
    results = ROOT / "benchmarks" / "results" / "templates.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
