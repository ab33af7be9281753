"""Reward model: a language model with a scalar score head, trained on pairs of a preferred and a rejected answer.

In: a model (hub id, directory, or LoRA adapter directory) and a data set with the columns `prompt`, `chosen` and
`rejected` (texts, or chat message lists) or `question`, `response_j` (preferred) and `response_k`, and maybe `margin`.
Out, in --output_dir: `final_checkpoint/` (model or adapter with its score head, tokenizer, run.json, model card),
resumable `checkpoint-N/`, `metrics.jsonl` (one line per log event) and `metrics.json` (final figures and report).
AutoPeftModelForSequenceClassification loads it (AutoModelForSequenceClassification a full model) by
`.from_pretrained(directory, num_labels=1, pad_token_id=tokenizer.pad_token_id)`. The score is read at the last token.

    python training_reward_model.py --model_path checkpoints/sft/final_checkpoint --dataset_name json \
        --subset data/reward --train_split train --eval_subset data/evaluation --output_dir checkpoints/reward \
        --use_lora --per_device_train_batch_size 4
    python training_reward_model.py --model_path checkpoints/reward/final_checkpoint --dataset_name json \
        --eval_subset data/evaluation --output_dir checkpoints/report --eval_only
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "trl==1.12.0", "transformers>=5.20,<6", "peft>=0.21,<1", "accelerate>=1.15,<2",
#                 "datasets>=5.0,<6", "bitsandbytes>=0.49"]
# ///

import argparse
import copy
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import types
import warnings
from pathlib import Path


def fail(message):
    """Say in one line what the user can mend, and leave with exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


# >>> text: the same in training_sft.py, training_reward_model.py, training_rl.py (tests/test_text.py)
def to_messages(value, role):
    """A column's value as messages: a list as it is, a text as one turn of `role`, or as the turns of a dialogue in the
    form of Anthropic's hh-rlhf."""
    turns = re.split(r"\n\n(Human|Assistant):", value) if isinstance(value, str) else []
    if len(turns) > 1 and not turns[0]:
        roles = ({"Human": "user", "Assistant": "assistant"}[name] for name in turns[1::2])
        return [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[2::2]) if text.strip()]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def first_role(messages):
    """The role of the first turn of a list of messages, else None."""
    first = messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}
    return first.get("role", first.get("from"))


def drop_nulls(value):
    """Without the keys that Arrow adds to a row because other rows have them."""
    if isinstance(value, list):
        return [drop_nulls(part) for part in value]
    return {k: drop_nulls(part) for k, part in value.items() if part is not None} if isinstance(value, dict) else value


THOUGHTS = ("reasoning_content", "thinking")  # keys of a turn beside its content, in templates that write them


def read_messages(messages, last):
    """`messages` as turns of system (may be left out), user, assistant, ..., `last`; raises ValueError.

    {from, value} is read as {role, content}, `developer` as system, a number as its JSON text; a system turn without text
    is none. Tool calls and turns of the role `tool` are kept as they are."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError("should be a list of {role, content}")
    names, turns = {"developer": "system", "human": "user", "gpt": "assistant"}, []
    for turn in map(drop_nulls, messages):
        role, content = turn.pop("from", turn.get("role")), turn.pop("value", turn.get("content"))
        role = names.get(role, role)
        content = json.dumps(content) if isinstance(content, int | float) else content
        calls = role == "assistant" and turn.get("tool_calls")
        if role == "system" and not str(content or "").strip():
            continue
        expected = ("user", "assistant", "tool") if turns and turns[-1]["role"] != "system" else ("system", "user")
        if role not in expected:
            expected = " or ".join(expected[:2])
            raise ValueError(f"should have the role {expected} in turn {len(turns)}, not {str(turn)[:80]}")
        if not (calls or (isinstance(content, str) and content.strip())):
            raise ValueError(f"should have text in turn {len(turns)} ({role}), not {str(turn)[:80]}")
        more = turn if calls or role == "tool" else {key: turn[key] for key in THOUGHTS if turn.get(key)}
        turns.append({**more, "role": role, "content": content or ""})
    if not turns or turns[-1]["role"] != last or turns[-1].get("tool_calls"):
        raise ValueError(f"should end with the role {last}, not {str(messages[-1:])[:80]}")
    return turns


class PromptFormat:
    """A conversation as token ids: `chat`, the tokenizer's template, or `qa`, the text `Question: ...\\n\\nAnswer: ...`.

    The ids of a prompt are the first ids of prompt + answer, whatever the tokenizer: the text is cut where an answer
    starts (in `qa` before its space), and no token lies across the cut. Special tokens spelled out in data stay text.
    Answers are trained on, with the token that ends them; one that the template shows in another way once it is not
    the last (reasoning templates drop thoughts) is context."""

    def __init__(self, tokenizer, name):
        """Raises ValueError for a tokenizer without EOS, and for a template that does not write answers."""
        self.tokenizer, self.name = tokenizer, name
        self.end = self.tail = ""  # of a turn: its last token, and what follows that
        self.has_runs = False  # of turns of one role
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so no answer could ever end")
        bare, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        self.bos = ids[: ids.index(bare[0])]  # what this tokenizer puts before a text: BOS, [CLS] or nothing
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        special -= {"<think>", "</think>"}  # where data has these, thoughts are meant
        longest_first = sorted(special, key=lambda token: (-len(token), token))  # in one order: it is hashed for caches
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        if name == "chat":
            self._learn_template({*special, *(str(token) for token in added if str(token).strip())})  # Gemma has "\n"

    def _learn_template(self, tokens):
        marks = {"system": "\ue002", "user": "\ue003", "assistant": "\ue004"}
        system, question, answer = ({"role": role, "content": mark} for role, mark in marks.items())
        self.thought = ""
        prompt, turn = self._render([question], open_end=True), self._render([question, answer])
        if not turn.startswith(prompt):  # the prompt opens a thought, but answers have none (DeepSeek-R1)
            self.thought = re.search(r"(<think>\s*)?$", prompt)[0]
        _, mark, self.after = turn.partition("\ue004")
        if not mark:
            raise ValueError("the chat template does not write answers; use --prompt_format qa")
        # A turn ends with the special tokens after it, or else (GLM) the one that opens the next turn.
        following = self._render([question, answer, question]).partition(mark)[2]
        ends = re.compile(rf"\s*({'|'.join(map(re.escape, tokens))})+")
        self.end = next((found[0] for found in map(ends.match, (self.after, following)) if found), "")
        self.tail = self.after[len(self.end) :] if self.end else ""
        self.has_system = self._takes([system, question, answer])
        self.has_runs = self._takes([question, question, answer, answer])

    def _takes(self, messages):
        try:
            text = self._render(messages)
        except ValueError:
            return False
        return all(text.count(turn["content"]) == messages.count(turn) for turn in messages)

    def _render(self, messages, open_end=False, tools=None):
        write = self.tokenizer.apply_chat_template
        try:
            text = write(messages, tools=tools, tokenize=False, add_generation_prompt=open_end)
        except Exception as error:  # templates refuse roles and orders with exceptions of their own
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return text.removesuffix(self.thought) if open_end else text

    def _guard(self, text):
        """Put U+E000 after each character of what looks like a special token, and after U+E000 itself."""
        return re.sub(f"{self.special.pattern}|\ue000", lambda found: re.sub("(?s)(.)", "\\1\ue000", found[0]), text)

    def _write(self, turns, open_end, tools):
        """The text, its contents guarded, and where in it [start, end, start, end, ...] the assistant writes."""
        messages = []
        for turn in turns:
            texts = {key: part for key, part in turn.items() if isinstance(part, str) and key != "role"}
            turn = {**turn, **{key: self._guard(text) for key, text in texts.items()}}
            if "tool_calls" in turn:
                turn["tool_calls"] = json.loads(self._guard(json.dumps(turn["tool_calls"], ensure_ascii=False)))
            alike = messages and turn.keys() == messages[-1].keys() == {"role", "content"}
            if alike and turn["role"] == messages[-1]["role"] and (turn["role"] == "system" or not self.has_runs):
                turn["content"] = f"{messages.pop()['content']}\n\n{turn['content']}"
            messages.append(turn)
        if self.name == "qa":  # earlier turns join the question
            if tools or any("tool_calls" in turn or turn["role"] == "tool" for turn in messages):
                raise ValueError("tools need a chat template")
            texts = [turn["content"] for turn in messages if turn["content"]]
            answer = "" if open_end else f" {texts.pop()}"
            prompt = "Question: " + "\n\n".join(texts) + "\n\nAnswer:"
            return prompt + answer, [len(prompt), len(prompt + answer)]
        if messages[0]["role"] == "system" and not self.has_system:  # Gemma 2: it opens the first question
            system, question, *rest = messages
            messages = [{**question, "content": f"{system['content']}\n\n{question['content']}"}, *rest]
        text, cuts = self._render(messages, open_end, tools), []
        names = [tool.get("function", tool).get("name", "") for tool in tools or () if isinstance(tool, dict)]
        if not all(name in messages[0]["content"] for name in names) and text == self._render(messages, open_end):
            raise ValueError("the chat template leaves out the tools")
        for i, turn in enumerate(messages):
            content = "".join(turn["content"].split())  # templates trim contents, and set thoughts in lines
            calls = [call.get("function", call).get("name", "") for call in turn.get("tool_calls", ())]
            needed = calls if turn["role"] == "assistant" else [content]
            if not all(part in "".join(text.split()) for part in needed):
                raise ValueError(f"the chat template leaves out text of turn {i} ({turn['role']})")
            if turn["role"] != "assistant" or calls:
                continue
            prompt, shown = self._render(messages[:i], True, tools), self._render(messages[: i + 1], False, tools)
            body, last = shown.removesuffix(self.after), i == len(messages) - 1
            thoughts = ["".join(turn[key].split()) for key in THOUGHTS if key in turn]
            if last and thoughts and not any(thought in "".join(shown.split()) for thought in thoughts):
                raise ValueError(f"the chat template leaves out the thoughts of turn {i}")
            text = body + self.end if last else text
            whole = shown == body + self.after and body.startswith(prompt) and "".join(body.split()).endswith(content)
            if whole and text.startswith(body):  # gpt-oss ends earlier turns with another token: that is context
                cuts += [len(prompt), len(body) + len(self.end) * text.startswith(self.end, len(body))]
            elif last:
                raise ValueError("the chat template does not write the whole last answer; use --prompt_format qa")
        return text, cuts

    def _read(self, text):
        """Ids of a guarded text, in which the special tokens of the template alone are special (in `qa` none)."""
        guarded, ids = "\ue000" in text, []
        for i, piece in enumerate(self.special.split(text) if guarded else [text]):
            piece = re.sub("\ue000(\ue000?)", r"\1", piece)
            plain = self.name == "qa" or (guarded and i % 2 == 0)
            ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids

    def encode(self, messages, open_end=False, tools=None):
        """Token ids, and 1 for each that the assistant wrote (else 0), two lists; raises ValueError.

        `messages`: of read_messages(); `tools`: JSON schemas that chat templates describe. With `open_end` the ids are a
        prompt that an answer follows."""
        text, cuts = self._write(messages, open_end, tools or None)  # Llama 3 writes of functions also for []
        ids = list(self.bos) if self.name == "qa" else []  # a chat template writes its own
        mask, done = [0] * len(ids), 0
        for n, cut in enumerate([*cuts, len(text)]):
            # A piece reads as it does after the text before it (from the last special token on), unless a token of that
            # reading lies across the cut; then as after a line break or a letter (alone, SentencePiece adds a space).
            start = max((found.start() for found in self.special.finditer(text, 0, done)), default=0)
            for before in (text[start:done], "\n", "a", ""):
                known, both = self._read(before), self._read(before + text[done:cut])
                if both[: len(known)] == known:
                    break
            ids, mask, done = ids + both[len(known) :], mask + [n % 2] * (len(both) - len(known)), cut
        if not open_end and (self.name == "qa" or not self.end):
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, 1]
        return ids, mask

    def end_id(self):
        """The id that ends an answer in this format."""
        return self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[0][-1]

    def tail_ids(self):
        """Ids of what a chat template writes after that token: in ChatML a line break."""
        return self._read(self.end + self.tail)[len(self._read(self.end)) :]

    def stop_ids(self, generation_config=None):
        """Every id that may end an answer: the format's, the tokenizer's EOS, and those of the model."""
        eos = getattr(generation_config, "eos_token_id", None)
        return sorted({self.end_id(), self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})


def pick_format(requested, natural, recorded, tokenizer):
    """The PromptFormat that is requested, else that of the earlier stage, else what the data calls for (ValueError)."""
    if requested == "chat" and not tokenizer.chat_template:
        raise ValueError("--prompt_format chat: this tokenizer has no chat template; use --prompt_format qa")
    name = requested if requested != "auto" else recorded or natural
    return PromptFormat(tokenizer, name if tokenizer.chat_template else "qa")


def make_eos_end_turns(prompt_format):
    """The format with a tokenizer whose EOS ends a turn, so that every reader of the checkpoint stops there."""
    if prompt_format.name == "qa":
        return prompt_format
    tokenizer = prompt_format.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(prompt_format.end_id())
    return PromptFormat(tokenizer, "chat")  # templates may write eos_token (Phi-3)


# <<< text


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`."""

    def number(text):
        if not low <= kind(text) <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} should be {limits}")
        return kind(text)

    return number


class Parser(argparse.ArgumentParser):
    """It takes hyphens for underscores, and a flag by the name that it has in the other scripts."""

    aliases = {"--batch_size": "--per_device_train_batch_size", "--split": "--train_split"}

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        self.words = [re.sub(r"^--[\w-]+", self.find_name, word) for word in words]
        return super().parse_known_args(self.words, namespace)

    def find_name(self, found):
        flag = f"--{found[0][2:].replace('-', '_')}"
        return self.aliases.get(flag, flag)

    def format_help(self):
        return re.sub(r"\s+\(default:\s+(None|False|\[\])\)", "", super().format_help())

    def error(self, message):
        known = self._option_string_actions
        flags = [word.partition("=")[0] for word in self.words if word.startswith("--")]
        near = [(flag, difflib.get_close_matches(flag, known, 1)) for flag in flags if flag not in known]
        hint = "".join(f"; {flag}: is {found[0]} meant?" for flag, found in near if found)
        fail(f"{message}{hint} (see {self.prog} --help)")


def build_parser():
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False, formatter_class=style)
    add = parser.add_argument
    add("--model_path", required=True, help="hub id, model directory or LoRA adapter directory")
    add("--dataset_name", required=True, help="hub id, folder, file, or json/parquet/arrow/csv")
    add("--dataset_config", help="configuration of a hub data set that has several")
    add("--subset", help="data_dir of the data set, e.g. data/reward")
    add("--train_split", default="train", help='split to train on, e.g. "train[:95%%]"')
    add("--eval_subset", help="data_dir of the evaluation split (that of --subset)")
    add("--eval_split", help="split to evaluate on (test with --eval_subset, else none)")
    add("--per_device_train_batch_size", type=number(int, 1), default=1, help="pairs per device and step")
    add("--max_length", type=number(int, 2), default=1024, help="longest text in tokens; longer pairs are left out")
    add("--max_steps", type=number(int, 1), help="optimizer steps; goes before --num_train_epochs")
    add("--num_train_epochs", type=number(float, 1e-9), default=1.0, help="passes over the data")
    add("--center_rewards_coefficient", type=number(float, 0), help="weight of (sum of the two scores)^2, e.g. 0.01")
    add("--eval_only", action="store_true", help="no training: the report on a reward model, and scores.jsonl")
    add("--output_dir", required=True, help="directory for checkpoints and metrics; empty, unless the run resumes")
    add("--overwrite_output_dir", action="store_true", help="replace the checkpoints and metrics in --output_dir")
    add("--resume_from_checkpoint", nargs="?", const=True, metavar="DIR", help="go on from DIR, or from the newest")
    add("--dry_run", action="store_true", help="check everything, show the data as it would be trained on, and stop")
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="columns of the data that have other names")
    add("--max_samples", type=number(int, 1), help="use at most this many rows of each split")
    add("--prompt_format", choices=["auto", "chat", "qa"], default="auto", help="chat template, or Question/Answer")
    add("--bf16", action="store_true", help="bfloat16 mixed precision (frozen weights in bfloat16)")
    add("--fp16", action="store_true", help="float16 mixed precision; needs a GPU")
    add("--use_lora", action="store_true", help="train a LoRA adapter in place of all weights")
    add("--lora_r", type=number(int, 1), help="LoRA rank (16 where the adapter is new)")
    add("--lora_alpha", type=number(float, 0), help="LoRA scale, applied as alpha / r (32 where the adapter is new)")
    add("--lora_dropout", type=number(float, 0, 1), help="LoRA dropout probability (0 where the adapter is new)")
    add("--lora_target_modules", nargs="+", metavar="NAME", help="module names, or one regular expression (all-linear)")
    add("--load_in_4bit", action="store_true", help="frozen weights in 4 bit (NF4); needs LoRA")
    add("--load_in_8bit", action="store_true", help="frozen weights in 8 bit; needs LoRA")
    add("--learning_rate", type=number(float, 0), help="peak learning rate (1e-4 with LoRA, 1e-5 without)")
    add("--lr_scheduler_type", default="linear", help="linear, cosine, constant, constant_with_warmup, ...")
    add("--warmup_ratio", type=number(float, 0, 1), default=0.0, help="fraction of the steps spent on warm-up")
    add("--weight_decay", type=number(float, 0), default=0.0, help="AdamW weight decay")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="gradient clipping, L2 norm; 0 for none")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="micro-batches per batch")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--shard_base", action="store_true", help="LoRA: each of several processes holds a share of the frozen weights")
    add("--attn_implementation", help="sdpa, eager, flash_attention_2, ... (the model's default)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of everything that is random")
    add("--logging_steps", type=number(int, 1), default=10, help="steps between two log lines")
    add("--save_steps", type=number(int, 1), default=500, help="steps between two checkpoints")
    add("--save_total_limit", type=number(int, 1), default=2, help="checkpoints kept")
    add("--eval_steps", type=number(int, 1), help="steps between two evaluations (at the end only)")
    add("--report_to", nargs="+", default=["none"], metavar="NAME", help="trackio, tensorboard, wandb")
    add("--push_to_hub", action="store_true", help="upload the final checkpoint under the name of --output_dir")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any other field of RewardConfig")
    return parser


def is_missing(path):
    """Whether it can only be a path, and is not there; `a/b` may be on the hub."""
    is_file = re.search(r"\.(jsonl?|ndjson|csv|parquet)(\.gz)?$", path)
    return not Path(path).exists() and (re.match(r"[.~/\\]|[A-Za-z]:", path) or path.count("/") > 1 or is_file)


def parse_flags(argv=None):
    """The flags, checked as far as that needs no library."""
    args = build_parser().parse_args(argv)
    args.use_lora |= Path(args.model_path, "adapter_config.json").is_file()
    args.processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 1e-5
    if args.eval_subset and not args.eval_split:
        args.eval_split = "test"
    trl = next((found.version for found in importlib.metadata.distributions(name="trl")), "none")
    quantized = args.load_in_4bit or args.load_in_8bit
    evaluates = args.eval_steps or args.eval_only
    cut = os.environ.get("ACCELERATE_USE_FSDP") and (args.use_lora or os.environ.get("FSDP_VERSION") != "2")
    cut = cut or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    shard, one = args.shard_base, args.processes == 1
    unlike = quantized or args.fp16 or os.environ.get("ACCELERATE_USE_DEEPSPEED")
    needed = {"torch": (2, 8), "transformers": (5, 23)}  # the first to train adapters on a shared base
    old = [name for name in needed if (*map(int, importlib.metadata.version(name).split(".")[:2]),) < needed[name]]
    launched = [pair for pair in args.set if re.match("fsdp|deepspeed|accelerator_config|parallelism_config", pair)]
    lora = [f"--{name}" for name in vars(args) if name.startswith("lora_") and getattr(args, name) is not None]
    problems = {
        f"this script needs trl 1.12.0, found {trl}: pip install trl==1.12.0": trl != "1.12.0",
        f"--model_path {args.model_path} does not exist": is_missing(args.model_path),
        f"--dataset_name {args.dataset_name} does not exist": is_missing(args.dataset_name),
        f"{' '.join(lora)} without --use_lora: all weights would be trained": lora and not args.use_lora,
        "--set fsdp and --set deepspeed are the launcher's: accelerate launch --config_file": launched,
        "--bf16 and --fp16 exclude each other": args.bf16 and args.fp16,
        "--load_in_4bit and --load_in_8bit exclude each other": args.load_in_4bit and args.load_in_8bit,
        "quantized weights cannot be trained themselves: add --use_lora": quantized and not args.use_lora,
        "--eval_steps and --eval_only need pairs: --eval_split or --eval_subset": evaluates and not args.eval_split,
        "--eval_only trains nothing: leave --resume_from_checkpoint out": args.eval_only
        and args.resume_from_checkpoint,
        "of FSDP and ZeRO-3 only FSDP2 works here, without LoRA; with it use --shard_base, DDP or ZeRO-2": cut,
        "--shard_base needs several processes: accelerate launch, or torchrun --nproc_per_node 8": shard and one,
        "--shard_base needs --use_lora; all weights are for FSDP2 (accelerate config)": shard and not args.use_lora,
        "--shard_base excludes --load_in_4bit, --load_in_8bit, --fp16 and DeepSpeed; use --bf16": shard and unlike,
        f"--shard_base needs a newer version: pip install --upgrade {' '.join(old)}": shard and old,
    }
    for problem, there in problems.items():
        if there:
            fail(problem)
    return args


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    parse_flags()

# What they report is meant so: an optional CPU kernel; the padding token of the tokenizer, given to the model; a head
# that is missing in the base model.
silent = "bitsandbytes transformers.trainer_utils transformers.modeling_utils transformers.distributed.tensor_parallel"
for name in silent.split():
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # trl 1.12 uses names of before v6
warnings.filterwarnings("ignore", message="FSDP2-wrapped module|DTensor random operators")  # neither is relied on

import datasets
import numpy as np
import pandas
import peft
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from huggingface_hub import HfApi, get_token
from peft.helpers import disable_input_dtype_casting
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_callback import ProgressCallback
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# A JSON Lines file is read in one piece, for a column's type may show late; NA and None in CSV are text.
READERS = {"csv": {"keep_default_na": False}, "json": {"chunksize": 1 << 30}, "parquet": {}, "arrow": {}}
# What a resumed run may change and say nothing; what it may not change, for the result would be neither run.
FREE_ON_RESUME = """output_dir overwrite_output_dir resume_from_checkpoint max_steps num_train_epochs logging_steps save_steps
    save_total_limit eval_split eval_subset eval_steps report_to push_to_hub dry_run shard_base""".split()
SAME_ON_RESUME = """columns model_path dataset_name dataset_config subset train_split max_samples prompt_format max_length
    per_device_train_batch_size gradient_accumulation_steps use_lora lora_r lora_alpha lora_target_modules
    weight_decay processes""".split()
SCRIPTS = 4  # stands in run.json: this version resumes checkpoints of this version
WINDOWS = "(window|window_size|chunk_size|local_attention)$"  # what configs call the tokens that a layer sees
HEAD = "base_model.model.score.weight"  # in the file of an adapter
SCHEMAS = [("prompt", "chosen", "rejected"), ("question", "response_j", "response_k"), ("question", "chosen", "rejected"),
           ("chosen", "rejected")]  # fmt: skip
# Columns that hold the question of `chosen` and `rejected`, where there is no `prompt`.
QUESTIONS = ("instruction", "input", "query", "problem", "trajectory", "conversations", "context", "history")


def read_json(path):
    """The object in a JSON file, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_base(base):
    """Hash of a part of one weight matrix of a local base model, which training it in place would change; else None."""
    files = sorted(Path(base).glob("*.safetensors"))
    if not files:
        return None
    with safe_open(files[0], framework="pt") as file:
        matrices = sorted(name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2)
        rows = file.get_slice(matrices[len(matrices) // 2])[:64]
    return hashlib.sha256(rows.float().numpy().tobytes()).hexdigest()[:16]


def locate_model(args):
    """(base model, adapter directory or None, run.json of the earlier stage) behind --model_path."""
    folder = Path(args.model_path)
    run = read_json(folder / "run.json")
    adapter = read_json(folder / "adapter_config.json")
    base = adapter.get("base_model_name_or_path", args.model_path)
    if not base:
        fail(f"--model_path {folder}: its adapter_config.json names no base model")
    stage = run.get("parent_stage") if run.get("stage") == "merge" else run.get("stage")
    if not Path(base).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base):
        fail(f"--model_path {folder}: {base} is not there; it should be a model directory or a hub id")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        fail(f"--model_path {folder} holds no weights in safetensors; those of a run are in its final_checkpoint")
    if args.eval_only and stage not in (None, "reward"):
        fail(f"--model_path {folder} is of the stage {stage!r}, not a reward model")
    if adapter and run.get("base_digest") not in (None, digest_base(base)):
        fail(f"--model_path {folder}: the base model {base} has other weights than the one that it was trained on")
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules") if adapter else ():
        flag = f"lora_{name.removeprefix('lora_')}"
        own, given = adapter[name], getattr(args, flag)
        if isinstance(own, list) and given:
            own, given = sorted(own), sorted(given)
        if given not in (None, own, [own]):
            fail(f"--{flag}: the adapter {folder} has its own, {own}; leave the flag out")
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    return base, folder.resolve() if adapter else None, run


def make_config(args):
    """RewardConfig from the flags that have its fields' names, and --set; refuses what this machine does not have."""
    missing = {*args.report_to} - {"none", "all", *transformers.integrations.get_available_reporting_integrations()}
    old = args.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    problems = {
        "--bf16: this GPU cannot compute in bfloat16; use --fp16": old,
        "--fp16 needs a GPU; on a CPU use --bf16, or neither": args.fp16 and not torch.cuda.is_available(),
        "--push_to_hub needs a login: hf auth login": args.push_to_hub and not get_token(),
        f"--report_to: not installed: {', '.join(missing)}": missing,
    }
    for problem, there in problems.items():
        if there:
            fail(problem)
    if args.learning_rate >= 1e-2:
        print(f"warning: --learning_rate {args.learning_rate:g} is high: models break above 1e-3", file=sys.stderr)
    gpu = torch.accelerator.is_available()
    pairs = args.per_device_train_batch_size if gpu else 1  # on a CPU one at a time: the same gradient, less memory
    fields = {field.name for field in dataclasses.fields(RewardConfig) if field.init}
    values = {name: value for name, value in vars(args).items() if name in fields}
    values |= {
        "per_device_train_batch_size": pairs,
        "per_device_eval_batch_size": pairs,
        "gradient_accumulation_steps": args.gradient_accumulation_steps * args.per_device_train_batch_size // pairs,
        "max_steps": args.max_steps or -1,
        "max_length": None,  # longer pairs are left out already
        "disable_dropout": False,  # it would take --lora_dropout too; see load_classifier
        "warmup_steps": min(args.warmup_ratio, 0.999999),  # below 1: a fraction of the steps
        "eval_strategy": "steps" if args.eval_steps else "no",
        "use_cpu": not gpu,
        "data_seed": args.seed,  # the order of the pairs follows from it and the epoch
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN is to be seen
        "push_to_hub": False,  # at the end, by publish()
        "save_strategy": "steps",
    }
    for pair in args.set:
        name, equals, text = pair.partition("=")
        if not equals or name not in fields or name in values:
            fail(f"--set {pair}: should be FIELD=VALUE, of a field of RewardConfig that has no flag of its own")
        try:
            values[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            values[name] = text
    try:
        config = RewardConfig(**values)
        optimizer = torch.optim.SGD([torch.ones(1)], config.learning_rate)
        # some schedules need --set lr_scheduler_kwargs=...
        transformers.get_scheduler(config.lr_scheduler_type, optimizer, 1, 9, config.lr_scheduler_kwargs)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        fail(f"RewardConfig: {error}")
    config._n_gpu = min(config.n_gpu, 1)  # one process drives one GPU (no DataParallel); several: accelerate launch
    return config


def count_steps(checkpoint):
    """Optimizer steps of a checkpoint; 0 for one that was never completed: Trainer writes trainer_state.json last."""
    try:
        return read_json(checkpoint / "trainer_state.json").get("global_step", 0)
    except ValueError:  # killed while it was written
        return 0


def find_checkpoint(args):
    """The checkpoint to go on from, or None; a non-empty --output_dir is not overwritten by chance."""
    folder = Path(args.output_dir)
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        fail(f"--output_dir {folder}: {file} is a file")
    model = Path(args.model_path).resolve()
    if args.overwrite_output_dir and {*folder.resolve().glob("*checkpoint*")} & {model, *model.parents}:
        fail(f"--model_path {args.model_path} lies in --output_dir, which --overwrite_output_dir empties; take another")
    if not args.resume_from_checkpoint:
        if any(folder.glob("*")) and not args.overwrite_output_dir:
            fail(f"--output_dir {folder} is not empty; see --resume_from_checkpoint and --overwrite_output_dir")
        return None
    newest = max(filter(count_steps, folder.glob("checkpoint-*")), key=count_steps, default=None)
    checkpoint = newest if args.resume_from_checkpoint is True else Path(args.resume_from_checkpoint)
    if not checkpoint:
        print(f"no complete checkpoint in {folder}: starting from the beginning")
        return None
    if not count_steps(checkpoint):  # the directory of a run
        checkpoint = max(checkpoint.glob("checkpoint-*"), key=count_steps, default=checkpoint)
    run = read_json(checkpoint / "run.json")
    if not count_steps(checkpoint) or run.get("stage") != "reward" or run["versions"].get("scripts") != SCRIPTS:
        fail(f"--resume_from_checkpoint: {checkpoint} is no complete checkpoint of this version of this script")
    was, now = run["arguments"], json.loads(json.dumps(vars(args), default=str))
    changed = [name for name in now if name not in FREE_ON_RESUME and now[name] != was.get(name, now[name])]
    words = ", ".join(f"--{name} {now[name]} (was {was.get(name)})" for name in changed)
    if set(changed) & set(SAME_ON_RESUME):
        fail(f"--resume_from_checkpoint {checkpoint}: {words}: that would be neither run; resume with the same flags")
    if changed:
        print(f"resuming with other flags than before: {words}")
    places = (checkpoint.parent.resolve(), checkpoint.resolve().parent)  # a link may lead elsewhere
    elsewhere = folder.resolve() not in places and any(folder.glob("*checkpoint*"))
    later = newest and count_steps(newest) > count_steps(checkpoint)
    if (elsewhere or later) and not args.overwrite_output_dir:
        what = "another run" if elsewhere else f"a later checkpoint, {newest.name}"
        fail(f"--resume_from_checkpoint {checkpoint}: {folder} holds {what}; --overwrite_output_dir drops it")
    print(f"going on from {checkpoint}")
    return checkpoint


def open_output_dir(args, checkpoint):
    """Leave no checkpoint that is incomplete, or later than the one to go on from, and metrics.jsonl as that knows it."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {"global_step": 0, "log_history": []}
    if not args.resume_from_checkpoint:  # else they stay until there are new ones
        shutil.rmtree(folder / "final_checkpoint", ignore_errors=True)
        (folder / "scores.jsonl").unlink(missing_ok=True)
    for path in folder.glob("checkpoint-*"):
        if path.name[11:].isdigit() and not 0 < count_steps(path) <= state["global_step"]:
            shutil.rmtree(path)
    lines = [json.dumps({"step": entry["step"], **entry}) + "\n" for entry in state["log_history"]]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def find_source(name, subset):
    """(path, other arguments) of datasets.load_dataset for a file, a folder, a kind of files in `subset`, or a hub id."""
    place = Path(subset or "") if name in READERS else Path(name, subset or "")
    source, files = name, {"data_dir": subset and glob.escape(subset) if name in READERS else subset}
    kinds = {KINDS.get(path.suffix) for path in place.rglob("*")} - {None} if Path(name).is_dir() else ()
    if Path(name).is_file():
        suffix = Path(name.removesuffix(".gz")).suffix
        if suffix not in KINDS:
            fail(f"--dataset_name {name}: the kinds of files that are read are {' '.join(KINDS)}")
        source, files = KINDS[suffix], {"data_files": glob.escape(name)}
    elif (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():  # of save_to_disk
        parts = read_json(place / "dataset_dict.json").get("splits", ["train"])
        folders = {part: glob.escape(str(place / part if (place / part).is_dir() else place)) for part in parts}
        source, files = "arrow", {"data_files": {part: f"{folder}/*.arrow" for part, folder in folders.items()}}
    elif len(kinds) == 1 and not Path(name, "README.md").is_file():  # that names configurations
        source, files = kinds.pop(), {"data_dir": glob.escape(str(place))}
    return source, {**files, **READERS.get(source, {})}


def find_broken_line(files):
    """`FILE, line N: what is wrong there` of the first line in files of JSON Lines that is no JSON, or nothing."""
    for path in (Path(path) for path in files if path.endswith((".jsonl", ".ndjson"))):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                json.loads(line.strip() or b"{}")
            except ValueError as error:
                return f"{path}, line {number}: {getattr(error, 'msg', error)}"
    return ""


def load_split(args, subset, split, flag):
    """(rows, where): one split of the data set, at most --max_samples rows of it, and its name for messages."""
    source, options = find_source(args.dataset_name, subset)
    where = f"{args.dataset_name} {subset or ''}".strip()
    files = {}
    name, bracket, part = split.partition("[")
    try:
        files = datasets.load_dataset_builder(source, args.dataset_config, **options).config.data_files or {}
        if source == "csv":  # all is text, letter by letter
            columns = pandas.read_csv(next(iter(files.values()))[0], nrows=0).columns
            options["features"] = datasets.Features({column: datasets.Value("string") for column in columns})
        names = datasets.get_dataset_split_names(source, args.dataset_config, **options)
        if name not in names and len(names) == 1:  # datasets names splits after files: data/evaluation is `test`
            print(f"warning: {where} has one split, {names[0]!r}: used for {flag} {split}", file=sys.stderr)
            name = names[0]
        if name not in names:
            fail(f"{flag} {split}: {where} has the splits {', '.join(names)}")
        split = name + bracket + part
        rows = datasets.load_dataset(source, args.dataset_config, split=split, **options)
        rows.data.validate(full=True)  # Arrow takes a file that is not UTF-8
    except Exception as error:  # datasets raises dozens of types
        broken = find_broken_line(sum(files.values(), [])) if source == "json" else ""
        text = broken or f"{type(error).__name__} {error} {error.__cause__ or ''}"
        fail(f"{flag} {split}: {where} cannot be read: {text}")
    for new, _, column in (pair.partition("=") for pair in args.columns):
        if column not in rows.column_names:
            fail(f"--columns {new}={column}: {where} has the columns {', '.join(rows.column_names)}")
        rows = rows.remove_columns([new] if new in rows.column_names and new != column else [])
        rows = rows.rename_column(column, new) if new != column else rows
    if not len(rows):
        fail(f"{flag} {split}: {where} is empty; it should have at least one row")
    return rows.select(range(min(len(rows), args.max_samples or len(rows)))), f"{where} [{split}]"


def read_pair(row, schema):
    """(chosen, rejected): the row as two conversations. Raises ValueError with what is wrong with it."""
    *question, chosen, rejected = schema
    prompt = to_messages(row[question[0]], "user") if question else []
    system = row.get("system")
    sides = [to_messages(row[side], "assistant") for side in (chosen, rejected)]
    texts = row[chosen], row[rejected]
    if not question and len(sides[0]) == 1 and all(isinstance(text, str) for text in texts):
        start = re.sub(r"\S*$", "", os.path.commonprefix(texts))  # whole words
        asked = [name for name in QUESTIONS if name in row and str(row[name]).strip() not in start]
        if asked or not start.strip():
            column = asked[0] if asked else "COLUMN"
            raise ValueError(f"{chosen} + {rejected} are answers alone: --columns prompt={column} names the question")
        prompt = [{"role": "user", "content": start.strip()}]
        sides = [[{"role": "assistant", "content": text[len(start) :].strip()}] for text in texts]
    pair = []
    for name, messages in zip((chosen, rejected), sides):
        if first_role(messages) in ("assistant", "gpt"):
            messages = prompt + messages  # else it is a whole conversation, and `prompt` repeats its question
        if isinstance(system, str) and first_role(messages) not in (None, "system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        try:
            pair.append(read_messages(messages, last="assistant"))
        except ValueError as error:  # without the text, so that rows with one mistake are counted together
            raise ValueError(f"{' + '.join([*question, name])} {str(error).partition(', not ')[0]}") from error
    if pair[0][:-1] != pair[1][:-1]:
        raise ValueError(f"{chosen} and {rejected} differ before the last turn")
    if row.get("margin", 0) is None or not math.isfinite(row.get("margin", 0)):
        raise ValueError("margin is no number")
    return pair


def load_pairs(args, prompt_format, subset, side):
    """(pairs as `chosen_ids` and `rejected_ids`, and `margin` if the data have it; counts for run.json).

    Beside them stand `row`, the row's number; `size`, tokens, those that both texts begin with counted once; `longest`,
    tokens of the longer text. Left out are rows that are no pair (at most a tenth), pairs with a text over --max_length
    (a cut answer is not the one that was judged), of two equal texts, or equal to an earlier pair."""
    data, where = load_split(args, subset, getattr(args, f"{side}_split"), f"--{side}_split")
    max_length = args.max_length  # the whole args would spoil map's cache
    tail = prompt_format.tail_ids()  # the score stands at the end of what everybody's template writes
    schema = next((schema for schema in SCHEMAS if set(schema) <= set(data.column_names)), None)
    if not schema:
        needed = "; ".join(" + ".join(schema) for schema in SCHEMAS)
        names = ("prompt", "question", "chosen", "rejected")  # response_1 may be the better one or the worse
        near = {name: difflib.get_close_matches(name, names, 1, 0.9) for name in data.column_names if name not in names}
        hint = " ".join(f"{found[0]}={name}" for name, found in near.items() if found) or "NAME=COLUMN"
        there = ", ".join(data.column_names)
        fail(f"{where} has the columns {there}; one of these is needed: {needed}; --columns {hint} renames")

    try:
        if "margin" in data.column_names:  # of CSV it is a text
            data = data.cast_column("margin", datasets.Value("float64"))
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's
        fail(f"{where}: the column margin should have numbers: {error}")

    def encode_pair(row, number):
        tools = row.get("tools")
        try:
            tools = json.loads(tools or "null") if isinstance(tools, str) else drop_nulls(tools)
            pair = read_pair(row, schema)
            chosen, rejected = (prompt_format.encode(messages, tools=tools)[0] + tail for messages in pair)
            reason = "of two equal texts" if chosen == rejected else ""
        except ValueError as error:
            chosen, rejected, reason = [], [], str(error)
        longest = max(len(chosen), len(rejected))
        if longest > max_length:
            reason = f"longer than --max_length {max_length}"
        size = len(chosen) + len(rejected) - len(os.path.commonprefix([chosen, rejected]))
        ids = {"chosen_ids": chosen or [0], "rejected_ids": rejected or [0]}  # Arrow takes no type from empty lists
        found = {"reason": reason, "digest": digest([chosen, rejected, row.get("margin")])}
        return {"row": number, **ids, "size": size, "longest": longest, **found}

    others = [name for name in data.column_names if name != "margin"]
    workers = min(os.cpu_count() or 1, len(data) // 2000) or None  # where there is work for several
    workers = None if os.name == "nt" else workers  # there each would import torch again
    rows = data.map(encode_pair, with_indices=True, remove_columns=others, num_proc=workers, desc="Tokenizing")
    found, seen = {"": []}, set()  # {reason to leave them out: numbers of the rows}
    for i, (reason, pair) in enumerate(zip(rows["reason"][:], rows["digest"][:])):
        reason = "equal to an earlier pair" if pair in seen and not reason else reason
        seen.add(pair)
        found.setdefault(reason, []).append(i)
    kept = found.pop("")
    reasons = "; ".join(f"{len(those)} {reason} (rows {str(those[:3])[1:-1]})" for reason, those in found.items())
    misshapen = rows["longest"][:].count(0)
    if misshapen > len(rows) / 10 or not kept:
        fail(f"{where}: {misshapen} of {len(rows)} rows are no pairs, {len(kept)} are left to use: {reasons}")
    print(f"{where}: schema {' + '.join(schema)}, format {prompt_format.name}; {len(kept)} of {len(rows)} pairs kept")
    if unread := sorted({*others} - {*schema, "system", "tools"}):
        print(f"  columns that are not read: {', '.join(unread)}")
    lengths = sorted(longest for longest in rows["longest"][:] if longest)
    if lengths[-1] > max_length:
        most, nearly_all = (lengths[math.ceil(part * len(lengths)) - 1] for part in (0.95, 0.99))
        print(f"  --max_length {most} keeps 95% of the pairs, {nearly_all} 99%")
    if len(kept) < len(rows) / 2:
        print(f"warning: {where}: fewer than half of the rows are kept", file=sys.stderr)
    print(f"  left out: {reasons or 'none'}{'; the column margin is used' if 'margin' in rows.column_names else ''}")
    counts = {"where": where, "rows": len(kept), "left_out": {reason: len(those) for reason, those in found.items()}}
    return rows.select(kept).remove_columns(["reason", "digest"]), counts


def show_pairs(rows, tokenizer):
    """Two pairs as text: what both begin with, then the end of each in double brackets."""
    print("two pairs: what both texts begin with, then in [[...]] the end of each, up to the token that is scored")
    for row in (rows[i] for i in sorted({0, len(rows) // 2})):
        shared = len(os.path.commonprefix([row["chosen_ids"], row["rejected_ids"]]))
        print(f"--- row {row['row']}\n{tokenizer.decode(row['chosen_ids'][:shared])}")
        for side in ("chosen", "rejected"):
            print(f"[[{side}: {tokenizer.decode(row[side + '_ids'][shared:])}]]")


def collate_shared(rows):
    """A batch in which each row is a pair: what both texts begin with, then the end of each, at least a token.

    `segments` (rows, length) say what a token is of: 0 the beginning, 1 and 2 the ends, 3 padding."""
    ids, segments = [], []
    for row in rows:
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        shared = min(len(os.path.commonprefix([chosen, rejected])), len(chosen) - 1, len(rejected) - 1)
        ids.append(torch.tensor(chosen + rejected[shared:]))
        segments.append(torch.tensor([0] * shared + [1] * (len(chosen) - shared) + [2] * (len(rejected) - shared)))
    batch = {"input_ids": pad_sequence(ids, True), "segments": pad_sequence(segments, True, padding_value=3)}
    batch["attention_mask"] = (batch["segments"] < 3).long()  # RewardTrainer counts tokens by it
    if "margin" in rows[0]:
        batch["margin"] = torch.tensor([row["margin"] for row in rows])
    return batch


def score_texts(model, input_ids, attention_mask, segments=None, **kwargs):
    """The classifier's forward: scores (texts, 1) at the last token, and hidden states (texts, width) there, all chosen
    before all rejected texts. With `segments` a token sees the beginning and its own text up to itself.

    The classifier's own looks for the last token that is not padding, and passes over an EOS that serves as padding.
    The head works in float32: in bfloat16, scores near 2 would come in steps of 0.016."""
    kind = input_ids.device.type
    inputs = {"attention_mask": attention_mask, "use_cache": False}
    lasts = attention_mask.sum(1)[None] - 1  # (texts in a row, rows)
    if segments is not None:
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
        seen = ((segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])).tril()
        inputs["attention_mask"] = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
        inputs["position_ids"] = (seen.sum(-1) - 1) * attention_mask
        lasts = torch.stack([(segments <= text).sum(1) - 1 for text in (1, 2)])
    hidden = model.base_model(input_ids, **inputs).last_hidden_state
    ends = hidden[torch.arange(len(hidden), device=hidden.device), lasts].flatten(0, 1)
    with torch.autocast(kind, enabled=False):
        return SequenceClassifierOutput(logits=model.score(ends.float()), hidden_states=ends)


def precision(args):
    """The type of activations and of frozen weights."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else torch.float32


def run_batch(model, batch, args):
    """The model's output for a collated batch, computed as in training."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    with torch.no_grad(), torch.autocast(model.device.type, precision(args), args.fp16 or args.bf16):
        return model(**inputs)


def can_share(model, rows, args):
    """Whether the two texts of a pair can share a row in this classifier, for it to compute the same.

    The mask of such a row stands in for all of the model's own, so no layer may have a narrower one, or carry a state
    from one end to the next. Tried on the pair with the longest text."""
    if model.config._attn_implementation not in ("sdpa", "eager"):  # flash attention would take it for a 2-D one
        return False
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if model._is_stateful or layers - {"full_attention", "sliding_attention", "chunked_attention"}:
        return False
    longest = int(np.argmax(rows["longest"][:]))
    windows = [value for name, value in vars(config).items() if re.search(WINDOWS, name)]
    if any(isinstance(window, int) and 1 < window < rows["longest"][longest] for window in windows):
        return False
    pair = rows.select_columns(["chosen_ids", "rejected_ids"])[longest]
    try:
        shared = run_batch(model, collate_shared([pair]), args).hidden_states
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it takes no such mask
        return False
    alone = run_batch(model, DataCollatorForPreference(0)([pair]), args).hidden_states
    tolerance = 1e-3 if precision(args) == torch.float32 else 0.05
    return bool((shared - alone).abs().max() < tolerance * alone.abs().max())


def check_fit(args, config, model_config, adapter, tokens, rows):
    """Refuse a model that can be no reward model, or is too short for the pairs; put the number of steps into `config`."""
    if type(model_config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        name = (model_config.architectures or [model_config.model_type])[0]
        fail(f"{name} has no sequence classifier in transformers; training_rl.py rewards it by --reward_function")
    if getattr(model_config, "quantization_config", None) and not args.use_lora:
        fail(f"--model_path {args.model_path} is stored in 4 or 8 bit: add --use_lora")
    how = {"attn_implementation": args.attn_implementation, "trust_remote_code": args.trust_remote_code}
    targets = args.lora_target_modules or []
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(copy.deepcopy(model_config), **how)
        modules = [name for name, _ in model.named_modules()]
        known = {t for t in targets for name in modules if f".{name}".endswith(f".{t}")}
        pattern = targets[0] if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]) else "(?!)"
        known |= {pattern for name in modules if re.fullmatch(pattern, name)}
    except (ImportError, ValueError, re.error) as error:
        flags = f"--attn_implementation {args.attn_implementation}, --lora_target_modules {' '.join(targets)}"
        fail(f"--model_path {args.model_path}, {flags}: {str(error)[:300]}")
    if targets != ["all-linear"] and {*targets} - known:
        names = sorted({name.rpartition(".")[2] for name in list_linear_layers(model)})
        fail(f"--lora_target_modules {min({*targets} - known)}: there is no such layer; there are {', '.join(names)}")
    if not hasattr(model, "score"):
        fail(f"{type(model).__name__} has no scalar head named score, as reward models have here")
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        fail(f"--gradient_checkpointing: transformers has none for {type(model).__name__}")
    if args.shard_base:
        layers = {re.sub(r"\.\d+$", ".*", name) for name in modules}
        special = getattr(model_config, "quantization_config", None) or count_embeddings(adapter)
        if special or not any("*" in name for name in layers & {*model.fsdp_plan}):
            fail(f"--shard_base: no plan for {model_config.model_type}, or 4 or 8 bit, or embeddings in the adapter")
    embeddings = count_embeddings(adapter) or model_config.get_text_config().vocab_size
    if tokens > embeddings and args.use_lora:
        fail(f"--model_path {args.model_path}: {tokens} tokens, but embeddings for {embeddings}: the new ones would not be "
             "trained; train them in SFT first, or leave --use_lora out, and they are added")  # fmt: skip
    longest = max(max(split["longest"][:]) for split in rows.values())
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > positions:
        fail(f"--max_length {args.max_length}: the model has {positions} positions, the longest text {longest} tokens")
    if args.eval_only:
        return
    pairs = rows["train"]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * config.world_size
    config.max_steps = args.max_steps or math.ceil(args.num_train_epochs * math.ceil(len(pairs) / batch))
    tokens = sum(map(len, pairs["chosen_ids"])) + sum(map(len, pairs["rejected_ids"]))
    print(f"{config.max_steps} steps of {batch} pairs; an epoch has {len(pairs)} pairs, {tokens} tokens, "
          f"{sum(pairs['size'][:])} with what the two texts of a pair begin with counted once")  # fmt: skip


def load_format(args, base, adapter, run):
    """(the model's config, the PromptFormat); the tokenizer pads with a token that ends no text, if it has one to spare.

    Libraries that score a padded batch read the last token that is not padding; where EOS is that, it gets lost."""
    config = transformers.AutoConfig.from_pretrained(base, num_labels=1, trust_remote_code=args.trust_remote_code)
    place = adapter if adapter and (adapter / "tokenizer_config.json").is_file() else base
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code)
    found = pick_format(args.prompt_format, "chat", run.get("prompt_format"), tokenizer)
    prompt_format = make_eos_end_turns(found)
    if "reward" in (run.get("stage"), run.get("parent_stage")) and prompt_format.tail_ids() and not run.get("score_at"):
        fail(f"--model_path {args.model_path} is of an earlier version, which read scores elsewhere: train it again")
    ends = [*prompt_format.stop_ids(), *prompt_format.tail_ids()]
    if tokenizer.pad_token_id in (None, *ends):
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        tokenizer.pad_token_id = min(special - {*ends, tokenizer.bos_token_id}, default=tokenizer.eos_token_id)
    return config, prompt_format


def count_embeddings(adapter):
    """Rows of the embeddings that an adapter directory brings along, None where it has none."""
    if not adapter:
        return None
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if re.search(r"(embed|wte|lm_head)\w*(\.base_layer)?\.weight$", name)]
        return file.get_slice(names[0]).get_shape()[0] if names else None


def load_classifier(args, base, adapter, config, tokens, device):
    """(model, whether its head is new): the base model with a score head, embeddings for as many `tokens`, no dropout, and
    the adapter on it.

    Weights that are trained are float32 (under autocast a bfloat16 AdamW step of 1e-5 would round to nothing); frozen
    ones have the precision the model computes in, the head is always float32."""
    settings = vars(config.get_text_config())
    rates = [name for name, value in settings.items() if "drop" in name and isinstance(value, float)]
    saved = {name: settings[name] for name in {*rates, "output_router_logits"} & {*settings}}
    settings.update(dict.fromkeys(saved, 0.0))  # no dropout, and no auxiliary loss of experts
    how = {"config": config, "attn_implementation": args.attn_implementation}
    how["dtype"] = precision(args) if args.use_lora or args.eval_only else torch.float32
    if args.load_in_4bit or args.load_in_8bit:
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=args.load_in_4bit, load_in_8bit=args.load_in_8bit, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=precision(args),
        )  # fmt: skip
    if args.shard_base:
        how["distributed_config"] = transformers.DistributedConfig(fsdp_size=PartialState().num_processes)
    elif device.type != "cpu":
        how["device_map"] = {"": device}
    transformers.set_seed(args.seed)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, use_safetensors=True, output_loading_info=True, **how
    )
    rows = count_embeddings(adapter) or max(config.get_text_config().vocab_size, tokens)
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    model.config = copy.deepcopy(model.config)
    vars(model.config.get_text_config()).update(saved)  # what is saved keeps both
    if args.shard_base:  # the head is whole in every process
        weight, width = model.score.weight.full_tensor(), model.score.in_features
        model.score = torch.nn.Linear(width, 1, bias=False, device="meta")
        model.score.weight = torch.nn.Parameter(weight)
    model.score.float()
    new_head = "score.weight" in info["missing_keys"]
    if missing := sorted({*info["missing_keys"]} - {"score.weight"}):
        fail(f"{base} lacks {len(missing)} weights of a {type(model).__name__}: {missing[0]}")
    if new_head:
        # Scores start near 0, as the last layer of a policy does in Andrychowicz et al. 2021 (arXiv:2006.05990, 3.2).
        std = 0.01 * getattr(model.config.get_text_config(), "initializer_range", 0.02)  # OPT names it otherwise
        torch.nn.init.normal_(model.score.weight, std=std)  # that of the first process, which Trainer hands to all
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # 4 bit, packed in a pass in eval mode: no gradients
            module.support_avx512bf16_for_cpu = False
    model.forward = types.MethodType(score_texts, model)
    return add_lora(args, model, adapter, new_head) if args.use_lora else (model, new_head)


def list_linear_layers(model):
    """Names of the linear layers without the head, without routers (those of PhiMoE return tuples), and without the
    out_proj of recurrent layers, whose kernels read the weight themselves."""
    linear = (torch.nn.Linear, transformers.Conv1D)
    layers = {name: type(layer).__name__ for name, layer in model.named_modules() if isinstance(layer, linear)}
    names = [name for name, kind in layers.items() if "Router" not in kind and name != "score"]
    return [name for name in names if not (model._is_stateful and name.endswith("out_proj"))]


def add_lora(args, model, adapter, new_head):
    """(model with a new LoRA adapter or the one in `adapter`, whether its head is new): an SFT adapter has no head."""
    targets = args.lora_target_modules or ["all-linear"]
    targets = list_linear_layers(model) if targets == ["all-linear"] else targets
    lora = peft.LoraConfig(
        r=args.lora_r or 16, lora_alpha=32 if args.lora_alpha is None else args.lora_alpha, task_type="SEQ_CLS",
        target_modules=targets if len(targets) > 1 or re.fullmatch(r"[\w.]+", targets[0]) else targets[0],
        lora_dropout=args.lora_dropout or 0.0,
    )  # fmt: skip
    if adapter:
        lora = peft.PeftConfig.from_pretrained(adapter)
        lora.task_type, lora.inference_mode = "SEQ_CLS", False
        lora.modules_to_save = sorted({*(lora.modules_to_save or ())} - {"score", "classifier"})  # PEFT adds both
    transformers.set_seed(args.seed)  # an adapter starts the same, whether the head is new or not
    model = peft.get_peft_model(model, lora)
    if args.shard_base:  # PEFT calls its forward(), past the hooks that gather weights
        model.base_model.forward = model.get_base_model().__call__
    if adapter:
        weights = peft.load_peft_weights(adapter, "cpu")
        new_head = new_head and HEAD not in weights
        weights.setdefault(HEAD, model.base_model.model.score.original_module.weight)
        peft.set_peft_model_state_dict(model, weights)
    return model, new_head


class RunCallback(ProgressCallback):
    """Trainer's bar with the loss on it, and log lines; writes metrics.jsonl and run.json, stops before a gradient that is
    not finite reaches the weights, and turns Ctrl-C and SIGTERM into a saved checkpoint."""

    def __init__(self, folder, run):
        super().__init__()
        self.folder, self.run, self.interrupted = folder, run, False
        self.shown = time.monotonic()

    def interrupt(self, signum, frame):
        self.interrupted = True
        signal.signal(signum, signal.default_int_handler)  # the second one leaves at once
        time.sleep(0.2)  # seconds, in which the same Ctrl-C ends `| tee`
        words = "stopping after this step and saving a checkpoint; once more to leave at once"
        for stream, text in ((sys.stdout, ""), (sys.stderr, words)):
            try:
                print(text, file=stream, flush=True)
            except OSError:  # nobody reads it: writing on would end the run
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        super().on_train_begin(args, state, control)
        # A checkpoint's rate would be kept for a step, 0 at the end of a finished run, and its peak for good.
        for i, factor in enumerate(getattr(lr_scheduler, "lr_lambdas", [])):
            lr_scheduler.base_lrs[i] = args.learning_rate
            rate = args.learning_rate * factor(lr_scheduler.last_epoch)
            optimizer.param_groups[i]["lr"] = lr_scheduler._last_lr[i] = rate  # the latter is what Trainer logs
        state.compute_steps(args, state.max_steps)  # a resumed run logs and saves by its own flags
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        names = ("loss", "eval_loss", "accuracy", "eval_accuracy", "margin", "grad_norm", "learning_rate", "epoch")
        figures = "  ".join(f"{name} {logs[name]:<9.4g}" for name in names if name in logs)
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.2f}")
        if {"loss", "eval_loss"} & {*logs}:
            tqdm.write(f"step {state.global_step:>6} of {state.max_steps}  {figures}".rstrip())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not args.fp16 and not torch.nn.utils.get_total_norm(gradients).isfinite():  # float16 scales by overflows
            last = max(self.folder.glob("checkpoint-*"), key=count_steps, default="none was saved")
            print(file=sys.stderr)  # ends the line of the progress bar
            fail(f"the gradient of step {state.global_step + 1} is NaN or infinite; the last good checkpoint: {last}")

    def on_substep_end(self, args, state, control, **kwargs):
        if self.training_bar is not None and time.monotonic() > self.shown + 5:  # seconds; a step may take minutes
            self.training_bar.refresh()
            self.shown = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control)
        if args.world_size > 1:  # all stop after the same step
            self.interrupted = reduce(torch.tensor(float(self.interrupted), device=args.device), "sum").item() > 0
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if self.run["arguments"]["shard_base"] and (control.should_save or state.global_step == 1):
            mine = (weight for weight in kwargs["model"].parameters() if weight.requires_grad)
            mine = hashlib.sha256(b"".join(weight.detach().cpu().numpy().tobytes() for weight in mine))
            if len({*gather_object([mine.hexdigest()])}) > 1:
                fail(f"--shard_base: adapters differ after step {state.global_step}; the checkpoints before are good")
        if control.should_save and state.is_world_process_zero:  # before trainer_state.json, which says: complete
            folder = self.folder / f"checkpoint-{state.global_step}"
            folder.mkdir(exist_ok=True)
            write_json(folder / "run.json", self.run)


def describe_run(args, base, adapter, parent, prompt_format, counts):
    """run.json: what the next stage, and whoever finds the checkpoint, needs to know."""
    tokenizer = prompt_format.tokenizer
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {
        "stage": "reward", "base_model": base, "base_digest": digest_base(base) if args.use_lora else None,
        "parent": str(adapter or base), "parent_stage": parent.get("stage"), "prompt_format": prompt_format.name,
        "chat_template_hash": digest(tokenizer.chat_template) if prompt_format.name == "chat" else None,
        "tokenizer_hash": digest(tokenizer.get_vocab()), "arguments": vars(args), "score_at": "the text's last token",
        "dataset": {"name": args.dataset_name, "subset": args.subset, **counts},
        "versions": {"scripts": SCRIPTS, **{name: importlib.metadata.version(name) for name in packages}},
    }  # fmt: skip


def load_checkpoint(model, checkpoint):
    """Take back all weights. transformers saves some under other names (experts, GPT-NeoX's head); Trainer's own way, with
    load_state_dict, passes over those."""
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict())


def train(args, config, checkpoint, model, rows, collate, prompt_format, run):
    """(the RewardTrainer after its last step, its metrics); warns where training does not fit into memory."""
    trained = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    needed = 12 * sum(weight.numel() for weight, _ in trained)  # bytes: float32 gradient and AdamW's two moments
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        print(f"warning: training takes {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free", file=sys.stderr)
    # The row that Trainer's first epoch begins with becomes the longest: too little memory shows in the first step.
    order = np.arange(len(rows["train"]))
    first = torch.randperm(len(order), generator=torch.Generator().manual_seed(config.seed))[0].item()
    longest = int(np.argmax(rows["train"]["size"][:]))
    order[[first, longest]] = order[[longest, first]]
    callback = RunCallback(Path(args.output_dir), run)
    pairs, tokenizer = rows["train"].select(order), prompt_format.tokenizer
    alone, config.save_only_model = config.save_only_model, args.shard_base or config.save_only_model  # it insists
    trainer = RewardTrainer(model, config, collate, pairs, rows.get("eval"), tokenizer)
    config.save_only_model = alone  # the optimizer of adapters is whole
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and args.shard_base}
    trainer.own = own or None  # PEFT would gather the base to find them
    if not args.use_lora and not trainer.is_fsdp_enabled:
        trainer._load_from_checkpoint = functools.partial(load_checkpoint, model)
    trainer._save = functools.partial(trainer._save, state_dict=trainer.own)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(callback)
    for weight, data in trained:  # RewardTrainer rounds them to bfloat16 on a quantized base
        weight.data = data.to(weight.device)
    if checkpoint and count_steps(checkpoint) >= config.max_steps:  # Trainer would take one more step
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state.global_step = count_steps(checkpoint)
        return trainer, {}
    with disable_input_dtype_casting(model):  # else LoRA keeps float32 copies of inputs
        metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    if callback.interrupted:
        print(f"\nsaved; go on with the same command and --resume_from_checkpoint ({args.output_dir})", file=sys.stderr)
        sys.exit(130)
    return trainer, metrics


def publish(trainer, args, run, metrics):
    """metrics.json and final_checkpoint/, which appears when it is complete; with --push_to_hub it is uploaded."""
    folder = Path(args.output_dir)
    name = folder.resolve().name
    final, draft, old = (folder / f"final_checkpoint{ending}" for ending in ("", ".partial", ".old"))
    card = folder / "README.md"
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer = copy.deepcopy(trainer.processing_class)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # readers would pass over the EOS where the score stands
        tokenizer.pad_token = trainer.accelerator.unwrap_model(trainer.model).config.pad_token_id = None
    trainer.model.save_pretrained(draft, state_dict=trainer.own)
    tokenizer.save_pretrained(draft)
    write_json(draft / "run.json", {**run, "steps": trainer.state.global_step, "metrics": metrics})
    write_json(folder / "metrics.json", metrics)
    trainer.hub_model_id = name
    trainer.create_model_card(model_name=name)  # TRL puts it beside the checkpoints
    text = card.read_text(encoding="utf-8")
    text = text.replace("[None](https://huggingface.co/None)", f"`{run['base_model']}`")  # a base model on disk
    figures = [f"| {name} | {value:.4g} |\n" for name, value in metrics.items() if isinstance(value, int | float)]
    (draft / card.name).write_text(f"{text}\n## Figures\n\n| | |\n| --- | --- |\n{''.join(figures)}", encoding="utf-8")
    card.unlink()
    for _ in range(20):
        try:
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)  # of a run that was killed while it removed it
                os.replace(final, old)
            os.replace(draft, final)
            break
        except PermissionError:  # Windows, where also a virus scanner may be reading what was just written
            time.sleep(0.5)
    else:
        fail(f"{final} is in use by another program; the new one lies beside it, in {draft}")
    shutil.rmtree(old, ignore_errors=True)
    size = sum(path.stat().st_size for path in final.glob("*.safetensors"))
    print(f"saved {final} ({'adapter' if args.use_lora else 'all weights, float32'}, {size / 1e9:.3g} GB)")
    if args.push_to_hub:
        repo = HfApi().create_repo(name, exist_ok=True).repo_id
        print(f"uploaded {HfApi().upload_folder(repo_id=repo, folder_path=final)}")


def score_pairs(model, rows, collate, args):
    """Scores (2, pairs), chosen and rejected, in the order of `rows`."""
    longest = rows["longest"][:]
    scores = np.zeros((2, len(rows)))
    order = np.argsort(longest)[::-1].tolist()
    model.eval()
    bar = tqdm(total=len(rows), desc="Scoring", unit="pair", disable=not PartialState().is_main_process)
    while order:
        size = max(1, 2048 // longest[order[0]])  # pairs in a batch, whose texts have 4096 tokens at most
        batch, order = order[:size], order[size:]
        logits = run_batch(model, collate([rows[row] for row in batch]), args).logits
        scores[:, batch] = logits.view(2, -1).cpu().numpy()
        bar.update(len(batch))
    bar.close()
    if not np.isfinite(scores).all():
        fail("scores are NaN or infinite")
    return scores


def make_report(scores, longer):
    """What the `scores` (2, pairs), chosen and rejected, say; `longer`: by how many tokens each chosen text is longer.

    The accuracy has a 95% interval (Wilson 1927). Calibration is that of the model's confidence in the side that it
    prefers, sigmoid(|margin|), in ten bins from 0.5 to 1; the error is that of Guo et al. 2017 (arXiv:1706.04599)."""
    margin = scores[0] - scores[1]
    right = margin > 0
    pairs = len(margin)
    accuracy = right.mean()
    z = 1.96
    center = accuracy + z * z / (2 * pairs)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / pairs + z * z / (4 * pairs * pairs))
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.minimum((confidence - 0.5) * 20, 9).astype(int)

    def describe(which):
        return {"pairs": int(which.sum()), "accuracy": right[which].mean() if which.any() else None}

    reliability = [
        {"from": 0.5 + number / 20, "confidence": confidence[bins == number].mean(), **describe(bins == number)}
        for number in np.unique(bins).tolist()
    ]
    errors = [row["pairs"] / pairs * abs(row["confidence"] - row["accuracy"]) for row in reliability]
    varied = margin.std() > 0 and longer.std() > 0
    bias = {"chosen_longer": describe(longer > 0), "chosen_shorter": describe(longer < 0)}
    bias["correlation"] = np.corrcoef(margin, longer)[0, 1] if varied else None
    return {
        "pairs": pairs,
        "accuracy": accuracy,
        "accuracy_interval": [(center + side) / (1 + z * z / pairs) for side in (-spread, spread)],
        "ties": int((margin == 0).sum()),
        "loss": np.logaddexp(0, -margin).mean(),
        "mean_margin": margin.mean(),
        "mean_score": scores.mean(),
        "calibration_error": sum(errors),
        "reliability": reliability,
        "length_bias": bias,
    }


def evaluate_pairs(model, rows, collate, args, where, tokenizer):
    """metrics.json's part about the evaluation pairs; prints the report and writes scores.jsonl.

    Up to 64 pairs are scored again with their sides swapped: the preference has to follow."""
    scores = score_pairs(model, rows, collate, args)
    report = make_report(scores, np.array([len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows]))
    some = rows.select(range(min(64, len(rows))))
    swapped = some.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
    change = score_pairs(model, swapped, collate, args)[::-1] - scores[:, : len(some)]
    first = scores[0, : len(some)] - scores[1, : len(some)]
    agreement = (np.sign(first + change[0] - change[1]) == np.sign(first)).mean()
    report["swapped"] = {"pairs": len(some), "agreement": agreement, "difference": np.abs(change).max()}
    print(f"report on {len(rows)} pairs of {where}")
    for name, value in json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 3)).items():
        for part in value if name == "reliability" else [value]:
            text = re.sub(r"[][{}':]", "", str(part))
            print(f"  {name:18} {text}")
    low, high = report["accuracy_interval"]
    if low <= 0.5:
        print(f"warning: accuracy {report['accuracy']:.3f} ({low:.3f} to {high:.3f}) may be chance", file=sys.stderr)
    if PartialState().is_main_process:
        write_scores(Path(args.output_dir), rows, scores, tokenizer)
    return {"accuracy": report["accuracy"], "report": report}


def write_scores(folder, rows, scores, tokenizer):
    """scores.jsonl: of every pair its scores and lengths (tokens), of the ten most confident mistakes the texts, too."""
    margin = scores[0] - scores[1]
    mistakes = [i for i in np.argsort(margin)[:10].tolist() if margin[i] < 0]
    with open(folder / "scores.jsonl", "w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            chosen, rejected = row["chosen_ids"], row["rejected_ids"]
            line = {"row": row["row"], "score_chosen": scores[0, i], "score_rejected": scores[1, i]}
            line |= {"length_chosen": len(chosen), "length_rejected": len(rejected)}
            if i in mistakes:
                shared = len(os.path.commonprefix([chosen, rejected]))
                texts = [tokenizer.decode(ids) for ids in (chosen[:shared], chosen[shared:], rejected[shared:])]
                line |= dict(zip(("prompt", "chosen", "rejected"), texts))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main(argv=None):
    args = parse_flags(argv)
    base, adapter, parent = locate_model(args)
    config = make_config(args)
    checkpoint = find_checkpoint(args)
    try:
        model_config, prompt_format = load_format(args, base, adapter, parent)
    except (OSError, ValueError) as error:  # of the hub and its cache, too
        fail(f"--model_path {args.model_path}: {error}")

    rows, counts = {}, {}
    with PartialState().local_main_process_first():
        if not args.eval_only:
            rows["train"], counts["train"] = load_pairs(args, prompt_format, args.subset, "train")
        if args.eval_split:
            rows["eval"], counts["eval"] = load_pairs(args, prompt_format, args.eval_subset or args.subset, "eval")
    every_row = datasets.concatenate_datasets(list(rows.values()))
    check_fit(args, config, model_config, adapter, len(prompt_format.tokenizer), rows)
    done = count_steps(checkpoint) if checkpoint else 0
    final = read_json(Path(args.output_dir, "final_checkpoint", "run.json"))
    if done >= config.max_steps > 0 and final.get("steps") == done:
        more = "to train longer, raise --max_steps or --num_train_epochs"
        print(f"{args.output_dir} is finished, after {done} steps; {more}")
        return
    if args.dry_run:
        show_pairs(every_row, prompt_format.tokenizer)
        print("dry run: everything fits; nothing was loaded or written")
        return

    folder, tokenizer = Path(args.output_dir), prompt_format.tokenizer
    is_first = PartialState().is_main_process
    run = describe_run(args, base, adapter, parent, prompt_format, counts)
    try:
        model, new_head = load_classifier(args, base, adapter, model_config, len(tokenizer), config.device)
        if new_head and args.eval_only:
            fail(f"--eval_only: {args.model_path} has no score head; it should be a trained reward model")
        print(f"score head: {'new' if new_head else 'that of ' + args.model_path}")
        collate = collate_shared
        if not can_share(model.eval(), every_row, args):
            print(f"in a {model.config.model_type} model each text of a pair has a row of its own")
            collate = DataCollatorForPreference(tokenizer.pad_token_id)
        if args.eval_only:
            folder.mkdir(parents=True, exist_ok=True)
            metrics = evaluate_pairs(model, rows["eval"], collate, args, counts["eval"]["where"], tokenizer)
            if is_first:
                write_json(folder / "metrics.json", metrics)
                write_json(folder / "run.json", {**run, "metrics": metrics})
            return

        if is_first:
            open_output_dir(args, checkpoint)
        metrics = {}
        if "eval" in rows:
            scores = score_pairs(model, rows["eval"], collate, args)
            metrics["accuracy_before"] = (scores[0] > scores[1]).mean()
            print(f"accuracy before training {metrics['accuracy_before']:.3f}")
        trainer, figures = train(args, config, checkpoint, model, rows, collate, prompt_format, run)
        metrics |= figures
        if "eval" in rows:
            metrics |= evaluate_pairs(model, rows["eval"], collate, args, counts["eval"]["where"], tokenizer)
        if trainer.is_fsdp_enabled:  # all gather what the first one saves
            trainer.own = trainer.accelerator.get_state_dict(trainer.model)
        if is_first:
            publish(trainer, args, run, metrics)
        trainer.accelerator.wait_for_everyone()
    except Exception as error:  # safetensors and torch.save have types of their own for a full disk
        print(file=sys.stderr)  # ends the line of the progress bar
        if re.search("out of memory|ALLOC_FAILED|allocate memory", str(error)):
            helps = "--use_lora, --load_in_4bit, --gradient_checkpointing, --bf16"
            fail(f"no memory left; what helps, the most first: {helps}")
        if re.search("No space left|os error 28|PytorchStreamWriter failed", str(error)):
            fail("no space left to save; what was saved before is complete")
        raise


if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # of several processes the first one talks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a pipe on Windows knows few characters
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
