"""Supervised fine-tuning (SFT) of a causal language model on chats or question/answer pairs.

In: a model (hub id, directory, or LoRA adapter directory) and a data set with one of these columns sets:
`messages`; `conversations`; `question` + `response_j`; `prompt` + `response`, `completion` or `chosen`.
Out, in --output_dir: `final_checkpoint/` (model or adapter, tokenizer, README.md, run.json), resumable
`checkpoint-N/`, `metrics.jsonl` (one line per log event) and `metrics.json` (the final figures).

    python training_sft.py --model_path meta-llama/Llama-3.2-3B-Instruct --dataset_name json --subset data/finetune \
        --split train --output_dir checkpoints/sft --bf16 --use_lora --batch_size 1 --gradient_accumulation_steps 8
    python training_sft.py --model_path gpt2 --dataset_name my_chats/ --split train --output_dir checkpoints/sft --dry_run
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "trl==1.12.0", "transformers>=5.20,<6", "peft>=0.21,<1", "accelerate>=1.15,<2",
#                 "datasets>=5.0,<6", "bitsandbytes>=0.49"]
# ///

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path


def fail(message):
    """What a user can mend: one line on stderr, exit code 2."""
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

    aliases = {"--per_device_train_batch_size": "--batch_size", "--train_split": "--split"}

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
    add("--subset", help="data_dir of the data set, e.g. data/finetune")
    add("--split", default="train", help="split to train on, also a slice: train[:95%%]")
    add("--eval_subset", help="data_dir of the evaluation split (that of --subset)")
    add("--eval_split", help="split to evaluate on; none by default")
    add("--output_dir", required=True, help="directory for checkpoints and metrics; empty, unless the run resumes")
    add("--overwrite_output_dir", action="store_true", help="replace the checkpoints and metrics in --output_dir")
    add("--resume_from_checkpoint", nargs="?", const=True, metavar="DIR", help="go on from DIR, or from the newest")
    add("--dry_run", action="store_true", help="check everything, show the data as it would be trained on, and stop")
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="columns of the data that have other names")
    add("--max_samples", type=number(int, 1), help="use at most this many rows of each split")
    add("--prompt_format", choices=["auto", "chat", "qa"], default="auto", help="chat template, or Question/Answer")
    add("--train_on_prompt", action="store_true", help="train on all tokens, not the answers' alone")
    add("--max_length", type=number(int, 2), default=1024, help="longest row, in tokens; the rest is cut")
    add("--packing", action="store_true", help="fill every row up to --max_length with whole examples")
    add("--batch_size", type=number(int, 1), default=1, help="rows per device and step")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="micro-batches per batch")
    add("--max_steps", type=number(int, 1), help="optimizer steps; goes before --num_train_epochs")
    add("--num_train_epochs", type=number(float, 1e-9), default=1.0, help="passes over the data")
    add("--learning_rate", type=number(float, 0), help="peak learning rate (2e-4 with LoRA, 2e-5 without)")
    add("--lr_scheduler_type", default="linear", help="linear, cosine, constant, constant_with_warmup, ...")
    add("--warmup_ratio", type=number(float, 0, 1), default=0.0, help="fraction of the steps spent on warm-up")
    add("--weight_decay", type=number(float, 0), default=0.0, help="AdamW weight decay")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="gradient clipping, L2 norm; 0 for none")
    add("--bf16", action="store_true", help="bfloat16 mixed precision (frozen weights in bfloat16)")
    add("--fp16", action="store_true", help="float16 mixed precision; needs a GPU")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--use_lora", action="store_true", help="train a LoRA adapter in place of all weights")
    add("--lora_r", type=number(int, 1), help="LoRA rank (16 where the adapter is new)")
    add("--lora_alpha", type=number(float, 0), help="LoRA scale, applied as alpha / r (32 where the adapter is new)")
    add("--lora_dropout", type=number(float, 0, 1), help="LoRA dropout probability (0 where the adapter is new)")
    add("--lora_target_modules", nargs="+", metavar="NAME", help="module names, or one regular expression (all-linear)")
    add("--load_in_4bit", action="store_true", help="frozen weights in 4 bit (NF4); needs LoRA")
    add("--load_in_8bit", action="store_true", help="frozen weights in 8 bit; needs LoRA")
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
    setting = {"nargs": "+", "action": "extend", "default": [], "metavar": "FIELD=VALUE"}
    add("--set", **setting, help="any other field of TRL's SFTConfig")
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
        args.learning_rate = 2e-4 if args.use_lora else 2e-5
    trl = next((found.version for found in importlib.metadata.distributions(name="trl")), "none")
    quantized = args.load_in_4bit or args.load_in_8bit
    evaluated = args.eval_split or args.eval_subset
    sharded = os.environ.get("ACCELERATE_USE_FSDP") and (args.use_lora or os.environ.get("FSDP_VERSION") != "2")
    sharded = sharded or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
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
        "--eval_steps needs --eval_split or --eval_subset": args.eval_steps and not evaluated,
        "of FSDP and ZeRO-3 only FSDP2 works here, without LoRA; with it use --shard_base, DDP or ZeRO-2": sharded,
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

# What they report is meant so: an optional CPU kernel; the padding token of the tokenizer, given to the model; that
# nothing is sharded.
for name in ("bitsandbytes", "transformers.trainer_utils", "transformers.distributed.tensor_parallel"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # trl 1.12 uses names of before v6

import datasets
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
from tqdm import tqdm
from transformers.integrations import get_available_reporting_integrations
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, SFTTrainer

logging.getLogger("trl.trainer.sft_trainer").setLevel(logging.ERROR)  # keeps_apart() tests what it warns of

SCHEMAS = [("messages",), ("conversations",), ("question", "response_j"), ("prompt", "response"),
           ("prompt", "completion"), ("prompt", "chosen")]  # fmt: skip
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# A JSON Lines file is read in one piece, for a column's type may show late; NA and None in CSV are text.
READERS = {"csv": {"keep_default_na": False}, "json": {"chunksize": 1 << 30}, "parquet": {}, "arrow": {}}
# What a resumed run may change and say nothing; what it may not change, for the result would be neither run.
FREE_ON_RESUME = """output_dir overwrite_output_dir resume_from_checkpoint max_steps num_train_epochs logging_steps save_steps
    save_total_limit eval_split eval_subset eval_steps report_to push_to_hub dry_run shard_base""".split()
SAME_ON_RESUME = """columns model_path dataset_name dataset_config subset split max_samples prompt_format train_on_prompt max_length
    packing batch_size gradient_accumulation_steps use_lora lora_r lora_alpha lora_target_modules
    weight_decay processes""".split()
SCRIPTS = 4  # stands in run.json: this version resumes checkpoints of this version


def read_json(path):
    """The object in a JSON file, {} where there is none."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


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
    """(base model, adapter directory or None, run.json of the earlier stage) behind --model_path.

    Refuses what is not there, and flags that contradict the adapter."""
    path, folder = args.model_path, Path(args.model_path)
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
            fail(f"--model_path {path} does not exist; it should be a model directory or a hub id")
        return path, None, {}
    run, adapter = read_json(folder / "run.json"), read_json(folder / "adapter_config.json")
    classifier = "SequenceClassification" in str(read_json(folder / "config.json").get("architectures"))
    classifier = classifier or adapter.get("task_type") == "SEQ_CLS"
    if "reward" in (run.get("stage"), run.get("parent_stage")) or classifier:
        fail(f"--model_path {path} is a reward model")
    if not adapter and not (folder / "config.json").is_file():
        fail(f"--model_path {path} holds neither config.json nor adapter_config.json")
    if not any(folder.glob("*.safetensors")):
        fail(f"--model_path {path} holds no weights in safetensors")
    if not adapter:
        return str(folder.resolve()), None, run
    base = adapter["base_model_name_or_path"]
    if not base:
        fail(f"--model_path {path}: its adapter_config.json names no base model")
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.count("/") > 1 or base.startswith(".")):
        fail(f"--model_path {path} is an adapter for the base model {base}, which is not there")
    if run.get("base_digest") not in (None, digest_base(base)):
        fail(f"--model_path {path}: the base model {base} is not the one that this adapter was trained on")
    odd = {"alora_invocation_tokens", "trainable_token_indices"} & {name for name, value in adapter.items() if value}
    if adapter["peft_type"] != "LORA" or odd:
        fail(f"--model_path {path} is no plain LoRA adapter; only those can be trained on")
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        flag = name if name.startswith("lora") else f"lora_{name}"
        asked, there = getattr(args, flag), adapter[name]
        if name == "target_modules" and asked:
            asked, there = set(asked), {there} if isinstance(there, str) else set(there)
        if asked not in (None, there):
            fail(f"--{flag}: the adapter {path} has its own, {adapter[name]}; leave the flag out")
    return base, folder.resolve(), run


def make_config(args):
    """SFTConfig from the flags that have its fields' names, and --set; refuses what this machine does not have."""
    missing = set(args.report_to) - {"none", "all", *get_available_reporting_integrations()}
    old = args.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    problems = {
        "--bf16: this GPU cannot compute in bfloat16; use --fp16": old,
        "--fp16 needs a GPU; on a CPU use --bf16, or neither": args.fp16 and not torch.cuda.is_available(),
        f"--report_to: not installed: {', '.join(missing)}": missing,
        "--push_to_hub needs a login: hf auth login": args.push_to_hub and not get_token(),
    }
    for problem, there in problems.items():
        if there:
            fail(problem)
    if args.learning_rate >= 1e-2:
        print(f"warning: --learning_rate {args.learning_rate:g} is high: models break above 1e-3", file=sys.stderr)
    gpu = torch.accelerator.is_available()
    rows = args.batch_size if gpu else 1  # on a CPU one row a pass: no padding, and the same gradient
    values = {
        **vars(args),
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": args.gradient_accumulation_steps * args.batch_size // rows,
        "max_steps": args.max_steps or -1,
        "max_length": args.max_length if args.packing else None,  # rows are cut already
        "eval_packing": False,
        "loss_type": "nll",  # TRL's loss in chunks leaves out what some models do to their logits (Granite)
        "use_liger_kernel": torch.cuda.is_available() and is_liger_kernel_available(),
        "warmup_steps": min(args.warmup_ratio, 0.999999),  # below 1: a fraction of the steps
        "eval_strategy": "steps" if args.eval_steps else "no",
        "use_cpu": not gpu,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN is to be seen
        "push_to_hub": False,  # at the end, by publish()
        "save_strategy": "steps",
    }
    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    values = {name: value for name, value in values.items() if name in fields}
    taken = {*vars(args), "per_device_train_batch_size", "warmup_steps", "save_strategy"}
    for pair in args.set:
        name, equals, text = pair.partition("=")
        if not equals or name not in fields or name in taken:
            fail(f"--set {pair}: should be FIELD=VALUE, of a field of SFTConfig that has no flag of its own")
        try:
            values[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            values[name] = text
    try:
        config = SFTConfig(**values)
        optimizer = torch.optim.SGD([torch.ones(1)], config.learning_rate)
        # some schedules need --set lr_scheduler_kwargs=...
        transformers.get_scheduler(config.lr_scheduler_type, optimizer, 1, 9, config.lr_scheduler_kwargs)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        fail(f"SFTConfig: {error}")
    if config.use_liger_kernel and not is_liger_kernel_available():
        fail("--set use_liger_kernel=true needs liger-kernel: pip install liger-kernel")
    config._n_gpu = min(config.n_gpu, 1)  # one process drives one GPU (no DataParallel); several: accelerate launch
    return config


def count_steps(checkpoint):
    """Optimizer steps of a checkpoint; 0 for one that was never completed: Trainer writes trainer_state.json last."""
    try:
        return read_json(checkpoint / "trainer_state.json").get("global_step", 0)
    except ValueError:  # killed while it was written
        return 0


def find_checkpoint(args):
    """(checkpoint to go on from or None, its trainer_state.json); what is in --output_dir is not replaced by chance."""
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        fail(f"--output_dir {folder}: {file} is a file")
    model = Path(args.model_path).resolve()
    if args.overwrite_output_dir and {*folder.resolve().glob("*checkpoint*")} & {model, *model.parents}:
        fail(f"--model_path {args.model_path} lies in --output_dir, which --overwrite_output_dir empties; take another")
    if not wanted and not args.overwrite_output_dir and any(folder.glob("*")):
        fail(f"--output_dir {folder} is not empty; see --resume_from_checkpoint and --overwrite_output_dir")
    newest = max(folder.glob("checkpoint-*"), key=count_steps, default=folder)
    if not wanted or (wanted is True and not count_steps(newest)):
        if wanted:
            print(f"no complete checkpoint in {folder}: starting from the beginning")
        return None, {"global_step": 0, "log_history": []}
    checkpoint = newest if wanted is True else Path(wanted)
    if not count_steps(checkpoint):  # the directory of a run
        checkpoint = max(checkpoint.glob("checkpoint-*"), key=count_steps, default=checkpoint)
    state, run = read_json(checkpoint / "trainer_state.json"), read_json(checkpoint / "run.json")
    if not count_steps(checkpoint):
        fail(f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint (no trainer_state.json)")
    if run.get("stage") != "sft" or run.get("versions", {}).get("scripts") != SCRIPTS:
        fail(f"--resume_from_checkpoint: {checkpoint} is of another stage, or of an earlier version of this script")
    was, now = run["arguments"], json.loads(json.dumps(vars(args), default=str))
    changed = [name for name in now if name not in FREE_ON_RESUME and now[name] != was.get(name, now[name])]
    words = ", ".join(f"--{name} {now[name]} (was {was.get(name)})" for name in changed)
    if set(changed) & set(SAME_ON_RESUME):
        fail(f"--resume_from_checkpoint {checkpoint}: {words}: that would be neither run; resume with the same flags")
    if changed:
        print(f"resuming with other flags than before: {words}")
    places = (checkpoint.parent.resolve(), checkpoint.resolve().parent)  # a link may lead elsewhere
    elsewhere = folder.resolve() not in places and any(folder.glob("*checkpoint*"))
    if (elsewhere or count_steps(newest) > state["global_step"]) and not args.overwrite_output_dir:
        what = "another run" if elsewhere else f"a later checkpoint, {newest.name}"
        fail(f"--resume_from_checkpoint {checkpoint}: {folder} holds {what}; --overwrite_output_dir drops it")
    print(f"going on from {checkpoint}")
    return checkpoint, state


def open_output_dir(args, state):
    """Make --output_dir ready: without checkpoints that are not complete or later than where the run starts, and with
    metrics.jsonl as that checkpoint's trainer `state` knows it."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("checkpoint-*"):
        if path.name[11:].isdigit() and not 0 < count_steps(path) <= state["global_step"]:
            shutil.rmtree(path)
    if args.overwrite_output_dir and not args.resume_from_checkpoint:
        shutil.rmtree(folder / "final_checkpoint", ignore_errors=True)
    lines = [json.dumps({"step": entry["step"], **entry}) + "\n" for entry in state["log_history"]]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def load_tokenizer(place, args):
    """The tokenizer; a missing pad token is a token that it already has, so that no embedding is added."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code)
    if tokenizer.pad_token_id is None:
        reserved = "<|finetune_right_pad_id|>"  # Llama 3.x keeps this one free for padding
        tokenizer.pad_token = reserved if reserved in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


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
        rows = datasets.load_dataset(source, args.dataset_config, split=name + bracket + part, **options)
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
    return rows.select(range(min(len(rows), args.max_samples or len(rows)))), f"{where} [{name}{bracket}{part}]"


def encode_rows(rows, prompt_format, args, where):
    """(rows as `input_ids` and `labels`, -100 where not trained on, cut to --max_length; counts for run.json).

    Left out are rows that are misshapen (at most a tenth), have no answer left, or equal an earlier one."""
    schema = next((schema for schema in SCHEMAS if set(schema) <= set(rows.column_names)), None)
    if not schema:
        needed = "; ".join(" + ".join(schema) for schema in SCHEMAS)
        names = sum(SCHEMAS, ())
        near = {name: difflib.get_close_matches(name, names, 1, 0.9) for name in rows.column_names if name not in names}
        hint = " ".join(f"{found[0]}={name}" for name, found in near.items() if found) or "NAME=COLUMN"
        there = ", ".join(rows.column_names)
        fail(f"{where} has the columns {there}; one of these is needed: {needed}; --columns {hint} renames")
    max_length, train_on_prompt = args.max_length, args.train_on_prompt  # the whole args would spoil map's cache

    def encode_row(row):
        tools, system = row.get("tools"), row.get("system")
        messages = to_messages(row[schema[-1]], "assistant") if len(schema) == 2 else row[schema[0]]
        if len(schema) == 2 and first_role(messages) in ("assistant", "gpt"):
            messages = to_messages(row[schema[0]], "user") + messages  # else a whole conversation, with its question
        try:
            if isinstance(system, str) and first_role(messages) not in (None, "system", "developer"):
                messages = [{"role": "system", "content": system}, *messages]
            tools = json.loads(tools or "null") if isinstance(tools, str) else drop_nulls(tools)
            ids, mask = prompt_format.encode(read_messages(messages, last="assistant"), tools=tools)
        except ValueError as error:
            empty = [name for name in schema if not row[name] or not str(row[name]).strip()]
            reason = f"column {' + '.join(empty or schema)} {'is empty' if empty else error}".partition(", not ")[0]
            # Arrow takes no type from empty lists
            return {"reason": reason, "digest": "", "length": 0, "input_ids": [0], "labels": [-100]}
        labels = [token if trained or train_on_prompt else -100 for token, trained in zip(ids, mask)]
        labels = [-100, *labels[1:max_length]]  # the first token follows nothing
        return {
            "reason": "" if set(labels) - {-100} else f"no answer within --max_length {max_length} tokens",
            "digest": hashlib.sha256(repr(ids).encode()).hexdigest(),
            "length": len(ids),
            "input_ids": ids[:max_length],
            "labels": labels,
        }

    workers = min(os.cpu_count() or 1, len(rows) // 2000) or None  # where there is work for several
    workers = None if os.name == "nt" else workers  # there each would import torch again
    with PartialState().local_main_process_first():  # the others of a machine read what it has cached
        encoded = rows.map(encode_row, remove_columns=rows.column_names, num_proc=workers, desc="Tokenizing")
    by_reason, seen = {}, set()  # {why they are left out: numbers of the rows}, "" for those that are kept
    for i, (reason, digest) in enumerate(zip(encoded["reason"][:], encoded["digest"][:])):
        if digest in seen:
            reason = reason or "equal to an earlier row"
        seen.add(digest)
        by_reason.setdefault(reason, []).append(i)
    kept = encoded.select(by_reason.pop("", []))
    lines = [
        f"{where}: {len(numbers)} of {len(rows)} rows left out (row {', '.join(map(str, numbers[:3]))}): {reason}"
        for reason, numbers in by_reason.items()
    ]
    if not len(kept) or encoded["digest"][:].count("") > len(rows) / 10:
        fail("; ".join(lines))
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    left_out = {reason: len(numbers) for reason, numbers in by_reason.items()}
    lengths = sorted(kept["length"][:])
    sizes, edges = torch.histogram(torch.tensor(lengths, dtype=torch.float), bins=min(32, lengths[-1] - lengths[0] + 1))
    cut = sum(length > max_length for length in lengths)
    counts = {"rows": len(kept), "cut": cut, "left_out": left_out, "longest": min(lengths[-1], max_length)}
    counts["lengths"] = {"edges": edges.tolist(), "rows": sizes.int().tolist()}  # tokens
    print(f"{where}: schema {' + '.join(schema)}, format {prompt_format.name}; {len(kept)} rows kept, {cut} of "
          f"them cut to {max_length} tokens")  # fmt: skip
    if unread := sorted({*rows.column_names} - {*schema, "system", "tools"}):
        print(f"  columns that are not read: {', '.join(unread)}")
    if cut:
        most, all_but_few = (lengths[math.ceil(part * len(lengths)) - 1] for part in (0.95, 0.99))
        print(f"  a cut row loses its end, EOS included; --max_length {most} keeps 95% of the rows, {all_but_few} 99%")
    if len(kept) < len(rows) / 2:
        print(f"warning: {where}: fewer than half of the rows are kept", file=sys.stderr)
    return kept.select_columns(["input_ids", "labels"]), counts


def show_rows(rows, tokenizer):
    """Two rows as text, what is trained on in double brackets."""
    print("two rows as they are trained on; [[...]] is what the loss is taken of, the rest is context")
    for i in sorted({0, len(rows) // 2}):
        print(f"--- row {i} of {len(rows)}, {len(rows[i]['input_ids'])} tokens")
        pairs = zip(rows[i]["input_ids"], rows[i]["labels"])
        for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
            piece = tokenizer.decode([token for token, _ in group])
            print(f"[[{piece}]]" if trained else piece, end="")
        print()


def check_model(args, config):
    """Refuse what the model does not have, before its weights are read; say so where they and the optimizer state alone
    exceed the memory that is free."""
    how = {"attn_implementation": args.attn_implementation, "trust_remote_code": args.trust_remote_code}
    targets = args.lora_target_modules or []
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), **how)
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
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        fail(f"--gradient_checkpointing: transformers has none for {type(model).__name__}")
    layers = {re.sub(r"\.\d+$", ".*", name) for name in modules}
    if args.shard_base and not any("*" in name for name in layers & {*model.fsdp_plan}):
        fail(f"--shard_base: transformers cannot share out a {config.model_type} model; leave the flag out")
    size = 2 if args.bf16 or args.fp16 else 4  # bytes
    if args.load_in_4bit or args.load_in_8bit:
        size = 0.6 if args.load_in_4bit else 1.1
    if not args.use_lora:
        size = 16  # weight, gradient and AdamW's two moments
    need = model.num_parameters() * size / (PartialState().num_processes if args.shard_base else 1)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if need > free:
        sizes = f"{need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        print(f"warning: weights and optimizer alone take {sizes}", file=sys.stderr)


def count_embeddings(adapter):
    """Rows of the embeddings that an adapter directory brings along, None where it has none."""
    if not adapter:
        return None
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if re.search(r"(embed|wte|lm_head)\w*(\.base_layer)?\.weight$", name)]
        return file.get_slice(names[0]).get_shape()[0] if names else None


def load_model(args, base, adapter, embeddings):
    """The model, with its adapter if it has one, and at least as many embeddings as asked for.

    Weights that are trained are float32 (under autocast a bfloat16 AdamW step of 3e-6 would round to nothing); frozen
    ones have the precision the model computes in."""
    compute = torch.float16 if args.fp16 else torch.float32
    compute = torch.bfloat16 if args.bf16 else compute
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    shares = transformers.DistributedConfig(fsdp_size=PartialState().num_processes) if args.shard_base else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        dtype=compute if args.use_lora else torch.float32,
        attn_implementation=args.attn_implementation,
        **(
            {"quantization_config": quantization} if args.load_in_4bit or args.load_in_8bit else {}
        ),  # None would hide its own
        device_map={"": int(os.environ.get("LOCAL_RANK", 0))} if torch.cuda.is_available() and not shares else None,
        distributed_config=shares,
        trust_remote_code=args.trust_remote_code,
        use_safetensors=True,  # no pickle
    )
    if embeddings > model.get_input_embeddings().weight.shape[0] or count_embeddings(adapter):
        model.resize_token_embeddings(embeddings)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # it could not be saved (Llama 2 has a temperature without sampling)
        ids = {name: value for name, value in vars(model.generation_config).items() if name.endswith("_token_id")}
        model.generation_config = transformers.GenerationConfig(**ids)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes: no gradients after a pass in eval mode
            module.support_avx512bf16_for_cpu = False
    if adapter:
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    if not args.use_lora:
        return model
    targets = args.lora_target_modules or ["all-linear"]
    if targets == ["all-linear"]:
        targets = list_linear_layers(model)
    lora = peft.LoraConfig(
        r=args.lora_r or 16,
        lora_alpha=32 if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout or 0.0,
        target_modules=targets[0] if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]) else targets,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)


def list_linear_layers(model):
    """Names of the linear layers without the output head, without routers (those of PhiMoE and Llama 4 return tuples), and
    without the out_proj of recurrent layers, whose kernels read the weight themselves."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = [(name, module) for name, module in linear if "Router" not in type(module).__name__]
    names = [name for name, module in linear if module is not model.get_output_embeddings()]
    return [name for name in names if not (model._is_stateful and name.endswith("out_proj"))]


def set_router_loss(config, model):
    """Let the auxiliary loss of a mixture of experts count once per optimizer step; TRL adds it in every pass."""
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", None) is None:
        return
    if not hasattr(text_config, "num_experts"):
        print("the auxiliary loss of this mixture of experts is left out: TRL cannot compute it")
        config.router_aux_loss_coef = 0.0
    config.router_aux_loss_coef /= config.gradient_accumulation_steps * config.world_size
    model.router_aux_loss_coef = config.router_aux_loss_coef


@torch.no_grad()
def keeps_apart(model, config):
    """Whether examples in one row do not see each other; recurrence, ALiBi and OPT do not mind restarting positions."""
    if model._is_stateful or "position_ids" not in inspect.signature(type(model).forward).parameters:
        return False
    ids, positions = torch.arange(3, 11, device=model.device)[None], torch.arange(8, device=model.device)[None] % 4
    half = config.bf16 or config.fp16  # flash attention takes nothing else
    with torch.autocast(model.device.type, torch.float16 if config.fp16 else torch.bfloat16, half):
        both = model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:].float()
        alone = model(input_ids=ids[:, 4:], use_cache=False).logits[0].float()
    tolerance = 0.05 if half else 1e-3
    return bool((both - alone).abs().max() <= tolerance * alone.abs().max())


def takes_answers_alone(model):
    """Whether forward() computes the logits of some positions alone, and hands their labels on to the common loss."""
    forward = type(model).forward
    known = inspect.signature(forward).parameters
    return "logits_to_keep" in known and "kwargs" in known and "self.loss_function(" in inspect.getsource(forward)


class AnswersAlone:
    """A collator that asks for logits only where the next token is trained on: the same loss and gradient, faster."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        batch = self.collate(rows)
        following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        kept = (following != -100).any(dim=0).nonzero().flatten()
        return {**batch, "logits_to_keep": kept, "shift_labels": following[:, kept]}


class RunCallback(ProgressCallback):
    """Trainer's bar with the loss on it, and log lines; sets the order of the rows, writes metrics.jsonl and run.json,
    stops before a gradient that is not finite reaches the weights, and turns Ctrl-C and SIGTERM into a saved checkpoint."""

    def __init__(self, output_dir, run, sampler):
        super().__init__()
        self.output_dir, self.run, self.sampler, self.interrupted = Path(output_dir), run, sampler, False
        self.shown = time.monotonic()
        self.seconds, self.tokens = 0.0, 0  # of training since the last log line; until it, since the start

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        super().on_train_begin(args, state, control)
        # A checkpoint's rate would be kept for a step, 0 at the end of a finished run, and its peak for good.
        for i, factor in enumerate(getattr(lr_scheduler, "lr_lambdas", [])):
            lr_scheduler.base_lrs[i] = args.learning_rate
            rate = args.learning_rate * factor(lr_scheduler.last_epoch)
            optimizer.param_groups[i]["lr"] = lr_scheduler._last_lr[i] = rate  # the latter is what Trainer logs
        state.compute_steps(args, state.max_steps)  # a resumed run would log and save as often as before
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.interrupt)

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

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control)
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.default_int_handler)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """The order follows from seed and epoch alone, so that a resumed run meets the same rows."""
        self.sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not args.fp16 and not torch.nn.utils.get_total_norm(gradients).isfinite():  # float16 scales by overflows
            last = max(self.output_dir.glob("checkpoint-*"), key=count_steps, default="none was saved")
            print(file=sys.stderr)  # ends the line of the progress bar
            fail(f"the gradient is NaN or infinite in step {state.global_step + 1}; the last good checkpoint: {last}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_substep_end(self, args, state, control, **kwargs):
        if self.training_bar is not None and time.monotonic() > self.shown + 5:  # seconds; a step may take minutes
            self.training_bar.refresh()
            self.shown = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control)
        self.seconds += time.perf_counter() - self.started
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
            folder = self.output_dir / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", self.run)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "learning_rate" in logs:
            logs["speed/tokens_per_second"] = (logs["num_tokens"] - self.tokens) / self.seconds
            state.log_history[-1] |= logs
            self.seconds, self.tokens = 0.0, logs["num_tokens"]
        with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        names = [name for name in ("loss", "eval_loss", "grad_norm", "learning_rate", "epoch") if name in logs]
        figures = "  ".join(f"{name} {logs[name]:<9.4g}" for name in names)
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
        if {"loss", "eval_loss"} & {*logs}:
            tqdm.write(f"step {state.global_step:>6} of {state.max_steps}  {figures}".rstrip())


def describe_run(args, base, adapter, prompt_format, counts):
    """run.json: what the next stage, and whoever finds the checkpoint, needs to know."""
    tokenizer = prompt_format.tokenizer
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "stage": "sft",
        "base_model": base,
        "base_digest": digest_base(base) if args.use_lora else None,
        "parent": str(adapter or base),
        "prompt_format": prompt_format.name,
        "chat_template_hash": digest(tokenizer.chat_template) if prompt_format.name == "chat" else None,
        "tokenizer_hash": digest(tokenizer.get_vocab()),
        "dataset": {"name": args.dataset_name, "subset": args.subset, "split": args.split, **counts},
        "arguments": vars(args),
        "versions": {**versions, "scripts": SCRIPTS},
    }


def load_checkpoint(model, checkpoint):
    """Take back all weights. transformers saves some under other names (experts, GPT-NeoX's head); Trainer's own way, with
    load_state_dict, passes over those."""
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict())


def make_trainer(config, model, rows, eval_rows, tokenizer, run):
    """(SFTTrainer, its RunCallback)."""
    causal_model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    shard = run["arguments"]["shard_base"]
    if shard:  # PEFT calls its forward(), past the hooks that gather weights
        model.base_model.forward = causal_model.__call__
    flash = "flash" in causal_model.config._attn_implementation
    if (config.packing or flash) and not keeps_apart(causal_model, config):
        fail("--packing and flash attention: in this model examples that share a row see each other; leave them out")
    config.padding_free = flash and torch.cuda.is_available()
    set_router_loss(config, causal_model)
    trained = [(weight, weight.data.float()) for weight in model.parameters() if weight.requires_grad]
    saved_config = copy.deepcopy(causal_model.config)
    alone, config.save_only_model = config.save_only_model, shard or config.save_only_model  # Trainer insists on it
    trainer = SFTTrainer(model, config, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)
    config.save_only_model = alone  # the optimizer of adapters is whole
    if causal_model is model and not trainer.is_fsdp_enabled:
        trainer._load_from_checkpoint = functools.partial(load_checkpoint, model)
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trainer._save = functools.partial(trainer._save, state_dict=own) if shard else trainer._save  # PEFT gathers a base
    causal_model.config = saved_config  # TRL switches the router's loss on in the one that runs
    for weight, data in trained:  # TRL makes adapters on a quantized base bfloat16, see load_model
        weight.data = data.to(weight.device)
    plain_loss = config.loss_type == "nll" and not config.use_liger_kernel and not config.label_smoothing_factor
    if plain_loss and takes_answers_alone(causal_model):
        trainer.data_collator = AnswersAlone(trainer.data_collator)
    # Rows of like length need little padding; the longest come first, so that too little memory shows in the first step.
    arrays = trainer.train_dataset.select_columns("input_ids").with_format("numpy").iter(1000)
    lengths = [len(ids) for some in arrays for ids in some["input_ids"]]
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    sampler = LengthGroupedSampler(batch, lengths=lengths)
    trainer._get_train_sampler = lambda dataset=None: sampler
    callback = RunCallback(config.output_dir, run, sampler)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(callback)
    return trainer, callback


def publish(trainer, args, run, metrics):
    """final_checkpoint/, which appears only when it is complete, and metrics.json."""
    folder, final = Path(args.output_dir), Path(args.output_dir, "final_checkpoint")
    draft, old = final.with_suffix(".partial"), final.with_suffix(".old")
    if trainer.is_world_process_zero():
        shutil.rmtree(draft, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # else it would write the pieces that checkpoints may hold
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(draft))
    trainer.hub_model_id = folder.resolve().name
    trainer.create_model_card(model_name=trainer.hub_model_id)
    if not trainer.is_world_process_zero():
        return
    (draft / "training_args.bin").unlink()  # a pickle
    trainer.model.generation_config.save_pretrained(draft)  # where answers end
    figures = "".join(f"| {name} | {value} |\n" for name, value in metrics.items())
    card = (folder / "README.md").read_text(encoding="utf-8")
    card = card.replace("[None](https://huggingface.co/None)", f"`{run['base_model']}`")  # a base model on disk
    (folder / "README.md").unlink()
    (draft / "README.md").write_text(f"{card}\n## Figures\n\n| | |\n| --- | --- |\n{figures}", encoding="utf-8")
    write_json(draft / "run.json", {**run, "steps": trainer.state.global_step, "metrics": metrics})
    write_json(folder / "metrics.json", metrics)
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
        repo = HfApi().create_repo(folder.resolve().name, exist_ok=True).repo_id
        print(f"uploaded {HfApi().upload_folder(repo_id=repo, folder_path=final)}")


@contextlib.contextmanager
def explaining(args):
    """One line in place of a traceback where memory or disk is full."""
    try:
        yield
    except Exception as error:  # safetensors and torch.save have types of their own for a full disk
        print(file=sys.stderr)  # ends the line of the progress bar
        if re.search("out of memory|ALLOC_FAILED|allocate memory", str(error)):
            helps = ["use_lora", "gradient_checkpointing", "bf16", "load_in_4bit"]
            flags = " ".join(f"--{name}" for name in helps if not getattr(args, name))
            fail(f"no memory left; what helps, the most first: {flags} --batch_size 1, a smaller --max_length")
        if re.search("No space left|os error 28|PytorchStreamWriter failed", str(error)):
            fail("no space left to save; what was saved before is complete")
        raise


def main(argv=None):
    args = parse_flags(argv)
    base, adapter, parent = locate_model(args)
    config = make_config(args)
    checkpoint, state = find_checkpoint(args)

    data, where = load_split(args, args.subset, args.split, "--split")
    try:
        model_config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
        tokenizer = load_tokenizer(adapter if adapter and (adapter / "tokenizer_config.json").is_file() else base, args)
        there = [data[name] for name in sum(SCHEMAS, ()) if name in data.column_names]
        lists = [values for values in there if isinstance(next(filter(None, values), None), list)]
        natural = "chat" if lists else "qa"
        found = pick_format(args.prompt_format, natural, parent.get("prompt_format"), tokenizer)
        prompt_format = make_eos_end_turns(found)
    except (OSError, ValueError) as error:  # of the hub and its cache, too
        fail(f"--model_path {args.model_path}: {error}")
    rows, counts = encode_rows(data, prompt_format, args, where)
    if prompt_format.name == "qa" and tokenizer.chat_template and args.prompt_format == "auto" and not parent:
        print("the text is Question: ... Answer: ...; --prompt_format chat trains the model's own chat template")
    eval_rows = None
    if args.eval_split or args.eval_subset:
        data, where = load_split(args, args.eval_subset or args.subset, args.eval_split or "test", "--eval_split")
        eval_rows, counts["eval"] = encode_rows(data, prompt_format, args, where)
    if getattr(model_config, "quantization_config", None) and not args.use_lora:
        fail(f"--model_path {args.model_path} is stored in 4 or 8 bit: add --use_lora")
    if args.shard_base and (getattr(model_config, "quantization_config", None) or count_embeddings(adapter)):
        fail(f"--shard_base: {args.model_path} is stored in 4 or 8 bit, or has embeddings in its adapter")
    embeddings = count_embeddings(adapter) or model_config.get_text_config().vocab_size
    if len(tokenizer) > embeddings and args.use_lora:
        fail(f"--model_path {args.model_path}: {len(tokenizer)} tokens, but embeddings for {embeddings}: the new ones would "
             "not be trained; leave --use_lora out, and they are added")  # fmt: skip
    longest = counts["longest"]
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > positions:
        fail(f"--max_length {args.max_length}: the model has {positions} positions, the longest row {longest} tokens")
    check_model(args, model_config)
    if args.dry_run:
        show_rows(rows, tokenizer)
        print("dry run: everything fits; nothing was loaded or written")
        return

    with explaining(args):
        transformers.set_seed(args.seed)  # a new adapter starts at random
        model = load_model(args, base, adapter, max(embeddings, len(tokenizer)))
        model.generation_config.eos_token_id = prompt_format.stop_ids(model.generation_config)
        run = describe_run(args, base, adapter, prompt_format, counts)
        trainer, callback = make_trainer(config, model, rows, eval_rows, tokenizer, run)
        steps = trainer.set_initial_training_values(config, trainer.get_train_dataloader())[-1]
        published = read_json(Path(args.output_dir, "final_checkpoint", "run.json")).get("steps")
        if state["global_step"] >= steps and published == state["global_step"]:
            more = "to train longer, raise --max_steps or --num_train_epochs"
            print(f"{args.output_dir} is finished, after {steps} steps; {more}")
            return
        if PartialState().is_main_process:
            open_output_dir(args, state)
        if state["global_step"] >= steps:  # stopped after its last step: Trainer would take another
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            metrics = {name: value for entry in state["log_history"][-2:] for name, value in entry.items()}
        else:
            with disable_input_dtype_casting(model, active=args.use_lora):  # LoRA would keep float32 copies of inputs
                metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
        if callback.interrupted:
            print(f"saved; go on with --resume_from_checkpoint ({args.output_dir})", file=sys.stderr)
            sys.exit(130)
        if eval_rows:
            metrics |= trainer.evaluate()
        publish(trainer, args, run, metrics)


if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # of several processes the first one talks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a pipe on Windows knows few characters
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
