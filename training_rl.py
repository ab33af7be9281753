"""PPO on a causal language model against a reward model, with policy, reference, reward and value on one base model.

In: a policy (hub id, model directory or LoRA adapter directory, usually the SFT stage's final_checkpoint), a reward
model (the same three forms) or a Python function, and a data set with `prompt` or `question`.
Out, in --output_dir: `final_checkpoint/` (policy, tokenizer, run.json; the value model in its `value/`), with
--eval_steps `best_checkpoint/` in the same form, resumable `checkpoint-N/`, `metrics.jsonl`, `metrics.json`, and `samples.jsonl` with answers to fixed prompts.

    python training_rl.py --model_path checkpoints/sft/final_checkpoint \
        --reward_model_path checkpoints/rm/final_checkpoint --dataset_name json --subset data/rl --split train \
        --output_dir checkpoints/ppo --bf16 --use_lora --per_device_train_batch_size 1 \
        --gradient_accumulation_steps 64 --total_episodes 4096 --response_length 128
    python training_rl.py --model_path gpt2 --reward_function rules.py:is_brief --dataset_name json --subset data/rl \
        --output_dir checkpoints/ppo --use_lora --dry_run

The algorithm is that of trl 1.12 (`trl.experimental.ppo`), which follows Ziegler et al. 2019 (arXiv:1909.08593),
Stiennon et al. 2020 (arXiv:2009.01325) and Huang et al. 2024 (arXiv:2403.17031).
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
import glob
import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
import traceback
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

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} should be {limits}")
        return value

    parse.__name__ = kind.__name__
    return parse


class Parser(argparse.ArgumentParser):
    """It takes hyphens for underscores, and a flag by the name that it has in the other scripts."""

    aliases = {"--batch_size": "--per_device_train_batch_size", "--train_split": "--split"}

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
    add("--model_path", required=True, help="policy: hub id, model directory or LoRA adapter directory")
    add("--reward_model_path", help="reward model: hub id, model directory or LoRA adapter directory")
    add("--reward_function", action="append", default=[], metavar="FILE.py:NAME[=WEIGHT]",
        help="fn(prompts, responses, more columns of the data) -> list of float, beside or in place; may be repeated")  # fmt: skip
    add("--dataset_name", required=True, help="hub id, folder, file, or json/parquet/arrow/csv")
    add("--dataset_config", help="configuration of a hub data set that has several")
    add("--subset", help="data_dir of the data set, e.g. data/rl")
    add("--split", default="train", help='split with the prompts, e.g. "train[:95%%]"')
    add("--eval_subset", help="data_dir of the evaluation prompts (that of --subset)")
    add("--eval_split", help="prompts answered greedily at --eval_steps (the first 8 training prompts)")
    add("--per_device_train_batch_size", type=number(int, 1), default=1, help="sequences per forward pass")
    add("--total_episodes", type=number(int, 1), help="answers to sample in all (one for each prompt)")
    add("--max_prompt_length", type=number(int, 1), default=512, help="longer prompts are left out, in tokens")
    add("--response_length", type=number(int, 1), default=128, help="longest answer, in tokens")
    add("--temperature", type=number(float, 1e-3), default=0.7, help="sampling temperature, also of log-probabilities")
    add("--num_ppo_epochs", type=number(int, 1), default=4, help="passes over each batch of answers")
    add("--num_mini_batches", type=number(int, 1), default=1, help="optimizer steps per pass")
    add("--kl_coef", type=number(float, 0), default=0.05, help="weight of the KL penalty in the reward")
    add("--kl_estimator", choices=["k1", "k3"], default="k1", help="see joschu.net/blog/kl-approx.html")
    add("--target_kl", type=number(float, 0), help="adapt --kl_coef to hold this KL, nats per answer")
    add("--max_kl", type=number(float, 0), help="stop above this KL, nats per answer")
    add("--cliprange", type=number(float, 0), default=0.2, help="clip range of the probability ratio")
    add("--cliprange_value", type=number(float, 0), default=0.2, help="clip range of the value")
    add("--vf_coef", type=number(float, 0), default=0.1, help="weight of the value loss")
    add("--gamma", type=number(float, 0, 1), default=1.0, help="discount factor")
    add("--lam", type=number(float, 0, 1), default=0.95, help="lambda of generalized advantage estimation")
    add("--whiten_rewards", action="store_true", help="divide the rewards by their spread in the batch")
    add("--normalize_reward", action="store_true", help="center and scale the score by the reference's own answers")
    add("--reward_clip", type=number(float, 0), help="clip the score to +- this")
    add("--missing_eos_penalty", type=number(float, 0), default=1.0, help="off the score of an answer without an end")
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
    add("--lora_dropout", type=number(float, 0, 1), help="recorded in a new adapter (0); PPO itself has no dropout")
    add("--lora_target_modules", nargs="+", metavar="NAME", help="module names, or one regular expression (all-linear)")
    add("--load_in_4bit", action="store_true", help="frozen weights in 4 bit (NF4); needs LoRA")
    add("--load_in_8bit", action="store_true", help="frozen weights in 8 bit; needs LoRA")
    add("--shard_base", action="store_true", help="LoRA: each of several processes holds a share of the frozen weights")
    add("--learning_rate", type=number(float, 0), help="peak learning rate (5e-5 with LoRA, 3e-6 without)")
    add("--lr_scheduler_type", default="linear", help="linear, cosine, constant, constant_with_warmup, ...")
    add("--warmup_ratio", type=number(float, 0, 1), default=0.0, help="fraction of the steps spent on warm-up")
    add("--weight_decay", type=number(float, 0), default=0.0, help="AdamW weight decay")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="gradient clipping, L2 norm; 0 for none")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="micro-batches per batch")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--attn_implementation", help="sdpa, eager, flash_attention_2, ... (the model's default)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of everything that is random")
    add("--logging_steps", type=number(int, 1), default=1, help="steps between two log lines")
    add("--save_steps", type=number(int, 1), default=20, help="steps between two checkpoints")
    add("--save_total_limit", type=number(int, 1), default=2, help="checkpoints kept")
    add("--eval_steps", type=number(int, 1), help="steps between two evaluations (at the end only)")
    add("--report_to", nargs="+", default=["none"], metavar="NAME", help="trackio, tensorboard, wandb")
    add("--push_to_hub", action="store_true", help="upload the final checkpoint under the name of --output_dir")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any other field of PPOConfig")
    return parser


def is_missing(path):
    """Whether it can only be a path, and is not there; `a/b` may be on the hub."""
    is_file = re.search(r"\.(jsonl?|ndjson|csv|parquet)(\.gz)?$", path)
    return not Path(path).exists() and (re.match(r"[.~/\\]|[A-Za-z]:", path) or path.count("/") > 1 or is_file)


def parse_flags(argv=None):
    """The flags, checked as far as that needs no library; `episodes_per_update` (of each process) follows from two."""
    args = build_parser().parse_args(argv)
    trl = next((found.version for found in importlib.metadata.distributions(name="trl")), "none")
    args.use_lora |= Path(args.model_path, "adapter_config.json").is_file()
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.use_lora else 3e-6
    args.episodes_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    mini_batch = args.episodes_per_update / args.num_mini_batches
    rewarded = args.reward_model_path or args.reward_function
    uneven = mini_batch % 1 or mini_batch % min(args.per_device_train_batch_size, mini_batch)
    quantized = args.load_in_4bit or args.load_in_8bit
    sharded = os.environ.keys() & {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"}
    args.processes = int(os.environ.get("WORLD_SIZE", 1))
    shard, one = args.shard_base, args.processes == 1
    needed = {"torch": (2, 8), "transformers": (5, 23)}  # the first to train adapters on a shared base
    old = [name for name in needed if (*map(int, importlib.metadata.version(name).split(".")[:2]),) < needed[name]]
    launched = [pair for pair in args.set if re.match("fsdp|deepspeed|accelerator_config|parallelism_config", pair)]
    lora = [f"--{name}" for name in vars(args) if name.startswith("lora_") and getattr(args, name) is not None]
    steps, episodes = f"--num_mini_batches {args.num_mini_batches}", f"{args.episodes_per_update} episodes of an update"
    problems = {
        f"this script needs trl 1.12.0, found {trl}: pip install trl==1.12.0": trl != "1.12.0",
        f"--model_path {args.model_path} does not exist": is_missing(args.model_path),
        f"--reward_model_path {args.reward_model_path} does not exist": is_missing(args.reward_model_path or "."),
        f"--dataset_name {args.dataset_name} does not exist": is_missing(args.dataset_name),
        f"{' '.join(lora)} without --use_lora: all weights would be trained": lora and not args.use_lora,
        "PPO runs under DDP (accelerate launch) or --shard_base, not under FSDP or DeepSpeed": sharded or launched,
        "--target_kl multiplies --kl_coef, which has to be above 0": args.target_kl and not args.kl_coef,
        "--bf16 and --fp16 exclude each other": args.bf16 and args.fp16,
        "--load_in_4bit and --load_in_8bit exclude each other": args.load_in_4bit and args.load_in_8bit,
        "--load_in_4bit and --load_in_8bit need --use_lora: adapters are trained": quantized and not args.use_lora,
        "a reward is needed: --reward_model_path, --reward_function, or both": not rewarded,
        f"{steps} does not divide the {episodes} (batch size x accumulation) into whole micro-batches": uneven,
        "--shard_base needs several processes: accelerate launch, or torchrun --nproc_per_node 8": shard and one,
        "--shard_base needs --use_lora: all weights are trained under DDP": shard and not args.use_lora,
        "--shard_base excludes --load_in_4bit, --load_in_8bit, --fp16; use --bf16": shard and (quantized or args.fp16),
        f"--shard_base needs a newer version: pip install --upgrade {' '.join(old)}": shard and old,
    }
    for problem, is_there in problems.items():
        if is_there:
            fail(problem)
    return args


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    parse_flags()

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# What they report is meant so: an optional CPU kernel; the padding token of the tokenizer, given to the model; a head
# that is missing in the base model.
silent = "bitsandbytes transformers.trainer_utils transformers.modeling_utils transformers.distributed.tensor_parallel"
for name in silent.split():
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # trl 1.12 uses names of before v6

import accelerate
import datasets
import huggingface_hub
import pandas
import peft
import psutil
import torch
import transformers
from accelerate.utils import gather_object
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, safe_open, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback
from trl.experimental import ppo as trl_ppo
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# A JSON Lines file is read in one piece, for a column's type may show late; NA and None in CSV are text.
READERS = {"csv": {"keep_default_na": False}, "json": {"chunksize": 1 << 30}, "parquet": {}, "arrow": {}}
# What a resumed run may change and say nothing; what it may not change, for the result would be neither run.
FREE_ON_RESUME = """output_dir overwrite_output_dir resume_from_checkpoint total_episodes logging_steps save_steps
    save_total_limit eval_split eval_subset eval_steps report_to push_to_hub dry_run shard_base""".split()
SAME_ON_RESUME = """columns model_path reward_model_path reward_function dataset_name dataset_config subset split max_samples
    prompt_format max_prompt_length response_length episodes_per_update num_mini_batches
    num_ppo_epochs use_lora lora_r lora_alpha lora_target_modules normalize_reward weight_decay processes""".split()
SCRIPTS = 4  # stands in run.json: this version resumes checkpoints of this version
SHOWN = {  # of the metrics, in the log lines
    "reward": "objective/scores", "KL": "objective/kl", "length": "response/length", "stop_rate": "response/stop_rate",
    "entropy": "policy/entropy_avg", "clipped": "policy/clipfrac_avg", "explained": "val/explained_variance",
}  # fmt: skip
SCORE = "base_model.model.score.weight"  # PEFT's name for the head of a reward model's adapter
# Families that compute several texts in one row as each alone (held by tests/test_rl.py): they attend to whole texts,
# and take positions and a 4-D mask as they are given.
SHARES_ROWS = """arcee cohere deepseek_v3 ernie4_5 gemma glm glm4 gpt2 gpt_neox granite llama mistral mixtral nemotron olmo
    olmo2 phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2""".split()


def read_json(path):
    """The JSON object in a file; {} where there is none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_lines(path, rows):
    """JSON Lines, which replace those that are there when they are complete."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(f"{path}.partial").write_text(text, encoding="utf-8")
    os.replace(f"{path}.partial", path)


@dataclasses.dataclass
class PPOSettings(trl_ppo.PPOConfig):
    """TRL's PPOConfig and what it has no field for. `per_device_train_batch_size`: sequences in a forward pass."""

    episodes_per_update: int = 1  # answers, on each process
    longest_text: int = 640  # tokens of a prompt with its answer
    target_kl: float | None = None  # nats per answer
    max_kl: float | None = None
    reward_clip: float | None = None
    shard_base: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.world_size = transformers.TrainingArguments.world_size.fget(self)  # PPOConfig hides it behind a None
        self._n_gpu = min(self.n_gpu, 1)  # one process drives one GPU (no DataParallel); several: accelerate launch


def make_config(args, **own):
    """PPOSettings from the flags that have its fields' names, `own` and --set."""
    fields = {field.name for field in dataclasses.fields(PPOSettings) if field.init}
    values = {name: value for name, value in vars(args).items() if name in fields}
    values |= {
        "gradient_accumulation_steps": 1,  # one Trainer step is one update, of episodes_per_update
        "gradient_checkpointing": False,  # see load_model; Trainer would ask it of the wrapper around the models
        "warmup_steps": min(args.warmup_ratio, 0.999999),  # below 1: a fraction of the steps
        "data_seed": args.seed,  # one order of prompts for all processes, which sample with seeds of their own
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "eval_strategy": "steps" if args.eval_steps else "no",
        "use_cpu": not torch.accelerator.is_available(),
        "logging_nan_inf_filter": False,  # a NaN is to be seen
        "push_to_hub": False,  # at the end, see publish
        "save_strategy": "steps",
        **own,
    }
    for pair in args.set:
        name, equals, text = pair.partition("=")
        if not equals or name not in fields or name in values:
            fail(f"--set {pair}: should be FIELD=VALUE, with a field of TRL's PPOConfig that has no flag of its own")
        try:
            values[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            values[name] = text
    if args.learning_rate >= 1e-2:
        print(f"warning: --learning_rate {args.learning_rate:g} is high: models break above 1e-3", file=sys.stderr)
    if args.fp16 and not torch.cuda.is_available():
        fail("--fp16 needs a GPU; on a CPU use --bf16, or neither")
    if args.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail(f"--bf16: {torch.cuda.get_device_name()} cannot compute in bfloat16; use --fp16")
    for name in {*args.report_to} - {"none", "all", *transformers.integrations.get_available_reporting_integrations()}:
        fail(f"--report_to {name}: not installed; pip install {name}")
    try:
        config = PPOSettings(**values)
        optimizer = torch.optim.SGD([torch.ones(1)], config.learning_rate)
        # some schedules need --set lr_scheduler_kwargs=...
        transformers.get_scheduler(config.lr_scheduler_type, optimizer, 1, 9, config.lr_scheduler_kwargs)
        return config
    except (ValueError, TypeError, ZeroDivisionError) as error:
        fail(f"PPOConfig: {error}")


# ---- prompts and rewards ----


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
    """(data, where): one split of the data set, at most --max_samples rows of it, and its name for messages."""
    source, options = find_source(args.dataset_name, subset)
    name, bracket, part = split.partition("[")
    where = f"{args.dataset_name} {subset or ''}".strip()
    files = {}
    try:
        files = datasets.load_dataset_builder(source, args.dataset_config, **options).config.data_files or {}
        if source == "csv":  # all is text, letter by letter
            columns = pandas.read_csv(next(iter(files.values()))[0], nrows=0).columns
            options["features"] = datasets.Features({column: datasets.Value("string") for column in columns})
        names = datasets.get_dataset_split_names(source, args.dataset_config, **options)
        if name not in names and len(names) == 1:  # data/evaluation loads as `test`, whatever one asks for
            print(f"warning: {where} has one split, {names[0]!r}: used for {flag} {split}", file=sys.stderr)
            name = names[0]
        if name not in names:
            fail(f"{flag} {split}: {where} has the splits {', '.join(names)}")
        data = datasets.load_dataset(source, args.dataset_config, split=name + bracket + part, **options)
        data.data.validate(full=True)  # Arrow takes a file that is not UTF-8
    except Exception as error:  # datasets raises dozens of types
        broken = find_broken_line(sum(files.values(), [])) if source == "json" else ""
        text = broken or f"{type(error).__name__} {error} {error.__cause__ or ''}"
        fail(f"{flag} {split}: {where} cannot be read: {text}")
    for new, _, column in (pair.partition("=") for pair in args.columns):
        if column not in data.column_names:
            fail(f"--columns {new}={column}: {where} has the columns {', '.join(data.column_names)}")
        data = data.remove_columns([new] if new in data.column_names and new != column else [])
        data = data.rename_column(column, new) if new != column else data
    if not len(data):
        fail(f"{flag} {split}: {where} is empty; it should have at least one row")
    return data.select(range(min(len(data), args.max_samples or len(data)))), f"{where} [{name}{bracket}{part}]"


def load_prompts(args, subset, split, flag, prompt_format, reward_functions):
    """(rows, counts) of a split without what is too long: `row`, `prompt_ids`, `messages`, `text` (the last turn), and
    `column_NAME` for what reward functions take."""
    data, where = load_split(args, subset, split, flag)
    column = next((name for name in ("prompt", "question") if name in data.column_names), None)
    if not column:
        near = [difflib.get_close_matches(name, data.column_names, 1, 0.7) for name in ("prompt", "question")]
        hint = f"; --columns prompt={(sum(near, []) or ['COLUMN'])[0]} renames"
        fail(f"{where} has the columns {', '.join(data.column_names)}; one of these is needed: prompt; question{hint}")

    others = [name for name in data.column_names if name not in (column, "system", "tools")]
    taken = sorted(set().union(*(function.find_columns(others, where) for function in reward_functions)))

    def encode(row, index):
        messages, tools = to_messages(row[column], "user"), row.get("tools")
        if isinstance(row.get("system"), str) and first_role(messages) not in (None, "system", "developer"):
            messages = [{"role": "system", "content": row["system"]}, *messages]
        try:
            messages = read_messages(messages, last="user")
            tools = json.loads(tools or "null") if isinstance(tools, str) else drop_nulls(tools)
            ids, problem = prompt_format.encode(messages, open_end=True, tools=tools)[0], ""
        except ValueError as error:
            messages, ids, problem = [{"content": ""}], [0], f"column {column} {error}".split(", not")[0]
        text, chat = messages[-1]["content"], json.dumps(messages)  # Arrow would want one form of all messages
        found = {"row": index, "problem": problem, "prompt_ids": ids, "messages": chat, "text": text}
        return {**found, **{f"column_{name}": row[name] for name in taken}}

    rows = data.map(encode, with_indices=True, remove_columns=data.column_names, desc="Tokenizing")
    longest = args.max_prompt_length
    kept = rows.filter(lambda row: not row["problem"] and len(row["prompt_ids"]) <= longest).remove_columns("problem")
    problems = {}  # and the numbers of the rows that have each
    for number, problem in enumerate(rows["problem"][:]):
        problems.setdefault(problem, []).append(str(number))
    left_out = len(rows) - len(problems.pop("", []))
    for problem, numbers in problems.items():
        message = f"{where}: {len(numbers)} of {len(rows)} rows (row {', '.join(numbers[:3])}): {problem}"
        if left_out > len(rows) / 10:
            fail(message)
        print(f"warning: left out: {message}", file=sys.stderr)
    too_long = len(rows) - left_out - len(kept)
    limit = f"{too_long} left out (over --max_prompt_length {args.max_prompt_length} tokens)"
    if not len(kept):
        fail(f"{where}: there is no prompt, {limit}")
    if len(kept) < len(rows) / 2:
        print(f"warning: {where}: fewer than half of the rows are kept", file=sys.stderr)
    print(f"{where}: column {column}, format {prompt_format.name}; {len(kept)} prompts, {limit}")
    if unread := sorted({*others} - {*taken}):
        print(f"  columns that are not read: {', '.join(unread)}")
    if too_long:
        lengths = sorted(len(ids) for ids in rows["prompt_ids"])
        most, nearly_all = (lengths[math.ceil(part * len(lengths)) - 1] for part in (0.95, 0.99))
        print(f"  --max_prompt_length {most} keeps 95% of the prompts, {nearly_all} 99%")
    return kept, {"rows": len(kept), "too_long": too_long, "left_out": left_out}


class RewardFunction:
    """`FILE.py:NAME=WEIGHT`: a function of prompts and responses that gives floats. It gets the columns of the data that
    its parameters name, all with `**columns`, and with `messages` the prompts as {role, content}; lists all of them."""

    def __init__(self, spec):
        path, _, name = spec.rpartition(":")
        self.name, _, weight = name.partition("=")
        self.spec = f"--reward_function {spec}"
        sys.path.append(str(Path(path).parent))  # for what the file imports
        try:
            self.weight, self.function = (
                float(weight or 1),
                runpy.run_path(Path(path).resolve(strict=True)).get(self.name),
            )
        except Exception as error:  # whatever the file raises
            fail(f"{self.spec} should read FILE.py:NAME or FILE.py:NAME=WEIGHT: {type(error).__name__} {error}")
        if not callable(self.function) or not math.isfinite(self.weight):
            fail(f"{self.spec}: {path} has no function {self.name}, or the weight is no number")
        self.parameters = list(inspect.signature(self.function).parameters.values())[2:]

    def find_columns(self, there, where=""):
        """Of the columns that are there, in the data set `where`, those that the function takes."""
        named = {p.name: p.default for p in self.parameters if p.kind != p.VAR_KEYWORD}
        needed = {name for name, default in named.items() if default is inspect.Parameter.empty} - {"messages"}
        if missing := needed - {*there}:
            fail(f"{self.spec} takes the columns {', '.join(sorted(missing))}; {where} has {', '.join(there)}")
        return {*there} if len(named) < len(self.parameters) else {*there} & {*named}

    def __call__(self, rows, responses):
        there = [name.removeprefix("column_") for name in rows[0] if name.startswith("column_")]
        columns = {name: [row[f"column_{name}"] for row in rows] for name in self.find_columns(there)}
        if "messages" in [parameter.name for parameter in self.parameters]:
            columns["messages"] = [json.loads(row["messages"]) for row in rows]
        try:
            scores = [float(score) for score in self.function([row["text"] for row in rows], responses, **columns)]
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} {error} ({place.filename}, line {place.lineno})"
            print(f"error: {self.spec}: {what}", file=sys.stderr)
            traceback.print_exc()
            raise SystemExit(2) from error
        if len(scores) != len(responses):
            fail(f"{self.spec} returned {len(scores)} numbers for {len(responses)} responses")
        return scores


# ---- models ----


@dataclasses.dataclass
class Source:
    """Where a model comes from: a hub id or absolute directory of a full model, and the run.json that an earlier stage
    left ({} if none); of a LoRA adapter for it also its directory, config, weights and (reward model) scalar head."""

    base: str
    run: dict
    adapter: Path | None = None
    lora: peft.LoraConfig | None = None
    weights: dict | None = None
    head: torch.Tensor | None = None


def digest_base(base):
    """Hash of a part of one weight matrix of a local base model, which training it in place would change; else None."""
    for path in sorted(Path(base).glob("*.safetensors"))[:1]:
        with safe_open(path, framework="pt") as file:
            matrices = sorted(name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2)
            rows = file.get_slice(matrices[len(matrices) // 2])[:64]
        return hashlib.sha256(rows.float().numpy().tobytes()).hexdigest()[:16]


def locate_model(args, flag):
    """The Source of a model that is a hub id, a model directory or an adapter directory; no base model is loaded."""
    path, scores = getattr(args, flag), flag == "reward_model_path"
    folder, flag = Path(path), f"--{flag} {path}"
    run, has_lora = read_json(folder / "run.json"), (folder / "adapter_config.json").is_file()
    stage = run.get("parent_stage") if run.get("stage") == "merge" else run.get("stage")
    if stage and (stage == "reward") != scores:
        needed = "training_reward_model.py" if scores else "training_sft.py, of this script, or a base model"
        fail(f"{flag} comes from the stage {stage!r}; a model of {needed} is needed here")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        fail(f"{flag} holds no weights in safetensors; those of a run are in its final_checkpoint")
    lora = peft.PeftConfig.from_pretrained(path) if has_lora else None
    if lora and not lora.base_model_name_or_path:
        fail(f"{flag}: its adapter_config.json names no base model")
    base = str(lora.base_model_name_or_path) if lora else path
    if not Path(base).is_dir() and (Path(base).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base)):
        fail(f"{flag}: {base!r} does not exist; it should be a model directory or a hub id")
    if lora and Path(base).is_dir() and run.get("base_digest") not in (None, digest_base(base)):
        fail(f"{flag} was trained on other weights than the base model {base} has now")
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    if not lora:
        return Source(base, run)
    weights = load_file(folder / "adapter_model.safetensors")
    heads = [weights.pop(name) for name in list(weights) if "lora_" not in name]
    if lora.peft_type != "LORA" or lora.alora_invocation_tokens:
        fail(f"{flag} is a {lora.peft_type} adapter; only plain LoRA adapters can be trained on")
    if scores and [head.shape[:-1] for head in heads] != [(1,)]:
        fail(f"{flag} is not a reward model's adapter: it should hold LoRA weights and one scalar head")
    if heads and not scores:
        fail(f"{flag} changes more than LoRA weights (modules_to_save, bias): merge it, and start from that")
    lora.inference_mode, lora.modules_to_save = False, None
    lora.task_type = None if scores else "CAUSAL_LM"  # PEFT would make a head of its own for SEQ_CLS
    return Source(base, run, folder.resolve(), lora, weights, *heads)


def check_lora_flags(args, lora):
    """Refuse flags that contradict the adapter that training goes on from."""
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
    has = {"r": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout, "target_modules": targets}
    for name, found in has.items():
        asked = getattr(args, f"lora_{name}")
        if (sorted(asked) if isinstance(asked, list) else asked) not in (None, found):
            fail(f"--lora_{name} {asked}: the adapter {args.model_path} has {found}; leave the flag out")


def report_reward_model(path, run):
    """Say how good the reward model is, by the report in its run.json."""
    report = run.get("metrics", {}).get("report")
    quality = "no evaluation on record, so nobody knows how good it is"
    if report:
        low, high = report["accuracy_interval"]
        quality = f"prefers the chosen answer in {report['accuracy']:.3f} of {report['pairs']} pairs (95% interval "
        quality += f"{low:.3f} to {high:.3f}){', which is not above chance' if low <= 0.5 else ''}"
    print(f"--reward_model_path {path}: {quality}")


def load_format(args, source, requested, other=None):
    """The PromptFormat of a checkpoint, with its tokenizer: the requested one, else that in its run.json, else that of
    the model `other` if it has the same vocabulary."""
    own = source.adapter and (source.adapter / "tokenizer_config.json").is_file()
    place = source.adapter if own else source.base
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code)
        config = transformers.AutoConfig.from_pretrained(source.base, trust_remote_code=args.trust_remote_code)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # lengths, not ids, say what is padding
        same_tokens = other is not None and tokenizer.get_vocab() == other.tokenizer.get_vocab()
        recorded = source.run.get("prompt_format", same_tokens and other.name)
        found = pick_format(requested, "chat", recorded, tokenizer)
    except (OSError, ValueError) as error:
        fail(f"{place}: {error}")
    is_scorer = "SequenceClassification" in str(config.architectures)  # else its head would start at random
    if not source.adapter and config.architectures and (is_scorer != bool(other) or (other and config.num_labels != 1)):
        needed = "a classifier with one label" if other else "a language model"
        fail(f"{place} is {' '.join(config.architectures)}; {needed} is needed")
    return found


def pick_reward_format(args, source, prompt_format):
    """(PromptFormat of a reward model that reads other tokens than the policy writes, or None; whether their
    vocabulary is the same)."""
    found = load_format(args, source, "auto", prompt_format)
    if "reward" in (source.run.get("stage"), source.run.get("parent_stage")) and not source.run.get("score_at"):
        if found.tail_ids():
            fail(f"--reward_model_path {args.reward_model_path} is of an earlier version, which read scores elsewhere: "
                 "train it again")  # fmt: skip
    same_tokens = found.tokenizer.get_vocab() == prompt_format.tokenizer.get_vocab()
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    same_text = found.encode(probe) == prompt_format.encode(probe) and found.tail_ids() == prompt_format.tail_ids()
    if same_tokens and same_text:
        return None, True
    other = "another chat template" if same_tokens else "another tokenizer"
    other = f"the format {found.name}, not {prompt_format.name}" if found.name != prompt_format.name else other
    print(f"the reward model was trained with {other}: it reads each answer as text, in its own format")
    return found, same_tokens


def compute_dtype(args):
    """The precision of activations and frozen weights; `args` are flags or a config."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def load_model(kind, base, args, trainable=False):
    """A base model, of transformers' AutoModelFor`kind`. Weights that are trained are float32 (under autocast a
    bfloat16 AdamW step of 3e-6 would round to nothing); frozen ones have the precision the model computes in."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit, load_in_8bit=args.load_in_8bit, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute_dtype(args),
    )  # fmt: skip
    shares = transformers.DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"])) if args.shard_base else None
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        base,
        dtype=torch.float32 if trainable else compute_dtype(args),
        attn_implementation=args.attn_implementation,
        **(
            {"quantization_config": quantization} if args.load_in_4bit or args.load_in_8bit else {}
        ),  # None would hide its own
        device_map={"": int(os.environ.get("LOCAL_RANK", 0))} if torch.cuda.is_available() and not shares else None,
        distributed_config=shares,
        trust_remote_code=args.trust_remote_code,
        use_safetensors=True,  # no pickle
        **({"num_labels": 1} if kind == "SequenceClassification" else {}),
    )
    if shares:  # what each pass gathers again; embeddings that are also the head stay whole after the first
        names = {module: re.sub(r"\.\d+$", ".*", name) for name, module in model.named_modules()}
        model.gathered = [m for m, name in names.items() if model.fsdp_plan.get(name) == "free_full_weight"]
        if model.all_tied_weights_keys:
            model.gathered.remove(model.get_input_embeddings())
    if kind == "SequenceClassification" and not hasattr(model, "score"):
        fail(f"{base} has no scalar head named score, as reward models have here; use --reward_function")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # 4 bit, packed in a pass in eval mode: no gradients
            module.support_avx512bf16_for_cpu = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def switch_off(model):
    """No dropout, so that the first ratio is 1, and no auxiliary loss of experts, which is SFT's alone; `saved_config`
    keeps what the base has."""
    model.saved_config = copy.deepcopy(model.config)
    for holder in [model.config, model.config.get_text_config(), *model.modules()]:
        for name, value in vars(holder).items():
            if isinstance(value, float) and ("drop" in name or isinstance(holder, torch.nn.Dropout)):
                setattr(holder, name, 0.0)
        if getattr(holder, "output_router_logits", False):
            holder.output_router_logits = False


# ---- roles ----


@dataclasses.dataclass
class Role:
    """One of policy, reference, reward, value: a model, the LoRA adapter in it that plays the role (None: none does),
    and for reward and value the scalar head on the last hidden state.

    Adapters are named as no module of any model is, since PEFT finds their weights by name (RWKV has `value`)."""

    model: torch.nn.Module
    adapter: str | None = None
    head: torch.nn.Module | None = None

    @property
    def network(self):
        """The model of transformers, whose adapter is the one that is active."""
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    @contextlib.contextmanager
    def active(self, train=False):
        """The network as this role. The active adapter is module state, so a backward pass (which runs the forward
        again under gradient checkpointing) belongs inside."""
        if self.adapter:
            self.model.set_adapter(self.adapter, inference_mode=not train)
        bare = isinstance(self.model, peft.PeftModel) and not self.adapter
        with self.model.disable_adapter() if bare else contextlib.nullcontext():
            yield self.network

    def read(self, states):
        """The head's numbers (...) for hidden states (..., hidden), float32."""
        return torch.nn.functional.linear(states.float(), self.head.weight.float()).squeeze(-1)

    def weights(self):
        """{name: weight} of the adapter, or of the model where none plays the role; without the head."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if not self.adapter or f".{self.adapter}." in f"{name}."}

    def parameters(self):
        """What training this role changes."""
        return [*self.weights().values(), *(self.head.parameters() if self.head else [])]

    def adapter_weights(self):
        """By the names that PEFT saves; to find them itself it would gather a shared base."""
        own = self.weights()
        return peft.get_peft_model_state_dict(self.model, own, adapter_name=self.adapter, save_embedding_layers=False)

    def save(self, directory):
        """In a form that one PEFT or transformers call loads: adapter and head as those of a reward model."""
        if not self.adapter:
            running, self.model.config = self.model.config, self.model.saved_config
            self.model.save_pretrained(directory)
            self.model.config = running
            return
        config, weights = copy.copy(self.model.peft_config[self.adapter]), self.adapter_weights()
        if self.head:
            weights[SCORE] = self.head.weight
            config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
        config.inference_mode = True
        config.save_pretrained(directory)
        if not Path(config.base_model_name_or_path).is_dir():  # the hub refuses a card that names a path
            self.model.create_or_update_model_card(directory)
        weights = {name: tensor.detach().clone() for name, tensor in weights.items()}  # none shares another's memory
        save_file(weights, directory / "adapter_model.safetensors", {"format": "pt"})

    def load(self, directory):
        """Take back what was saved."""
        if not self.adapter:  # by transformers, which saves some weights under other names (experts, GPT-NeoX's head)
            self.model.load_state_dict(type(self.model).from_pretrained(directory, dtype=torch.float32).state_dict())
            return
        weights = load_file(directory / "adapter_model.safetensors")
        if self.head:
            self.head.weight.data.copy_(weights.pop(SCORE))
        peft.set_peft_model_state_dict(self.model, weights, adapter_name=self.adapter)


class Roles(torch.nn.Module):
    """The four roles and the models that they share, as the one module that Trainer places and optimizes."""

    def __init__(self, policy, reference, reward, value):
        super().__init__()
        self.policy, self.reference, self.reward, self.value = policy, reference, reward, value
        roles = [role for role in (policy, reference, reward, value) if role]
        self.models = torch.nn.ModuleList(dict.fromkeys(role.model for role in roles))
        self.heads = torch.nn.ModuleList(role.head for role in roles if role.head)
        self.config = policy.network.config
        for model in self.models:
            switch_off(model)
        self.mark_trained()

    def mark_trained(self):
        """Gradients for the policy and the value model only; `Role.active` leaves them to the role that it was for."""
        self.requires_grad_(False)
        for parameter in self.policy.parameters() + self.value.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def list_linear_layers(model):
    """Names of the linear layers without heads, without routers (those of PhiMoE return tuples), and without the out_proj
    of recurrent layers, whose kernels read the weight themselves."""
    kinds = (torch.nn.Linear, transformers.Conv1D)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    heads = [model.get_output_embeddings(), getattr(model, "score", None)]
    names = [n for n, module in linear.items() if module not in heads and "Router" not in type(module).__name__]
    return [name for name in names if not (model._is_stateful and name.endswith("out_proj"))]


def new_lora(args, model, task_type):
    """The config of a new adapter for a model of transformers; without --lora_target_modules on all linear layers."""
    targets = args.lora_target_modules or ["all-linear"]
    targets = list_linear_layers(model) if targets == ["all-linear"] else targets
    if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        targets = targets[0]  # a regular expression
    alpha = 32 if args.lora_alpha is None else args.lora_alpha
    sizes = {"r": args.lora_r or 16, "lora_alpha": alpha, "lora_dropout": args.lora_dropout or 0.0}
    heads = None if task_type else ["score"]  # PEFT knows that of a CAUSAL_LM
    return peft.LoraConfig(target_modules=targets, exclude_modules=heads, task_type=task_type, **sizes)


def put_adapter(model, name, config, weights=None, head=None):
    """A Role of one more adapter on `model`, with the weights that are given, and a float32 copy of a scalar head."""
    try:
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, copy.deepcopy(config))
        else:
            model = peft.get_peft_model(model, copy.deepcopy(config), adapter_name=name)
    except ValueError as error:
        fail(f"an adapter does not fit its base model {model.config.name_or_path}: {error}")
    fit = peft.set_peft_model_state_dict(model, weights or {}, adapter_name=name)
    if fit.unexpected_keys:
        fail(f"an adapter does not fit its base model {model.config.name_or_path}: it has {fit.unexpected_keys[0]}")
    role = Role(model, name)
    if head is not None:
        role.head = torch.nn.Linear(head.shape[1], 1, bias=False)
        role.head.weight.data.copy_(head)
    return role


def copy_adapter(role, name, head=None):
    """A Role of a copy of a role's adapter on the same model."""
    return put_adapter(role.model, name, role.model.peft_config[role.adapter], role.adapter_weights(), head)


@contextlib.contextmanager
def quick_adapters(model, dtype):
    """The active adapter's layers as two products in `dtype`, for generation: what PEFT's own forward casts, scales and
    asks in Python in every layer for every token takes a GPU as long as the base does."""

    def quicken(layer, name):
        base, first = layer.base_layer, layer.lora_A[name].weight.to(dtype)
        second = (layer.lora_B[name].weight * layer.scaling[name]).to(dtype)
        linear = torch.nn.functional.linear
        layer.forward = lambda x, *args, **kwargs: base(x, *args, **kwargs) + linear(linear(x, first), second)

    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    layers = [layer for layer in layers if isinstance(layer.base_layer, (torch.nn.Linear, transformers.Conv1D))]
    with torch.no_grad():
        for layer in layers:
            (name,) = layer.active_adapters
            if name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]:  # no DoRA
                quicken(layer, name)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def load_roles(args, source, reward_source, same_tokens):
    """Every base model once, with the roles on it: policy and its frozen copy as adapters or as full models, and the
    reward model on the policy's base if that is the base it was trained on.

    The value model starts as a copy of the reward model (Stiennon et al. 2020, section 3.4), if there is one that reads
    the policy's tokens; else as the policy with a zero head, so that the first advantages are those of the rewards."""
    if args.use_lora:
        model = load_model("CausalLM", source.base, args)
        policy = put_adapter(model, "default", source.lora or new_lora(args, model, "CAUSAL_LM"), source.weights)
        reference = copy_adapter(policy, "ppo_reference")
    else:
        policy, reference = (Role(load_model("CausalLM", source.base, args, trainable=True)) for _ in range(2))
    reward = None
    if reward_source:
        shared = args.use_lora and reward_source.lora and reward_source.base == source.base
        model = policy.model if shared else load_model("SequenceClassification", reward_source.base, args)
        if reward_source.lora:
            reward = put_adapter(model, "ppo_reward", reward_source.lora, reward_source.weights, reward_source.head)
        else:
            reward = Role(model, None, model.score)
    start = reward if same_tokens else None
    if start and start.adapter:
        value = copy_adapter(start, "ppo_value", start.head.weight)
    elif start and args.use_lora:  # on the classifier, which without this adapter is the reward model
        value = put_adapter(start.model, "ppo_value", new_lora(args, start.model, None), head=start.head.weight)
        start.model = value.model
    elif args.use_lora:
        width = policy.network.get_output_embeddings().weight.shape[1]  # OPT-350m's is not its hidden_size
        value = copy_adapter(policy, "ppo_value", torch.zeros(1, width))
    else:
        base = reward_source.base if start else source.base
        model = load_model("SequenceClassification", base, args, trainable=True)
        if not start:
            model.score.weight.data.zero_()
        value = Role(model, None, model.score)
    return Roles(policy, reference, reward, value)


def check_base(args, base, scorer, tokens, longest):
    """Refuse a base model that cannot be trained or shared out as it is asked for, or that knows fewer `tokens` than the
    tokenizer; or if it, or the `scorer`, which reads the same tokens if there is one, has fewer positions than the
    `longest` text. No weights are read."""
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
    quantized = getattr(config, "quantization_config", None)
    if quantized and not args.use_lora:
        fail(f"--model_path {args.model_path} is stored in 4 or 8 bit: add --use_lora")
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
    if args.shard_base:
        layers = {re.sub(r"\.\d+$", ".*", name) for name in modules} & {*model.fsdp_plan}
        if quantized or not any("*" in name for name in layers):
            fail(f"--shard_base: no plan for {config.model_type}, or {base} is stored in 4 or 8 bit")
    embeddings = config.get_text_config().vocab_size
    if tokens > embeddings:
        fail(f"--model_path {args.model_path}: {tokens} tokens, but embeddings for {embeddings}: "
             "training_sft.py without --use_lora adds and trains them")  # fmt: skip
    for place in filter(None, (base, scorer)):
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=args.trust_remote_code)
        positions = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
        if longest > positions:
            fail(f"a prompt with its answer may have {longest} tokens, {place} has {positions} positions: lower "
                 f"--max_prompt_length {args.max_prompt_length} or --response_length {args.response_length}")  # fmt: skip


def free_memory():
    """Bytes that are free, on a GPU with those that PyTorch keeps for later."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def report_roles(roles):
    """Say what the models take, and warn where gradients and AdamW's moments (12 bytes a weight) exceed what is free."""
    trained = sum(p.numel() for p in roles.parameters() if p.requires_grad)
    size = sum(getattr(p, "_local_tensor", p).nbytes for p in roles.parameters()) / 1e9
    print(f"four roles on {len(roles.models)} model(s), {size:.2f} GB (1e9 bytes); {trained:,} weights are trained")
    if 12 * trained > free_memory():
        sizes = f"{12 * trained / 1e9:.1f} GB, {free_memory() / 1e9:.1f} GB are free"
        text = f"gradients and optimizer take {sizes}: see --use_lora"
        print(f"warning: {text}", file=sys.stderr)


# ---- training ----


def shares_rows(network, longest):
    """Whether several texts of up to `longest` tokens in one row are the same computation as each alone: no layer sees
    less, and positions are not scaled by the longest of them (longrope)."""
    config = network.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "sliding_window", None), rope.get("original_max_position_embeddings")]
    takes_masks = network.config._attn_implementation in ("sdpa", "eager")
    return config.model_type in SHARES_ROWS and takes_masks and all(longest <= (limit or longest) for limit in limits)


@dataclasses.dataclass
class MicroBatch:
    """B episodes of a rollout with W response positions, as R rows of S tokens. R is 1 where texts share a row: what all
    prompts begin with, then of each episode the rest of its prompt and its response, which `mask` keeps apart. Else
    each episode has its own row, padded behind it. A response of length n has actions at 0..n-1, and where W allows the
    state after its last token at n. What is None at first is filled in by the update."""

    rows: list
    responses: list
    input_ids: torch.Tensor  # (R, S)
    position_ids: torch.Tensor  # (R, S)
    mask: torch.Tensor | None  # (1, 1, S, S), or None where a causal mask does
    state_index: torch.Tensor  # (B, W) place in the flat (R * S) of the token whose hidden state is the state
    columns: torch.Tensor  # (K,) columns of the tokens before sampled ones: where logits are needed
    action_index: torch.Tensor  # (sum of lengths,) place of each action in the flat (R * K)
    targets: torch.Tensor  # (R, K) the sampled tokens
    lengths: torch.Tensor  # (B,) response lengths
    ended: torch.Tensor  # (B,) bool: the response ends with a stop id
    actions: torch.Tensor  # (B, W) bool: a sampled token
    states: torch.Tensor  # (B, W) bool: an action, or the state after the last one
    logprobs: torch.Tensor = None  # (B, W) of the sampled tokens
    entropy: torch.Tensor = None  # (B, W) of the distributions that they were sampled from
    ref_logprobs: torch.Tensor = None  # (B, W)
    values: torch.Tensor = None  # (B, W) of the state before the token
    given: torch.Tensor = None  # (B, functions) from reward functions
    scores: torch.Tensor = None  # (B,) from reward model and functions
    advantages: torch.Tensor = None  # (B, W)
    returns: torch.Tensor = None  # (B, W)

    def place_actions(self, values):
        """Values (R, K) as (B, W): those of the actions at their places, 0 elsewhere."""
        values = values.flatten()[self.action_index]
        return torch.zeros_like(self.actions, dtype=values.dtype).masked_scatter(self.actions, values)


class KLAboveLimit(Exception):
    """The KL of a rollout is above --max_kl."""


class PPOTrainer(trl_ppo.PPOTrainer):
    """TRL's algorithm, settings and names of metrics on the loop of `transformers.Trainer`, whose `train` is taken back:
    one of its steps is one update, a rollout and num_ppo_epochs x num_mini_batches optimizer steps on it.

    `prompt_format` is the policy's; `reward_format` that of a reward model which reads other tokens, or None;
    what `reward_functions` give is added to the model's scores; `run` is for run.json."""

    def __init__(self, roles, args, prompt_format, reward_format, reward_functions, run, **kwargs):
        self.roles = roles
        self.prompt_format = prompt_format
        self.reward_format = reward_format
        self.reward_functions = reward_functions
        self.run = run
        self.tokenizer = prompt_format.tokenizer
        self.stop_ids = prompt_format.stop_ids(roles.policy.network.generation_config)
        self.ppo_state = {"kl_coef": args.kl_coef, "reward_mean": 0.0, "reward_std": 1.0}
        self.latest = {}  # the last update's metrics, for the next log line
        self.references = []  # the reference's answers to the fixed prompts
        kwargs |= {"data_collator": list, "processing_class": self.tokenizer}
        super(trl_ppo.PPOTrainer, self).__init__(model=roles, args=args, **kwargs)
        self._train_batch_size = args.episodes_per_update  # the prompts that Trainer draws for one of its steps
        self.model_accepts_loss_kwargs = False
        self.is_distributed_loading_by_transformers = True  # no DDP: accumulate_gradients adds up what processes find
        self.in_step = args.shard_base and not self.fits_whole()  # token by token, since each gathers the base
        self.episodes = args.episodes_per_update * args.world_size
        reward = None if reward_format else roles.reward  # in a format of its own it reads one text at a time
        readers = [role.network for role in (roles.policy, roles.value, reward) if role]
        self.share_rows = all(shares_rows(network, args.longest_text) for network in readers)
        if not self.share_rows:
            print("texts that share a row of this model would not be computed as alone: each has a row of its own")

    def fits_whole(self):
        """Whether each process can gather the base for generation, in half of the memory that is free in all: the rest is
        for the cache. Else every token gathers every layer."""
        size = sum(p.nbytes - getattr(p, "_local_tensor", p).nbytes for p in self.roles.parameters())
        free = free_memory()
        fits = all(gather_object([2 * size < free]))
        how = "whole in each process, which is fast" if fits else "in shares, which is slow"
        print(f"generation with the base {how}: its other shares are {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        return fits

    def _move_model_to_device(self, model, device):
        """Shares are where they are to be."""
        super()._move_model_to_device(model.heads if self.args.shard_base else model, device)

    def _sync_replicated_trainable_parameters(self, model):
        """Trainer would average gradients in each backward pass."""

    train = transformers.Trainer.train
    get_train_dataloader = transformers.Trainer.get_train_dataloader
    _save_checkpoint = transformers.Trainer._save_checkpoint

    # ---- one update ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One PPO update on a rollout, up to its last optimizer step, which Trainer takes."""
        started = time.perf_counter()
        model.eval()  # in train mode gradient checkpointing generates without a cache
        batches = self.roll_out(inputs)
        rolled_out = time.perf_counter()
        rollout = types.SimpleNamespace()  # of all N episodes: (N,) or (N, W)
        for name in "lengths ended actions states logprobs entropy ref_logprobs values given scores".split():
            setattr(rollout, name, torch.cat([getattr(batch, name) for batch in batches]))
        rollout.read = torch.tensor([batch.input_ids.numel() for batch in batches], device=self.args.device)
        self.stop_unless(rollout.logprobs.isfinite().all(), "a log-probability")
        self.stop_unless(rollout.scores.isfinite().all(), "a reward")
        self.shape_rewards(rollout)
        self.estimate_advantages(rollout, batches)
        kl = self.total(rollout.kl) / self.episodes
        if self.args.max_kl and kl > self.args.max_kl:
            self.latest = {"objective/kl": kl}  # Trainer's loop has no other way out before its optimizer step
            raise KLAboveLimit(f"KL {kl:.2f} nats is above --max_kl {self.args.max_kl}")
        for module in model.modules():  # layers only checkpoint in train mode, in which routers would add noise
            module.training = getattr(module, "gradient_checkpointing", False)
        losses = self.optimize(model, batches)
        self.keep_episodes(rollout, batches)
        self.latest = self.measure(rollout, losses, rolled_out - started, time.perf_counter() - rolled_out)
        if self.args.target_kl:  # Ziegler et al. 2019, section 2.2; horizon 10,000 episodes
            error = min(max(kl / self.args.target_kl - 1, -0.2), 0.2)
            self.ppo_state["kl_coef"] *= 1 + error * self.episodes / 10_000
        return losses["loss/policy_avg"] + self.args.vf_coef * losses["loss/value_avg"]

    def stop_unless(self, fine, what):
        """Raise FloatingPointError, in all processes at once, if `what` was not finite in one of them."""
        if any(gather_object([not fine])):
            raise FloatingPointError(f"{what} is NaN or infinite in update {self.state.global_step + 1}")

    def beat(self):
        """An update may take minutes: the bar shows that it goes on."""
        self.callback_handler.on_substep_end(self.args, self.state, self.control)

    def total(self, values):
        """The sum of a tensor over all processes, a float."""
        return self.accelerator.reduce(values.sum().float(), "sum").item()

    # ---- rollout ----

    @torch.no_grad()
    def roll_out(self, rows):
        """A response to every prompt with its log-probabilities, values and scores; returns a list of MicroBatch."""
        policy, reference, value = self.roles.policy, self.roles.reference, self.roles.value
        responses = self.generate(policy, rows)
        width = max(gather_object([max(map(len, responses))]))
        batches = []
        for group in self.make_groups(rows, responses):
            some = [rows[i] for i in group], [responses[i] for i in group]
            batches.append(self.collate(*some, width, self.share_rows and len(group) > 1))
        with policy.active() as network:
            for batch in batches:
                logits = self.response_logits(network, batch)
                batch.logprobs = batch.place_actions(selective_log_softmax(logits, batch.targets))
                batch.entropy = batch.place_actions(entropy_from_logits(logits))
        with reference.active() as network:
            for batch in batches:
                batch.ref_logprobs = self.response_logprobs(network, batch)
        with value.active() as network:
            for batch in batches:
                batch.values = value.read(self.hidden_states(network, batch)[batch.state_index]) * batch.states
        self.score(batches)
        return batches

    @contextlib.contextmanager
    def whole(self, network):
        """The base of a network that is not gathered anew for each token, where it fits."""
        layers = [] if self.in_step else getattr(network, "gathered", [])
        for layer in layers:
            layer.set_reshard_after_forward(False)
        yield
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()

    def texts_at_once(self, config):
        """How many answers are written at a time: local_rollout_forward_batch_size (64), on a GPU no more than seven tenths
        of the free memory hold."""
        most = self.args.local_rollout_forward_batch_size
        if self.args.device.type == "cpu":  # there runs repeat bit for bit
            return most
        try:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        except (AttributeError, RuntimeError):  # its layers differ (Gemma 4)
            width = config.hidden_size
        cached = 2 * config.num_hidden_layers * width * self.args.longest_text  # keys and values
        # the prompts go through the first layer at once: of each token base, adapter and their sum, in and out
        passing = 5 * getattr(config, "intermediate_size", 4 * config.hidden_size)
        passing *= self.args.longest_text - self.args.response_length
        text = (cached + passing) * compute_dtype(self.args).itemsize  # bytes
        return min(gather_object([max(1, min(most, int(0.7 * free_memory() // text)))]))

    def generate(self, role, rows, sample=True):
        """Responses to the rows' prompts: lists of at most response_length ids that end with the first stop id."""
        sampling = {"temperature": self.args.temperature, "top_k": 0, "top_p": 1.0} if sample else {}
        config = transformers.GenerationConfig(
            max_new_tokens=self.args.response_length, do_sample=sample, eos_token_id=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id, **sampling,
        )  # fmt: skip
        # padding before a text would enter a state that goes from token to token
        text_config = role.network.config.get_text_config()
        kinds = set(getattr(text_config, "layer_types", None) or ())
        recurrent = kinds - {"full_attention", "sliding_attention", "chunked_attention"} or role.network._is_stateful
        size = 1 if recurrent else self.texts_at_once(text_config)
        responses = []

        def go_on(ids, scores, **kwargs):  # after each token
            self.beat()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        # autocast keeps its 16-bit copies of weights for the next token only where they are trained
        quick = quick_adapters(role.model, compute_dtype(self.args)) if role.adapter else contextlib.nullcontext()
        with role.active(train=True) as network, self.accelerator.autocast(), quick, self.whole(network):
            kept, network.generation_config = network.generation_config, config  # its own would fill gaps (top_p)
            for i in range(0, len(rows), size):
                prompts = [torch.tensor(row["prompt_ids"], device=self.args.device) for row in rows[i : i + size]]
                ids = pad_sequence(prompts, True, self.tokenizer.pad_token_id, padding_side="left")
                mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, padding_side="left")
                inputs = {"input_ids": ids, "attention_mask": mask}
                sampled = network.generate(**inputs, stopping_criteria=[go_on], synced_gpus=self.in_step)
                for response in sampled[:, ids.shape[1] :].tolist():
                    end = next((n for n, token in enumerate(response, 1) if token in self.stop_ids), None)
                    responses.append(response[:end])
            network.generation_config = kept
        return responses

    def make_groups(self, rows, responses):
        """Indices of the episodes of each micro-batch, sequences of like length together.

        A shared row holds the tokens of `size` sequences of the longest kind, but no more than the hidden size (there
        attention, which is not sparse in it, costs about a sixth of the linear layers) unless one sequence has more.
        Rows of their own, and mini-batches, which should be equal in number, are of `size` sequences."""
        size = min(self.args.per_device_train_batch_size, len(rows) // self.args.num_mini_batches)
        shared = len(os.path.commonprefix([row["prompt_ids"] for row in rows]))
        own = [len(row["prompt_ids"]) - shared + len(response) for row, response in zip(rows, responses)]
        order = sorted(range(len(rows)), key=lambda i: -own[i])
        if self.args.num_mini_batches > 1:  # of all lengths, since the advantages are whitened over all
            order = torch.randperm(len(rows)).tolist()
        if self.args.num_mini_batches > 1 or not self.share_rows:
            return [order[k : k + size] for k in range(0, len(order), size)]
        limit = min(size * self.args.longest_text, self.roles.config.get_text_config().hidden_size)
        groups = [order[:1]]
        for i in order[1:]:
            more = [*groups[-1], i]
            written = sum(len(responses[k]) for k in more)  # which takes logits
            if shared + sum(own[k] for k in more) > limit or written > size * self.args.response_length:
                groups.append([])
            groups[-1].append(i)
        passes = max(gather_object([len(groups)])) if self.args.shard_base else len(groups)
        while len(groups) < passes:  # each gathers the base, so all processes make as many
            groups.sort(key=len)
            largest = groups.pop()
            groups += [largest[::2], largest[1::2]]
        return groups

    def collate(self, rows, responses, width, one_row=False):
        """A MicroBatch of some episodes with `width` response positions, in one row or in rows of their own, which are
        padded behind the text, where a causal model does not see it."""
        prompts = [row["prompt_ids"] for row in rows]
        shared = 0  # tokens that all prompts begin with; the last one of each stays its own
        if one_row:
            shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        with self.args.device:
            texts = [torch.tensor(prompt[shared:] + response) for prompt, response in zip(prompts, responses)]
            sizes = torch.tensor([len(text) for text in texts])
            if one_row:
                beginning = torch.tensor(prompts[0][:shared], dtype=torch.long)
                ids = torch.cat([beginning, *texts])[None]
                positions = torch.cat([torch.arange(shared), *(shared + torch.arange(len(text)) for text in texts)])
                firsts = shared + sizes.cumsum(0) - sizes  # places of the texts in the flat ids
            else:
                ids = pad_sequence(texts, batch_first=True, padding_value=self.tokenizer.pad_token_id)
                positions = torch.arange(ids.shape[1])
                firsts = torch.arange(len(texts)) * ids.shape[1]
            lengths, steps = torch.tensor([len(response) for response in responses]), torch.arange(width)
            actions, states = steps < lengths[:, None], steps <= lengths[:, None]
            state_index = (firsts + sizes - lengths - 1)[:, None] + torch.minimum(steps, lengths[:, None])
            columns, inverse = (state_index[actions] % ids.shape[1]).unique(return_inverse=True)
            action_index = state_index[actions] // ids.shape[1] * len(columns) + inverse
            targets = torch.zeros(len(ids) * len(columns), dtype=torch.long)
            targets[action_index] = torch.tensor([token for response in responses for token in response])
            ended = torch.tensor([response[-1] in self.stop_ids for response in responses])
            mask = self.tree_mask(shared, sizes) if one_row else None
        return MicroBatch(
            rows, responses, ids, positions.expand(len(ids), -1), mask, state_index, columns, action_index,
            targets.view(len(ids), -1), lengths, ended, actions, states,
        )  # fmt: skip

    def tree_mask(self, shared, sizes):
        """The mask (1, 1, S, S) of a row of `shared` tokens and then texts of `sizes` tokens that see them and
        themselves, as numbers that are added to the scores: SDPA would make them of a bool mask in every layer."""
        owner = torch.cat([torch.full((shared,), -1), torch.arange(len(sizes)).repeat_interleave(sizes)])
        seen = ((owner == owner[:, None]) | (owner == -1)).tril()
        dtype = compute_dtype(self.args)
        return torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype).masked_fill(seen, 0)[None, None]

    def read(self, model, batch, **kwargs):
        """What a model makes of the rows."""
        place = {"position_ids": batch.position_ids, "attention_mask": batch.mask}
        self.beat()
        with self.accelerator.autocast():
            return model(input_ids=batch.input_ids, use_cache=False, **place, **kwargs)

    def response_logits(self, network, batch):
        """Logits (R, K, vocabulary) before the response tokens, over the sampling temperature, float32."""
        return self.read(network, batch, logits_to_keep=batch.columns).logits.float() / self.args.temperature

    def response_logprobs(self, network, batch):
        """Log-probabilities (B, W) of the response tokens, 0 where there is none: the one code path for old, new and
        reference ones, so that the first ratio is 1 and the first KL is 0."""
        return batch.place_actions(selective_log_softmax(self.response_logits(network, batch), batch.targets))

    def hidden_states(self, network, batch):
        """Last hidden states (R * S, hidden) of the rows, those that a head reads."""
        body = getattr(network, network.base_model_prefix, None) or network.model  # Llama 4's base_model is itself
        if not hasattr(network, "gathered"):
            return self.read(body, batch).last_hidden_state.flatten(0, 1)
        found = []  # the shares come together in calls of the whole network
        with network.get_decoder().register_forward_hook(lambda module, inputs, output: found.append(output[0])):
            self.read(network, batch, logits_to_keep=1)
        return found[0].flatten(0, 1)

    def score(self, batches):
        """Fill in the score (B,) of each response: the reward model's plus those of the functions, which are called once
        for all, by weight."""
        texts = [self.response_texts(batch) for batch in batches]
        rows = [row for batch in batches for row in batch.rows]
        given = [function(rows, sum(texts, [])) for function in self.reward_functions]
        weights = torch.tensor([function.weight for function in self.reward_functions], device=self.args.device)
        given = torch.tensor(given, device=self.args.device).view(-1, len(rows)).T
        for batch, batch_texts, parts in zip(batches, texts, given.split([len(batch.rows) for batch in batches])):
            batch.given = parts
            batch.scores = parts @ weights + (self.model_scores(batch, batch_texts) if self.roles.reward else 0)

    def model_scores(self, batch, texts):
        """The reward model's score (B,) of each response, read at the last token of what the template makes of it; where
        it reads other tokens than the policy writes, of the conversation in its own. A cut answer has no end."""
        role, scores = self.roles.reward, []
        tail = (self.reward_format or self.prompt_format).tail_ids()
        with role.active() as network:
            if self.reward_format is None:
                whole = [ids + tail * int(ended) for ids, ended in zip(batch.responses, batch.ended)]
                width = max(map(len, whole))
                longer = self.collate(batch.rows, whole, width, batch.mask is not None) if tail else batch
                return role.read(self.hidden_states(network, longer)[longer.state_index[:, 0] + longer.lengths])
            for row, text, ended in zip(batch.rows, texts, batch.ended):
                messages = json.loads(row["messages"])
                try:
                    ids = self.reward_format.encode([*messages, {"role": "assistant", "content": text}])[0]
                except ValueError:  # its template leaves thoughts out
                    text = text.rpartition("</think>")[2].strip()
                    ids = self.reward_format.encode([*messages, {"role": "assistant", "content": text}])[0]
                if not text:  # in `qa` that would be the question as an answer
                    ids = [*self.reward_format.encode(messages, open_end=True)[0], self.reward_format.end_id()]
                response = ids[1:] + tail if ended else ids[1:-1]
                alone = self.collate([{"prompt_ids": ids[:1]}], [response], len(response))
                scores.append(role.read(self.hidden_states(network, alone)[-1:]))
            return torch.cat(scores)

    def response_texts(self, batch):
        texts = self.tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
        # in `qa` the space of "Answer: x" is part of the answer's first token
        return [text.removeprefix(" ") for text in texts] if self.prompt_format.name == "qa" else texts

    def keep_episodes(self, rollout, batches):
        """The update's lowest, middle and highest episode by score, for samples.jsonl; of at most some 200 updates."""
        step = self.state.global_step + 1
        if step % math.ceil(self.args.max_steps / 200) or not self.is_world_process_zero():
            return
        rows = [row for batch in batches for row in batch.rows]
        texts = [text for batch in batches for text in self.response_texts(batch)]
        order = rollout.scores.argsort().tolist()
        episodes = []
        for i in dict.fromkeys((order[0], order[len(order) // 2], order[-1])):
            episode = {"step": step, "row": rows[i]["row"], "prompt": rows[i]["text"], "answer": texts[i]}
            episode |= {"score": rollout.scores[i].item(), "kl": rollout.kl[i].sum().item()}
            episodes.append(episode | {"length": rollout.lengths[i].item(), "ended": rollout.ended[i].item()})
        self.write_samples(episodes)

    def write_samples(self, samples):
        """Add lines of one kind, answers or episodes, to samples.jsonl; a resumed run comes by its own again."""
        path, (first, *_) = Path(self.args.output_dir, "samples.jsonl"), samples
        before = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []  # Windows replaces no open file
        before = map(json.loads, filter(None, before))
        kept = [line for line in before if line["step"] < first["step"] or ("answer" in line) != ("answer" in first)]
        with contextlib.suppress(PermissionError):  # on Windows, while a report reads it
            write_lines(path, kept + samples)

    # ---- rewards and advantages ----

    def shape_rewards(self, rollout):
        """Per-token rewards: the KL penalty (http://joschu.net/blog/kl-approx.html), and at the state after the last
        token, as in TRL, the score, normalized, clipped, less the EOS penalty."""
        args = self.args
        score = (rollout.scores - self.ppo_state["reward_mean"]) / self.ppo_state["reward_std"]
        if args.reward_clip:
            score = score.clamp(-args.reward_clip, args.reward_clip)
        rollout.shaped_scores = score - args.missing_eos_penalty * ~rollout.ended
        rollout.kl = (rollout.logprobs - rollout.ref_logprobs) * rollout.actions
        estimate = rollout.kl if args.kl_estimator == "k1" else (-rollout.kl).exp() - 1 + rollout.kl
        rollout.penalty = self.ppo_state["kl_coef"] * estimate
        ends = rollout.states.sum(1, keepdim=True) - 1
        rollout.rewards = (-rollout.penalty).scatter_add(1, ends, rollout.shaped_scores[:, None])
        if args.whiten_rewards:
            mean, variance = self.moments(rollout.rewards[rollout.states])
            rewards = (rollout.rewards - mean) / math.sqrt(variance + 1e-8) + mean
            rollout.rewards = rewards * rollout.states

    def estimate_advantages(self, rollout, batches):
        """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16), then whitened."""
        advantages = []
        advantage = following = torch.zeros_like(rollout.scores)
        for reward, value in zip(rollout.rewards.T.flip(0), rollout.values.T.flip(0)):
            advantage = reward + self.args.gamma * (following + self.args.lam * advantage) - value
            advantages.append(advantage)
            following = value
        advantages = torch.stack(advantages[::-1], dim=1)
        rollout.returns = advantages + rollout.values
        mean, variance = self.moments(advantages[rollout.actions])
        advantages = (advantages - mean) / math.sqrt(variance + 1e-8) * rollout.actions
        sizes = [len(batch.rows) for batch in batches]
        for batch, own_advantages, own_returns in zip(batches, advantages.split(sizes), rollout.returns.split(sizes)):
            batch.advantages, batch.returns = own_advantages, own_returns

    def moments(self, values):
        """Mean and variance of a tensor over all processes, the latter with Bessel's correction."""
        count = self.total(torch.ones_like(values))
        mean = self.total(values) / count
        return mean, self.total((values - mean).square()) / max(count - 1, 1)

    # ---- optimization ----

    def optimize(self, model, batches):
        """num_ppo_epochs x num_mini_batches optimizer steps; the gradients of the last are left for Trainer. Returns
        the means over the steps of what they minimized and measured."""
        plan, stats = [], []
        for _ in range(self.args.num_ppo_epochs):
            parts = torch.randperm(len(batches)).split(len(batches) // self.args.num_mini_batches)
            plan += [[batches[i] for i in part] for part in parts]
        for mini_batch in plan[:-1]:
            stats.append(self.accumulate_gradients(model, mini_batch))
            self._get_grad_norm(model, self._clip_grad_norm(model) if self.args.max_grad_norm else None)
            self.optimizer.step()
            self.optimizer.zero_grad()
        stats.append(self.accumulate_gradients(model, plan[-1]))
        means = {name: sum(step[name] for step in stats) / len(plan) for name in stats[0]}
        return {name: self.accelerator.reduce(value, "sum") for name, value in means.items()}

    def accumulate_gradients(self, model, mini_batch):
        """Gradients of one mini-batch, in which each token counts the same, whatever micro-batch or process it is in."""
        actions = self.total(torch.cat([batch.actions for batch in mini_batch]))
        states = self.total(torch.cat([batch.states for batch in mini_batch]))
        with self.roles.policy.active(train=True):
            found = [self.policy_backward(batch, actions) for batch in mini_batch]
        with self.roles.value.active(train=True):
            found = [part | self.value_backward(batch, states) for part, batch in zip(found, mini_batch)]
        if self.accelerator.num_processes > 1:  # sums, since the losses are divided by the counts of all processes
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        return {name: sum(part[name] for part in found) for name in found[0]}

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer, too, asks for this right before its step: nothing that is not finite reaches the weights."""
        norm = float(super()._get_grad_norm(model, grad_norm))
        self.stop_unless(self.args.fp16 or math.isfinite(norm), "the gradient")  # float16 scales by overflows
        return norm

    def policy_backward(self, batch, actions):
        """Gradients of the clipped policy loss (Schulman et al. 2017, arXiv:1707.06347, equation 7), as a part of the
        mean over `actions` positions. Returns this part of the metrics."""
        logprobs = self.response_logprobs(self.roles.policy.network, batch)
        difference = (logprobs - batch.logprobs) * batch.actions
        ratio = difference.exp()
        clipped = ratio.clamp(1 - self.args.cliprange, 1 + self.args.cliprange)
        loss, clipped_loss = -batch.advantages * ratio, -batch.advantages * clipped
        policy_loss = (torch.max(loss, clipped_loss) * batch.actions).sum() / actions
        self.accelerator.backward(policy_loss)
        return {
            "loss/policy_avg": policy_loss.detach(),
            "policy/clipfrac_avg": ((clipped_loss > loss) * batch.actions).sum() / actions,
            "policy/approxkl_avg": 0.5 * difference.detach().square().sum() / actions,
            "val/ratio": (ratio.detach() * batch.actions).sum() / actions,
        }

    def value_backward(self, batch, states):
        """The same for the clipped value loss and `states` positions."""
        role, clip = self.roles.value, self.args.cliprange_value
        values = role.read(self.hidden_states(role.network, batch)[batch.state_index])
        near = torch.max(torch.min(values, batch.values + clip), batch.values - clip)
        errors, near_errors = (values - batch.returns).square(), (near - batch.returns).square()
        value_loss = 0.5 * (torch.max(errors, near_errors) * batch.states).sum() / states
        self.accelerator.backward(self.args.vf_coef * value_loss)
        clipfrac = ((near_errors > errors) * batch.states).sum() / states
        return {"loss/value_avg": value_loss.detach(), "val/clipfrac_avg": clipfrac}

    # ---- what is reported ----

    def measure(self, rollout, losses, rollout_seconds, train_seconds):
        """The update's metrics, over response tokens only and all processes (names as in TRL)."""
        n = self.episodes
        names = ("kl", "lengths", "ended", "scores", "shaped_scores", "logprobs", "entropy", "penalty", "read")
        total = {name: self.total(getattr(rollout, name)) for name in names}
        spread = self.total((rollout.scores - total["scores"] / n).square()) / n
        variance = self.moments(rollout.returns[rollout.states])[1]
        unexplained = self.moments((rollout.returns - rollout.values)[rollout.states])[1]
        return {
            "objective/scores": total["scores"] / n,
            "objective/scores_std": math.sqrt(spread),
            **{f"reward/{f.name}": self.total(rollout.given[:, i]) / n for i, f in enumerate(self.reward_functions)},
            "objective/kl": total["kl"] / n,
            "objective/kl_coef": self.ppo_state["kl_coef"],
            "objective/entropy": -total["logprobs"] / n,
            "objective/non_score_reward": -total["penalty"] / n,
            "objective/rlhf_reward": (total["shaped_scores"] - total["penalty"]) / n,
            "policy/entropy_avg": total["entropy"] / total["lengths"],
            **{name: value.item() for name, value in losses.items()},
            "val/explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
            "response/length": total["lengths"] / n,
            "response/stop_rate": total["ended"] / n,
            "speed/rollout_seconds": rollout_seconds,
            "speed/train_seconds": train_seconds,
            "speed/episodes_per_second": n / (rollout_seconds + train_seconds),
            "speed/rollout_tokens_per_second": total["lengths"] / rollout_seconds,
            "speed/train_tokens_per_second": self.args.num_ppo_epochs * total["read"] / train_seconds,
            "episode": (self.state.global_step + 1) * n,
        }

    def log(self, logs, start_time=None):
        """Trainer's log line of an update, with its metrics."""
        transformers.Trainer.log(self, logs | self.latest if "grad_norm" in logs else logs, start_time)

    @torch.no_grad()
    def answer(self, name, rows, sample=False):
        """What a role answers to the rows, one dict each: the text, its score, its length in tokens, whether it ends."""
        responses = self.generate(getattr(self.roles, name), rows, sample)
        batches = [self.collate([row], [response], len(response)) for row, response in zip(rows, responses)]
        self.score(batches)
        answers = []
        for batch in batches:
            answer = {"answer": self.response_texts(batch)[0], "score": batch.scores.item()}
            answer |= {"length": batch.lengths.item(), "ended": batch.ended.item()}
            answers.append({f"{name}_{key}": value for key, value in answer.items()})
        return answers

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Greedy answers of the policy and of the reference to the fixed prompts, with their scores, for samples.jsonl;
        the first five are printed."""
        rows, step = list(self.eval_dataset), self.state.global_step
        for line in self.state.log_history:  # Trainer asks twice where a pass over the data ends
            if line["step"] == step and "eval_policy_score" in line:
                return line
        self.roles.eval()
        self.references = self.references or self.answer("reference", rows)
        samples = [{"step": step, "row": row["row"], "prompt": row["text"]} for row in rows]
        samples = [a | b | c for a, b, c in zip(samples, self.answer("policy", rows), self.references)]
        keys = [f"{name}_{key}" for name in ("policy", "reference") for key in ("score", "length", "ended")]
        metrics = {f"eval_{key}": sum(sample[key] for sample in samples) / len(rows) for key in keys}
        if self.is_world_process_zero():
            self.write_samples(samples)
            print(f"\nupdate {step}, mean score of the answers to {len(rows)} fixed prompts: policy "
                  f"{metrics['eval_policy_score']:+.2f}, reference {metrics['eval_reference_score']:+.2f}")  # fmt: skip
            print(f"the first five of them, all are in {Path(self.args.output_dir, 'samples.jsonl')}:")
            for sample in samples[:5]:
                prompt = sample["prompt"].strip()
                print(f"\n> {'…' * (len(prompt) > 200)}{prompt[-200:]}")
                for name in ("policy", "reference"):
                    print(f"  {name:<10}{sample[f'{name}_score']:+.2f}  {sample[f'{name}_answer'].strip()}")
        if self.args.eval_strategy != "no":
            self.keep_best(metrics)
        self.log(metrics)
        return metrics

    def keep_best(self, metrics):
        """best_checkpoint/: the policy whose evaluation score less the price of its KL is the highest so far."""
        figures = [line for line in [*self.state.log_history, self.latest] if "objective/kl" in line]
        price = self.ppo_state["kl_coef"] * figures[-1]["objective/kl"] if figures else 0.0
        price *= self.ppo_state["reward_std"]  # in the score's own unit
        metrics["eval_quality"] = metrics["eval_policy_score"] - price
        if not self.is_world_process_zero():
            return
        kept = read_json(Path(self.args.output_dir, "best_checkpoint", "run.json")).get("metrics", {})
        if "step" not in kept or metrics["eval_quality"] > kept["eval_quality"]:  # without: of an earlier version
            self.publish("best_checkpoint", metrics | {"step": self.state.global_step})

    def publish(self, name, metrics):
        """A directory of the run with policy and value model, which appears when it is complete."""
        final, draft, old = (Path(self.args.output_dir, f"{name}{ending}") for ending in ("", ".partial", ".old"))
        shutil.rmtree(draft, ignore_errors=True)
        self._save(draft)
        write_json(draft / "run.json", {**self.run, "metrics": metrics})
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
            text = f"{final} is in use by another program; the new one lies beside it, in {draft}"
            if name == "final_checkpoint":
                fail(text)
            tqdm.write(f"warning: {text}", file=sys.stderr)
            return final
        shutil.rmtree(old, ignore_errors=True)
        return final

    def measure_reference(self, rows):
        """Mean and spread of the score on the reference's own sampled answers (--normalize_reward)."""
        scores = [found["reference_score"] for found in self.answer("reference", rows, sample=True)]
        scores = torch.tensor(gather_object(scores))
        self.ppo_state |= {"reward_mean": scores.mean().item(), "reward_std": max(scores.std().item(), 1e-4)}
        self.roles.mark_trained()  # the optimizer is made after this

    # ---- checkpoints ----

    def _save(self, output_dir=None, state_dict=None):
        """Policy at the top of the directory, value model in `value/` (in the form of a reward model's checkpoint)."""
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        for role, directory in ((self.roles.policy, output_dir), (self.roles.value, output_dir / "value")):
            role.save(directory)
            self.tokenizer.save_pretrained(directory)
        generation = self.roles.policy.network.generation_config
        if not generation.do_sample:  # what only sampling reads: transformers would not save it again (Llama 2 has it)
            generation.update(temperature=None, top_p=None, top_k=None)
        generation = {**generation.to_diff_dict(), "eos_token_id": self.stop_ids}
        write_json(output_dir / "generation_config.json", generation)
        write_json(output_dir / "ppo_state.json", self.ppo_state)
        write_json(output_dir / "run.json", self.run)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint = Path(resume_from_checkpoint)
        self.roles.policy.load(checkpoint)
        self.roles.value.load(checkpoint / "value")
        self.ppo_state = read_json(checkpoint / "ppo_state.json")
        if not self.args.target_kl or not self.ppo_state["kl_coef"]:  # the flag's, where nothing adapts it
            self.ppo_state["kl_coef"] = self.args.kl_coef


class RunCallback(ProgressCallback):
    """Trainer's bar with reward, KL (nats) and response length (tokens) on it; metrics.jsonl; and Ctrl-C or SIGTERM as
    a saved checkpoint."""

    interrupted = False
    shown = 0.0  # when the bar was, in seconds

    def __init__(self):
        super().__init__()
        self.warned = set()

    def interrupt(self, signum, frame):
        self.interrupted = True
        signal.signal(signum, signal.default_int_handler)  # the second one leaves at once
        time.sleep(0.2)  # seconds, in which the same Ctrl-C ends `| tee`
        words = "stopping after this update and saving a checkpoint; once more to leave at once"
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
        state.compute_steps(args, state.max_steps)  # a resumed run would log and save as often as before
        state.train_batch_size = args.per_device_train_batch_size  # Trainer compares the two when a run resumes

    def on_substep_end(self, args, state, control, **kwargs):
        if self.training_bar is not None and time.monotonic() > self.shown + 5:  # seconds; an update may take minutes
            self.training_bar.refresh()
            self.shown = time.monotonic()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        super().on_step_end(args, state, control)
        if args.world_size > 1:  # all stop after the same step
            flag = torch.tensor(float(self.interrupted), device=args.device)
            self.interrupted = accelerate.utils.reduce(flag, "sum").item() > 0
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if args.shard_base and (control.should_save or control.should_evaluate or state.global_step == 1):
            mine = (weight for group in optimizer.param_groups for weight in group["params"])
            mine = hashlib.sha256(b"".join(weight.detach().cpu().numpy().tobytes() for weight in mine))
            if len({*accelerate.utils.gather_object([mine.hexdigest()])}) > 1:
                fail(f"--shard_base: adapters differ after step {state.global_step}; the checkpoints before are good")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        with open(Path(args.output_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "objective/scores" not in logs:
            return
        figures = {name: f"{round(logs[key], 2) + 0.0:.2f}" for name, key in SHOWN.items()}  # no -0.00
        line = "  ".join(f"{name} {figure:>6}" for name, figure in figures.items())
        tqdm.write(f"update {state.global_step:>4} of {state.max_steps}  {line}")
        if self.training_bar is not None:
            self.training_bar.set_postfix({name: figures[name] for name in ("reward", "KL", "length", "stop_rate")})
        lines = [line for line in state.log_history if "objective/scores" in line]
        if state.global_step >= 10 and len(lines) >= 6:
            for problem, remedy in find_stalls(lines[:3], lines[-3:], args):
                if problem not in self.warned:
                    self.warned.add(problem)
                    tqdm.write(f"warning: {problem} (update {state.global_step}): {remedy}", file=sys.stderr)


def find_stalls(first, last, args):
    """(what goes wrong, what to try), for each thing, of a run that does not learn, by its first and last log lines."""

    def mean(key, lines=last):
        return sum(line[key] for line in lines) / len(lines)

    gain = mean("objective/scores") - mean("objective/scores", first)
    noise = mean("objective/scores_std") * math.sqrt(2 / (len(last) * args.episodes_per_update * args.world_size))
    flat = gain < 2 * noise  # two standard errors
    if flat and mean("val/explained_variance") < 0:  # a reward that rises does without them
        yield "the values explain nothing of the returns", "more episodes an update (--gradient_accumulation_steps)"
    if mean("response/stop_rate") < 0.1:
        yield "hardly any answer ends", "a longer --response_length, or SFT on answers that end within it"
    if flat and mean("policy/clipfrac_avg") < 0.01:
        higher = f"a --learning_rate above {args.learning_rate:g}, or more --num_ppo_epochs"
        yield "the reward is flat and hardly a ratio is clipped", higher
    if mean("objective/kl") > max(20, 2 * mean("objective/kl", first)):  # nats an answer
        yield "the KL runs away", f"a --kl_coef above {args.kl_coef:g}, --target_kl, or a lower --learning_rate"


# ---- a run and its directory ----


def finished_steps(checkpoint):
    """The updates of a checkpoint; 0 if it was never completed: Trainer writes trainer_state.json last."""
    return read_json(Path(checkpoint, "trainer_state.json")).get("global_step", 0)


def find_checkpoint(args):
    """The checkpoint to resume from, or None; an --output_dir in use is refused, and a checkpoint of something else."""
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    newest = max(folder.glob("checkpoint-*"), key=finished_steps, default=folder / "checkpoint-0")
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        fail(f"--output_dir {folder}: {file} is a file")
    for flag in ("model_path", "reward_model_path"):
        path = Path(getattr(args, flag) or "/").resolve()
        if args.overwrite_output_dir and {*folder.resolve().glob("*checkpoint*")} & {path, *path.parents}:
            fail(f"--{flag} {path} lies in --output_dir, which --overwrite_output_dir empties; take another")
    if not asked and any(folder.glob("*")) and not args.overwrite_output_dir:
        hint = "--resume_from_checkpoint goes on with that run, --overwrite_output_dir replaces it"
        fail(f"--output_dir {folder} is not empty: {hint}")
    if asked is True and not finished_steps(newest):
        print(f"no complete checkpoint in {folder}: starting from the beginning")
    if not asked or asked is True and not finished_steps(newest):
        return None
    checkpoint = newest if asked is True else Path(asked)
    if not finished_steps(checkpoint):  # the directory of a run
        checkpoint = max(checkpoint.glob("checkpoint-*"), key=finished_steps, default=checkpoint)
    run = read_json(checkpoint / "run.json")
    if not finished_steps(checkpoint):
        fail(f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint (no trainer_state.json)")
    if run.get("stage") != "rl" or run.get("versions", {}).get("scripts") != SCRIPTS:
        fail(f"--resume_from_checkpoint {checkpoint} is of the stage {run.get('stage')!r}, or of an earlier version")
    was, now = run["arguments"], json.loads(json.dumps(vars(args), default=str))
    changed = [name for name in now if name not in FREE_ON_RESUME and now[name] != was.get(name, now[name])]
    words = ", ".join(f"--{name} {now[name]} (was {was.get(name)})" for name in changed)
    if set(changed) & set(SAME_ON_RESUME):
        fail(f"--resume_from_checkpoint {checkpoint}: {words}: that would be neither run; resume with the same flags")
    if changed:
        print(f"resuming with other flags than before: {words}")
    places = (checkpoint.parent.resolve(), checkpoint.resolve().parent)  # a link may lead elsewhere
    elsewhere = folder.resolve() not in places and any(folder.glob("*checkpoint*"))
    if (elsewhere or finished_steps(newest) > finished_steps(checkpoint)) and not args.overwrite_output_dir:
        what = "another run" if elsewhere else f"a later checkpoint, {newest.name}"
        fail(f"--resume_from_checkpoint {checkpoint}: {folder} holds {what}; --overwrite_output_dir drops it")
    print(f"going on from {checkpoint}")
    return checkpoint


def open_output_dir(args, checkpoint):
    """Make --output_dir ready: checkpoints and log lines up to the checkpoint that the run goes on from, none later."""
    folder = Path(args.output_dir)
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {"global_step": 0, "log_history": []}
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("checkpoint-*"):
        if path.name[11:].isdigit() and not 0 < finished_steps(path) <= state["global_step"]:
            shutil.rmtree(path)
    if not checkpoint:
        (folder / "samples.jsonl").unlink(missing_ok=True)
    if not args.resume_from_checkpoint:  # else it stays until there is a new one
        shutil.rmtree(folder / "final_checkpoint", ignore_errors=True)
    if read_json(folder / "best_checkpoint" / "run.json").get("metrics", {}).get("step", 1) > state["global_step"]:
        shutil.rmtree(folder / "best_checkpoint", ignore_errors=True)  # of steps that are dropped
    write_lines(folder / "metrics.jsonl", [{"step": line["step"], **line} for line in state["log_history"]])


def describe_run(args, source, prompt_format, counts):
    """run.json: what the next stage, and whoever finds the checkpoint, needs to know."""

    def digest(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    template, vocabulary = prompt_format.tokenizer.chat_template, prompt_format.tokenizer.get_vocab()
    return {
        "stage": "rl", "base_model": source.base, "base_digest": digest_base(source.base) if args.use_lora else None,
        "parent": str(source.adapter or source.base), "parent_stage": source.run.get("stage"),
        "prompt_format": prompt_format.name, "tokenizer_hash": digest(vocabulary),
        "chat_template_hash": digest(template) if prompt_format.name == "chat" else None,
        "dataset": {"name": args.dataset_name, "subset": args.subset, **counts}, "arguments": vars(args),
        "versions": {"scripts": SCRIPTS, **{name: importlib.metadata.version(name) for name in packages}},
    }  # fmt: skip


def train(trainer, callback, checkpoint):
    """Trainer's train(), from the checkpoint if there is one; returns why it stopped before the end, or None."""
    if checkpoint and finished_steps(checkpoint) >= trainer.args.max_steps:  # Trainer would take one more step
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = transformers.TrainerState.load_from_json(checkpoint / "trainer_state.json")
        return None
    handlers = {name: signal.signal(name, callback.interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        with disable_input_dtype_casting(trainer.roles):  # else LoRA keeps float32 copies of inputs
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return None
    except Exception as error:
        print(file=sys.stderr)  # here the line of the bar ends
        if not isinstance(error, (FloatingPointError, KLAboveLimit)):
            raise
        done, too_far = trainer.state.global_step, isinstance(error, KLAboveLimit)
        saved = Path(trainer.args.output_dir).glob("checkpoint-*")
        good = [path for path in saved if 0 < finished_steps(path) <= done - too_far]
        newest = max(good, key=finished_steps, default="none")
        if not too_far:
            fail(f"{error}; the last good checkpoint: {newest}")
        print(f"{error}: stopped after update {done}; the newest checkpoint below it: {newest}")
        return str(error)
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def publish(trainer, args, metrics):
    """metrics.json and final_checkpoint/; with --push_to_hub it is uploaded."""
    output_dir = Path(args.output_dir)
    final = trainer.publish("final_checkpoint", metrics)
    write_json(output_dir / "metrics.json", metrics)
    size = sum(path.stat().st_size for path in final.glob("*.safetensors"))
    best = read_json(output_dir / "best_checkpoint" / "run.json").get("metrics", {})
    if "step" in best:
        quality = f"score less price of the KL {best['eval_quality']:.3g}"
        print(f"{output_dir / 'best_checkpoint'} is of update {best['step']}: {quality}")
    print(f"saved {final} ({'adapter' if args.use_lora else 'all weights, float32'}, {size / 1e9:.3g} GB)")
    if args.push_to_hub:
        repo = huggingface_hub.create_repo(output_dir.resolve().name, exist_ok=True).repo_id
        print(f"uploaded {huggingface_hub.upload_folder(repo_id=repo, folder_path=final)}")


def run_stage(args):
    reward_functions = [RewardFunction(spec) for spec in args.reward_function]
    policy = locate_model(args, "model_path")
    reward = locate_model(args, "reward_model_path") if args.reward_model_path else None
    if policy.lora:
        check_lora_flags(args, policy.lora)
    if reward:
        report_reward_model(args.reward_model_path, reward.run)
        if args.shard_base and not (reward.lora and reward.base == policy.base):
            fail(f"--shard_base: --reward_model_path should be a LoRA adapter on the policy's base, {policy.base}")
    checkpoint = find_checkpoint(args)
    if args.push_to_hub:
        huggingface_hub.utils.validate_repo_id(Path(args.output_dir).resolve().name)
        huggingface_hub.whoami()

    prompt_format = make_eos_end_turns(load_format(args, policy, args.prompt_format))
    reward_format, same_tokens = pick_reward_format(args, reward, prompt_format) if reward else (None, True)
    train_rows, counts = load_prompts(args, args.subset, args.split, "--split", prompt_format, reward_functions)
    eval_rows = train_rows.select(range(min(8, len(train_rows))))
    if args.eval_split or args.eval_subset:
        subset, split = args.eval_subset or args.subset, args.eval_split or "test"
        eval_rows, counts["eval"] = load_prompts(args, subset, split, "--eval_split", prompt_format, reward_functions)
    longest = max(len(ids) for rows in (train_rows, eval_rows) for ids in rows["prompt_ids"]) + args.response_length
    scorer = reward.base if reward and same_tokens else None
    check_base(args, policy.base, scorer, len(prompt_format.tokenizer), longest)
    episodes = args.episodes_per_update * args.processes
    if episodes > len(train_rows):
        what = "--per_device_train_batch_size x --gradient_accumulation_steps x processes"
        fail(f"an update takes {episodes} episodes ({what}), but there are only {len(train_rows)} prompts")
    for function in reward_functions:  # a fault in one is to show before anything slow
        function([train_rows[0], train_rows[len(train_rows) - 1]], ["Yes.", "No."])
    updates = math.ceil((args.total_episodes or len(train_rows)) / episodes)
    config = make_config(args, max_steps=updates, longest_text=longest)
    done = finished_steps(checkpoint) if checkpoint else 0
    final = read_json(Path(args.output_dir, "final_checkpoint", "run.json")).get("metrics")
    if done >= updates and final and final.get("step") == done and not final.get("stopped"):
        print(f"{args.output_dir} is finished, after {done} updates; to train longer, raise --total_episodes")
        return
    steps = args.num_ppo_epochs * args.num_mini_batches
    print(f"{updates} updates of {episodes} episodes, {steps} optimizer steps each")
    if args.dry_run:
        for row in train_rows.select(range(min(2, len(train_rows)))):
            text = prompt_format.tokenizer.decode(row["prompt_ids"])
            print(f"--- row {row['row']}, {len(row['prompt_ids'])} tokens, after which the answer is written\n{text}")
        print("dry run: everything fits; nothing was loaded or written")
        return

    transformers.set_seed(args.seed)
    roles = load_roles(args, policy, reward, same_tokens)
    roles.policy.model.saved_config.eos_token_id = prompt_format.tokenizer.eos_token_id
    report_roles(roles)
    if config.process_index == 0:
        open_output_dir(args, checkpoint)
    accelerate.PartialState().wait_for_everyone()
    run = describe_run(args, policy, prompt_format, counts)
    data, callback = {"train_dataset": train_rows, "eval_dataset": eval_rows}, RunCallback()
    trainer = PPOTrainer(roles, config, prompt_format, reward_format, reward_functions, run, **data)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(callback)
    if not checkpoint:
        torch.manual_seed(args.seed + 100_003 * config.process_index)  # processes sample different answers
        if args.normalize_reward:
            trainer.measure_reference([train_rows[i % len(train_rows)] for i in range(64)])
    stopped = train(trainer, callback, checkpoint)
    if callback.interrupted:
        print(f"saved; go on with the same command and --resume_from_checkpoint ({args.output_dir})", file=sys.stderr)
        raise SystemExit(130)
    trainer.evaluate()
    last = [line for line in trainer.state.log_history if line["step"] == trainer.state.global_step]
    metrics = {name: value for line in last for name, value in line.items()}
    if trainer.is_world_process_zero():
        publish(trainer, args, {**metrics, **trainer.latest, "stopped": stopped})
    trainer.accelerator.wait_for_everyone()


def main(argv=None):
    args = parse_flags(argv)
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # of several processes the first one talks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a pipe on Windows knows few characters
    try:
        run_stage(args)
    except torch.OutOfMemoryError as error:
        helps = "--use_lora, --load_in_4bit, --bf16, --gradient_checkpointing, smaller batches or --response_length"
        fail(f"no memory left on the device; what helps, the most first: {helps} ({error})")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        # safetensors and torch have types of their own for a full disk
        if re.search("No space left|os error 28|PytorchStreamWriter failed", str(error)):
            fail(f"no space left to save; what was saved before is complete ({error})")
        if isinstance(error, (OSError, huggingface_hub.errors.HFValidationError)):  # a hub id that is not there
            fail(error)
        raise


if __name__ == "__main__":
    main()
