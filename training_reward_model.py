"""Reward model: a language model with a scalar score head, trained on pairs of a preferred and a rejected answer.

In: a model (hub id, directory, or LoRA adapter directory) and a data set with the columns `prompt`, `chosen` and
`rejected` (texts, or chat message lists) or `question`, `response_j` and `response_k` (j is preferred).
Out, in --output_dir: `final_checkpoint/` (model or adapter with its score head, tokenizer, run.json), resumable
`checkpoint-N/`, `metrics.jsonl` (one line per log event) and `metrics.json` (the final figures and the report).
It loads again with AutoPeftModelForSequenceClassification (an adapter) or AutoModelForSequenceClassification:
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
import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import types
import warnings
import zipfile
from pathlib import Path


# >>> block base: the same in training_sft.py, training_reward_model.py, training_rl.py, merge_with_lora.py
class UserError(Exception):
    """What is wrong, where, and what would be right: shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """Full flag names only; the default value in the help; a mistake is one line."""

    def __init__(self, description):
        summary = description.split("\n\n")[0]
        super().__init__(
            description=summary, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def run_as_script(function):
    """Call `function()`; what a user can mend becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    code = 0
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # of several processes the first one talks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe on Windows knows few characters
    try:
        function()
    except Exception as error:
        # safetensors and torch have types of their own for a full disk
        full = re.search(r"No space left|os error 28|PytorchStreamWriter failed", str(error))
        if not full and not isinstance(error, (UserError, OSError)):
            raise
        hint = "no space left to save; what was saved before is complete: " if full else ""
        print(f"error: {hint}{' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if code:
        sys.exit(code)


def read_json(path):
    """The JSON object in the file `path`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path, value):
    """Write `value` as JSON; the file is either the old one or the whole new one."""
    draft = Path(f"{path}.partial")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(draft, path)


@contextlib.contextmanager
def reading(what):
    """What is wrong with a file from elsewhere becomes one line: libraries raise dozens of types for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = type(error).__name__
        text = str(error) if isinstance(error, (OSError, ValueError)) else f"{kind} {error}"
        text = "it holds more than tensors, and code in files is not run" if kind == "UnpicklingError" else text
        raise UserError(f"{what} cannot be loaded: {text}") from error


@contextlib.contextmanager
def publish(directory):
    """Yield an empty directory to fill; it takes the name `directory` only when it is complete."""
    directory = Path(directory)
    draft, old = directory.with_name(directory.name + ".partial"), directory.with_name(directory.name + ".old")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if directory.exists():
        os.replace(directory, old)
    os.replace(draft, directory)
    shutil.rmtree(old, ignore_errors=True)


@dataclasses.dataclass
class Source:
    """Where a model comes from: `base`, a full model (hub id or absolute directory); `adapter`, a directory with a
    LoRA adapter for it, or None; `run`, the run.json that an earlier stage left beside it, or {}."""

    base: str
    adapter: Path | None
    run: dict


def locate_model(path, flag):
    """Find out what `path` (a hub id, a model directory or an adapter directory) is, without loading weights."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{flag} {path} is a file; it should be a model directory or a hub id")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
            raise UserError(f"{flag} {path} does not exist; it should be a model directory or a hub id")
        return Source(str(path), None, {})
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = [child.parent.name for child in folder.glob("*/*config.json")]
        hint = f"; did you mean {folder / sorted(inside)[0]}?" if inside else ""
        raise UserError(f"{flag} {path} holds neither config.json nor adapter_config.json{hint}")
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if not (folder / "adapter_config.json").is_file():
        return Source(str(folder.resolve()), None, run)
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / 'adapter_config.json'} names no base model (base_model_name_or_path)")
    looks_local = Path(base).is_absolute() or base.startswith(".") or "\\" in base or base.count("/") > 1
    if looks_local and not Path(base).is_dir():
        raise UserError(
            f"{flag} {path} is an adapter for the base model {base}, which is not there; put the base model back or "
            f"write its new place into base_model_name_or_path in {folder / 'adapter_config.json'}"
        )
    return Source(str(Path(base).resolve()) if Path(base).is_dir() else base, folder.resolve(), run)


# <<< block base


# >>> block flags: the same in training_sft.py, training_reward_model.py, training_rl.py
TRL_VERSION = "1.12.0"  # the last release with PPOTrainer


def check_trl():
    """Refuse another trl than the one that the scripts are written for."""
    found = importlib.metadata.version("trl")
    if found != TRL_VERSION:
        raise UserError(f"this script needs trl {TRL_VERSION}, found {found}: pip install trl=={TRL_VERSION}")


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_shared_flags(parser, learning_rate):
    """The flags that all three training scripts have; `learning_rate` tells the defaults in words."""
    add = parser.add_argument
    add("--output_dir", required=True, help="directory for checkpoints and metrics; empty, unless the run resumes")
    add("--overwrite_output_dir", action="store_true", help="replace the checkpoints and metrics in --output_dir")
    add("--resume_from_checkpoint", nargs="?", const=True, metavar="DIR", help="go on from DIR, or from the newest")
    add("--dry_run", action="store_true", help="check everything, show the data as it would be trained on, and stop")
    add("--skip_nonfinite", type=number(int, 0), default=0, metavar="N", help="leave out up to N steps with NaN or inf")
    add("--max_samples", type=number(int, 1), help="use at most this many rows of each split")
    add(
        "--prompt_format", choices=["auto", "chat", "qa"], default="auto", help="chat template, or Question/Answer text"
    )
    add("--bf16", action="store_true", help="bfloat16 mixed precision (frozen weights in bfloat16)")
    add("--fp16", action="store_true", help="float16 mixed precision; needs a GPU")
    add("--use_lora", action="store_true", help="train a LoRA adapter in place of all weights")
    add("--lora_r", type=number(int, 1), help="LoRA rank (16 where the adapter is new)")
    add("--lora_alpha", type=number(float, 0), help="LoRA scale, applied as alpha / r (32 where the adapter is new)")
    add("--lora_dropout", type=number(float, 0, 1), help="LoRA dropout probability (0 where the adapter is new)")
    add("--lora_target_modules", nargs="+", metavar="NAME", help="module names, or one regular expression (all-linear)")
    add("--load_in_4bit", action="store_true", help="frozen weights in 4 bit (NF4); needs LoRA")
    add("--load_in_8bit", action="store_true", help="frozen weights in 8 bit; needs LoRA")
    add("--learning_rate", type=number(float, 0), help=f"peak learning rate ({learning_rate})")
    add("--lr_scheduler_type", default="linear", help="linear, cosine, constant, constant_with_warmup, ...")
    add("--warmup_ratio", type=number(float, 0, 1), default=0.0, help="fraction of the steps spent on warm-up")
    add("--weight_decay", type=number(float, 0), default=0.0, help="AdamW weight decay")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="gradient clipping, L2 norm; 0 for none")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="micro-batches per batch")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--attn_implementation", help="sdpa, eager, flash_attention_2, ... (the model's default)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of everything that is random")
    add("--logging_steps", type=number(int, 1), default=10, help="steps between two log lines")
    add("--save_steps", type=number(int, 1), default=500, help="steps between two checkpoints")
    add("--save_total_limit", type=number(int, 1), default=2, help="checkpoints kept")
    add("--eval_steps", type=number(int, 1), help="steps between two evaluations (at the end only)")
    add("--report_to", nargs="+", default=["none"], metavar="NAME", help="trackio, tensorboard, wandb")
    add("--push_to_hub", action="store_true", help="upload the final checkpoint under the name of --output_dir")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--force", action="store_true", help="go on where a check of memory, disk or the chain says stop")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the SFTConfig, RewardConfig or PPOConfig",
    )


def set_fields(pairs, config_class, taken):
    """`FIELD=VALUE` strings as keyword arguments, checked against the fields of `config_class`."""
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair} should read FIELD=VALUE")
        if name in taken:
            raise UserError(f"--set {name}: this field is set by a flag of its own, see --help")
        if name not in fields:
            near = sorted(fields, key=lambda field: -len(os.path.commonprefix([field, name])))[:3]
            raise UserError(f"--set {name}: {config_class.__name__} has no such field; near it: {', '.join(near)}")
        try:
            values[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            values[name] = text
    return values


# <<< block flags


def build_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="hub id, model directory or LoRA adapter directory")
    add("--dataset_name", required=True, help="hub id, folder, file, or json/parquet/arrow/csv")
    add("--subset", help="data_dir of the data set, e.g. data/reward")
    add("--train_split", default="train", help="split to train on")
    add("--eval_subset", help="data_dir of the evaluation split (that of --subset)")
    add("--eval_split", help="split to evaluate on (test with --eval_subset, else none)")
    add("--eval_fraction", type=number(float, 0, 0.9), help="share of the prompts to hold out in place of --eval_split")
    add("--per_device_train_batch_size", type=number(int, 1), default=1, help="pairs per device and step")
    add("--max_length", type=number(int, 2), default=1024, help="longest text in tokens; longer pairs are left out")
    add("--max_steps", type=number(int, 1), help="optimizer steps; goes before --num_train_epochs")
    add("--num_train_epochs", type=number(float, 0), default=1.0, help="passes over the data")
    add("--center_rewards_coefficient", type=number(float, 0), help="weight of (sum of the two scores)^2, e.g. 0.01")
    add("--streaming", action="store_true", help="read --train_split as it is needed, for data beyond memory")
    add("--use_margin", action="store_true", help="ask for the margin score_chosen - score_rejected of the data")
    add("--eval_only", action="store_true", help="no training: the report on a reward model, and scores.jsonl")
    add_shared_flags(parser, learning_rate="1e-4 with LoRA, 1e-5 without")
    return parser


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    run_as_script(build_parser().parse_args)
    run_as_script(check_trl)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an optional CPU kernel at every start
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # trl 1.12 uses names of before v6

import datasets
import numpy as np
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, TrainerState
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import disable_dropout_in_model


# >>> block text: the same in training_sft.py, training_reward_model.py, training_rl.py (tests/test_blocks.py)
class PromptFormat:
    """How a conversation becomes token ids: `chat`, the tokenizer's template, or `qa`, the text
    `Question: {question}\\n\\nAnswer: {answer}`.

    Two promises, whatever the tokenizer. The ids of a prompt are a prefix of the ids of prompt + answer: the text is
    cut where an answer starts (in `qa` before the space that precedes it), and no token lies across the cut. Text
    from data stays text: a literal `</s>` or `<|im_end|>` in it never becomes that special token.

    An assistant turn is trained on, with the token that ends it, where the text up to its end is what the model would
    have seen and written at that point. A template that rewrites earlier turns (reasoning templates drop thoughts)
    leaves those as context; one that rewrites only the token that ends them (gpt-oss) leaves that token. The last
    turn is always trained on, and a template that leaves a part of the text out is refused.
    """

    def __init__(self, tokenizer, name):
        self.tokenizer, self.name = tokenizer, name
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so no answer could ever end")
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.bos = full[:start]  # what this tokenizer puts before a text: BOS, [CLS] or nothing
        if name == "chat":
            self._learn_template()

    def _learn_template(self):
        """Find out what the template writes around the contents of a conversation."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        special -= {"<think>", "</think>"}  # where data has these, thoughts are meant
        longest_first = sorted(special, key=lambda token: (-len(token), token))  # in one order: it is hashed for caches
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        marks = (("system", "\ue002"), ("user", "\ue003"), ("assistant", "\ue004"))
        system, question, answer = ({"role": role, "content": mark} for role, mark in marks)
        self.parts, self.thought = False, ""
        if not self._shows([question, answer]):
            self.parts = True  # templates of multimodal models want a list of parts as content
            if not self._shows([question, answer]):
                raise UserError("the chat template does not write the texts of a question and its answer")
        self.has_system = self._shows([system, question, answer])
        prompt, turn = self._render([question], generation=True), self._render([question, answer])
        if not turn.startswith(prompt):  # the prompt opens a thought, but answers have none (DeepSeek-R1)
            self.thought = re.search(r"(<think>\s*)?$", prompt)[0]
        self.after = turn.partition("\ue004")[2]
        # What ends a turn: the special tokens after it, or else (GLM) the one that opens the next turn.
        ends = re.compile(rf"\s*(?:{'|'.join(re.escape(token) for token in special.union(map(str, added)))})+")
        follow = self._render([question, answer, question]).partition("\ue004")[2]
        self.end = next((match[0] for match in map(ends.match, (self.after, follow)) if match), "")

    def _render(self, messages, generation=False):
        if self.parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # templates refuse roles and orders with exceptions of their own
            raise UserError(f"the chat template refuses this conversation: {error}") from error
        return text.removesuffix(self.thought) if generation else text

    def _shows(self, messages):
        try:
            text = self._render(messages)
        except UserError:
            return False
        return all(message["content"] in text for message in messages)

    def _guard(self, text):
        """Break up what looks like a special token with U+E000 after each character (and double U+E000 itself)."""
        text = text.replace("\ue000", "\ue000\ue000")
        return self.special.sub(lambda match: "".join(f"{character}\ue000" for character in match[0]), text)

    def _ids(self, text):
        """Ids of `text`: all plain in `qa`; in `chat` special tokens are special, except guarded ones."""
        guarded, ids = self.name == "chat" and "\ue000" in text, []
        for i, piece in enumerate(self.special.split(text) if guarded else [text]):
            piece = re.sub("\ue000(\ue000?)", r"\1", piece) if guarded else piece
            plain = self.name == "qa" or guarded and i % 2 == 0
            ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids

    def _cut(self, messages, open_end):
        """The whole text and the spans (start, end) in it that the assistant writes.

        With `open_end` the text goes up to where the next assistant turn starts."""
        if self.name == "qa":
            question, answer = question_and_answer(messages, open_end)
            prompt = f"Question: {question}\n\nAnswer:"
            return (prompt, []) if open_end else (f"{prompt} {answer}", [(len(prompt), len(prompt) + 1 + len(answer))])
        messages = [{"role": m["role"], "content": self._guard(m["content"])} for m in messages]
        if messages[0]["role"] == "system" and not self.has_system:  # Gemma: it opens the first question
            system, first, *rest = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        whole, spans = self._render(messages, generation=open_end), []
        for i, message in enumerate(messages):
            content = "".join(message["content"].split())  # templates trim contents, and set thoughts in lines
            if message["role"] != "assistant":
                if content not in "".join(whole.split()):
                    raise UserError(f"the chat template leaves out text of turn {i} ({message['role']})")
                continue
            prompt, turn = self._render(messages[:i], generation=True), self._render(messages[: i + 1])
            body, last = turn.removesuffix(self.after), i == len(messages) - 1
            whole = body + self.end if last else whole
            intact = turn.startswith(prompt) and turn.endswith(self.after) and "".join(body.split()).endswith(content)
            if intact and whole.startswith(body):
                spans.append((len(prompt), len(body) + len(self.end) * whole.startswith(self.end, len(body))))
            elif last:
                raise UserError(
                    f"the chat template does not write the whole answer after its generation prompt ({prompt[-40:]!r}); "
                    "use another template, or --prompt_format qa"
                )
        return whole, spans

    def encode(self, messages, open_end=False):
        """Token ids and the mask of trained tokens (1 = the assistant wrote it), two lists of one length.

        `messages`: dicts with `role` and `content`. With `open_end` the ids are a prompt that an answer follows."""
        text, spans = self._cut(messages, open_end)
        ids = list(self.bos) if self.name == "qa" else []  # a chat template writes its own BOS
        mask, done = [0] * len(ids), 0
        for cut, trained in [piece for begin, end in spans for piece in ((begin, 0), (end, 1))] + [(len(text), 0)]:
            # A piece reads as it does after the text before it (from the last special token on), unless a token of
            # that reading lies across the cut; then as after a line break or a letter (alone, SentencePiece would
            # begin it with a space).
            special = () if self.name == "qa" else self.special.finditer(text, 0, done)
            start = max((match.start() for match in special), default=0)
            for before in (text[start:done], "\n", "a", ""):
                known, both = self._ids(before), self._ids(before + text[done:cut])
                if both[: len(known)] == known:
                    break
            ids, mask, done = ids + both[len(known) :], mask + [trained] * (len(both) - len(known)), cut
        if not open_end and (self.name == "qa" or not self.end):
            ids, mask = ids + [self.tokenizer.eos_token_id], mask + [1]
        return ids, mask

    def stop_ids(self, generation_config=None):
        """Every id that ends an answer: the tokenizer's EOS, the model's, and the one that ends a chat turn."""
        eos = getattr(generation_config, "eos_token_id", None)
        eos = eos if isinstance(eos, list) else [eos]
        turn = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[0][-1]
        return sorted({self.tokenizer.eos_token_id, turn, *(i for i in eos if i is not None)})


def question_and_answer(messages, open_end=False):
    """(question, answer) of a conversation without a template: earlier turns join the question; no answer if open."""
    turns = [message["content"] for message in messages if message["content"]]  # a system turn may be empty
    return ("\n\n".join(turns), "") if open_end else ("\n\n".join(turns[:-1]), turns[-1])


def check_messages(value, last):
    """What is wrong with a `messages` value that should end with the role `last`, or None."""
    if not isinstance(value, list) or not value:
        return "should be a list of {role, content}, not " + ("an empty one" if value == [] else type(value).__name__)
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"turn {i} should have the keys role and content"
        role, content = message["role"], message["content"]
        if not isinstance(content, str) or not (content.strip() or role == "system"):
            return f"turn {i} ({role}) has {'no' if content is None else 'an empty'} content; it should be text"
        system = value[0].get("role") == "system"
        expected = "system" if system and i == 0 else "user" if (i - system) % 2 == 0 else "assistant"
        if role != expected:
            return f"turn {i} has the role {role!r} where {expected!r} should be (system first, then user and assistant in turn)"
    return (
        None if value[-1]["role"] == last else f"ends with the role {value[-1]['role']!r}; it should end with {last!r}"
    )


def check_text(value):
    """What is wrong with a text cell, or None."""
    if not isinstance(value, str):
        return f"is {'null' if value is None else type(value).__name__}; it should be text"
    return None if value.strip() else "is empty; it should be text"


def pick_format(requested, natural, recorded, tokenizer):
    """`chat` or `qa`: what was requested, else what the earlier stage recorded, else what the data calls for."""
    name = requested if requested != "auto" else recorded or natural
    if name == "chat" and not tokenizer.chat_template:
        if requested == "chat":
            raise UserError("--prompt_format chat: this tokenizer has no chat template; use --prompt_format qa")
        name = "qa"
    return PromptFormat(tokenizer, name)


# <<< block text


# >>> block run: the same in training_sft.py, training_reward_model.py, training_rl.py
def check_shared(args, config_class):
    """The checks on flags that all three training scripts share; nothing slow happens before them."""
    check_trl()
    set_fields(args.set, config_class, ())
    for name in set(args.report_to) - {"none", "all", *get_available_reporting_integrations()}:
        raise UserError(f"--report_to {name}: not installed; pip install {name}")
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 exclude each other")
    if args.fp16 and not torch.cuda.is_available():
        raise UserError("--fp16 needs a GPU; on a CPU use --bf16, or neither")
    if args.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--bf16: {torch.cuda.get_device_name()} cannot compute in bfloat16; use --fp16")
    if args.load_in_4bit and args.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other")
    quantized = "--load_in_4bit" if args.load_in_4bit else "--load_in_8bit" if args.load_in_8bit else None
    if quantized and not args.use_lora:
        raise UserError(f"{quantized} needs --use_lora: quantized weights cannot be trained themselves")
    if os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise UserError(
            "FSDP and ZeRO-3 cut the model in pieces, which this script cannot check or save; use DDP (the default of "
            "accelerate launch) or ZeRO-2"
        )
    if args.skip_nonfinite and os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("--skip_nonfinite: DeepSpeed takes its step before anything could be left out")
    if args.push_to_hub:
        with reading("--push_to_hub: the name of --output_dir"):
            validate_repo_id(Path(args.output_dir).resolve().name)
        with reading("--push_to_hub: the login at the hub (hf auth login)"):
            HfApi().whoami()
    if args.lr_scheduler_type not in {kind.value for kind in transformers.SchedulerType}:
        raise UserError(f"--lr_scheduler_type {args.lr_scheduler_type} is not one of the schedulers of transformers")


def find_checkpoints(output_dir):
    """{checkpoint-N directory: N, or None if it was never completed}, the newest first.

    One counts as complete when its trainer_state.json can be read: Trainer writes that file last."""
    found = {}
    for path in sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: path.name[11:].zfill(20), reverse=True):
        if path.name[11:].isdigit():
            found[path] = int(path.name[11:])
            try:
                read_json(path / "trainer_state.json")["global_step"]
            except (UserError, KeyError):
                found[path] = None
    return found


def pick_checkpoint(args, stage):
    """The checkpoint of this stage to resume from, or None. Refuses to write into a directory that holds something
    else, and checkpoints that are damaged."""
    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise UserError(f"--output_dir {output_dir} is a file; it should be a directory")
    if not args.resume_from_checkpoint:
        if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
            raise UserError(
                f"--output_dir {output_dir} is not empty; name another, or pass --resume_from_checkpoint to go on with "
                "that run, or --overwrite_output_dir to replace its checkpoints and metrics"
            )
        return None
    checkpoints = find_checkpoints(output_dir)
    complete = [path for path in checkpoints if checkpoints[path] is not None]
    if args.resume_from_checkpoint is True:
        for broken in checkpoints.keys() - complete:
            print(f"{broken} was never completed: passed over")
        if not complete:
            print(f"no complete checkpoint in {output_dir}: starting from the beginning")
            return None
        checkpoint = complete[0]
    else:
        checkpoint = Path(args.resume_from_checkpoint)
        if not (checkpoint / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint (no trainer_state.json)"
            )
    step = read_json(checkpoint / "trainer_state.json").get("global_step")
    if not isinstance(step, int):
        raise UserError(f"{checkpoint / 'trainer_state.json'} has no global_step")
    if complete and int(complete[0].name[11:]) > step and not args.overwrite_output_dir:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {complete[0]} is later; --overwrite_output_dir drops it"
        )
    run = read_json(checkpoint / "run.json") if (checkpoint / "run.json").is_file() else {}
    if run.get("stage", stage) != stage:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} is of the stage {run['stage']!r}; this script goes on with {stage!r}"
        )
    for name in ("learning_rate", "weight_decay"):  # these are in the optimizer's state
        kept = (run.get("arguments") or {}).get(name)
        if isinstance(kept, float) and kept != getattr(args, name):
            print(f"--{name} {getattr(args, name)}: not used, the checkpoint goes on with {kept}")
            setattr(args, name, kept)
    if not any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()):
        raise UserError(f"{checkpoint} holds no optimizer state: a run cannot go on from it as it would have")
    for path in checkpoint.rglob("*.*"):
        try:
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt").__exit__(None, None, None)  # compares the header with the length
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                raise SafetensorError("cut, or not written by torch.save")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    return checkpoint


def open_output_dir(args, checkpoint):
    """Make --output_dir ready: metrics.jsonl as the checkpoint knows it, no checkpoint that was never completed, and
    with --overwrite_output_dir none that is later. The first process does it, before the others go on."""
    output_dir, state = Path(args.output_dir), {}
    with PartialState().main_process_first():
        if not PartialState().is_main_process:
            return
        if checkpoint:
            state = read_json(checkpoint / "trainer_state.json")
        output_dir.mkdir(parents=True, exist_ok=True)
        for path, step in find_checkpoints(output_dir).items():
            if step is None or args.overwrite_output_dir and step > state.get("global_step", -1):
                shutil.rmtree(path)
        lines = [json.dumps({"step": entry["step"], **entry}) + "\n" for entry in state.get("log_history", [])]
        (output_dir / "metrics.jsonl").unlink(missing_ok=True)
        if lines:
            (output_dir / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def load_split(args, name, subset, split, flag, streaming=False):
    """One split of a data set, at most --max_samples rows of it; `name` as in `datasets.load_dataset`."""
    kwargs = {"path": name, "data_dir": subset}
    loaders = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
    if Path(name).is_file():
        if Path(name).suffix not in loaders:
            raise UserError(f"--dataset_name {name} is not a {', '.join(loaders)} file")
        kwargs = {"path": loaders[Path(name).suffix], "data_files": name}
    elif subset and name in loaders.values() and not Path(subset).is_dir():
        raise UserError(f"--subset {subset} does not exist; with --dataset_name {name} it should be a folder of files")
    where, place = f"{name} {subset}" if subset else name, Path(subset or name)
    files = [place] if place.is_file() else [path for path in place.rglob("*.*") if path.suffix in loaders]
    if files and not any(path.stat().st_size for path in files):
        raise UserError(f"{where} is empty; it should have at least one row")
    for path in (path for path in files if loaders[path.suffix] == "json"):
        with open(path, "rb") as file:  # pyarrow crashes where it begins to read at a row that is null
            bad = re.match(rb"(\xef\xbb\xbf)?[\s\[]*null\b", file.read(100))
            file.seek(0)
            lines = () if streaming or path.suffix == ".json" else file
            if bad or any(line.strip() == b"null" for line in lines):
                raise UserError(f"{path} has a row that is null; it should be an object")
    try:
        there = datasets.get_dataset_split_names(**kwargs)
        wanted = split.split("[")[0]
        if wanted not in there and len(there) == 1:
            print(f"{where} has one split, {there[0]!r}: used for {flag} {split}")
            split = there[0] + split[len(wanted) :]
        elif wanted not in there:
            raise UserError(f"{flag} {split}: {where} has the splits {', '.join(there)}")
        data = datasets.load_dataset(**kwargs, split=split, streaming=streaming)
        if streaming:
            return data.take(args.max_samples) if args.max_samples else data
    except UserError:
        raise
    except Exception as error:  # datasets raises dozens of types; the innermost one says what was wrong with which file
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        detail = f" ({cause})" if str(cause) not in str(error) else ""
        if "corresponds to no data" in str(error):
            raise UserError(f"the split {split} of {where} is empty; it should have at least one row") from error
        raise UserError(f"the data set {where} cannot be read: {error}{detail}") from error
    if len(data) == 0:
        raise UserError(f"the split {split} of {where} is empty; it should have at least one row")
    return data.select(range(min(len(data), args.max_samples or len(data))))


def pick_schema(data, schemas, where):
    """The first of `schemas` (tuples of column names) that the data has; columns named twice in a row hold text."""
    names = data.column_names or list(next(iter(data), {}))  # a stream may know them from its first row only
    for schema in schemas:
        if set(schema) <= set(names):
            return schema
    fitting = "; ".join(" + ".join(schema) for schema in schemas)
    raise UserError(f"{where} has the columns {', '.join(names)}; one of these is needed: {fitting}")


def encode_rows(data, function, where, description):
    """Map `function(row) -> dict of columns` over the data; its `problem` column, if set, stops the run.

    The row's number stays in the column `row`."""

    def encode(row, index):
        return {"row": index, "problem": "", **function(row)}

    if isinstance(data, datasets.IterableDataset):

        def refuse(row):
            if row["problem"]:
                raise UserError(f"{where}, row {row['row']} of its file: {row['problem']}")
            return True

        return data.map(encode, with_indices=True).filter(refuse)
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, min(cores, 1 + len(data) // 2000))
    try:
        rows = data.map(
            encode,
            with_indices=True,
            remove_columns=data.column_names,
            num_proc=workers if workers > 1 else None,
            desc=description,
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where} holds text that is not UTF-8 ({error}); save its file as UTF-8") from error
    bad = [(row["row"], row["problem"]) for row in rows.select_columns(["row", "problem"]) if row["problem"]]
    if bad:
        more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        raise UserError(f"{where}, row {bad[0][0]}: {bad[0][1]}{more}")
    return rows.remove_columns(["problem"])


def load_config(source, args):
    """The configuration of a base model."""
    with reading(f"the configuration of {source.base}"):
        return AutoConfig.from_pretrained(source.base, trust_remote_code=args.trust_remote_code)


def load_tokenizer(source, args):
    """The tokenizer of a checkpoint; a missing pad token is an id it already has, so that no embedding is added."""
    place = source.base
    if source.adapter and (source.adapter / "tokenizer_config.json").is_file():
        place = source.adapter
    with reading(f"the tokenizer of {place}"):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code)
        names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ()
        if not all(re.fullmatch(r"[\w-]+", name) for name in names):  # they become file names when they are saved
            raise ValueError(f"not every chat template has a plain name: {', '.join(names)}")
        if tokenizer.pad_token_id is None:
            reserved = "<|finetune_right_pad_id|>"  # Llama 3.x keeps this one free for padding
            tokenizer.pad_token = reserved if reserved in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def load_model(cls, source, args, trainable, **kwargs):
    """The base model of `source`.

    Weights that are trained are float32 (under autocast a bfloat16 AdamW step of 3e-6 would round to nothing);
    frozen ones have the precision the model computes in."""
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if args.load_in_4bit or args.load_in_8bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=args.load_in_4bit,
            load_in_8bit=args.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    if torch.cuda.is_available():  # straight to this process's GPU, not by way of the machine's memory
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    with reading(f"the model {source.base}"):
        loaded = cls.from_pretrained(
            source.base,
            dtype=torch.float32 if trainable else compute,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            use_safetensors=True,  # no pickle
            **kwargs,
        )
    for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # after a pass in eval mode there would be no gradients
            module.support_avx512bf16_for_cpu = False
    return loaded


def lora_config(args, source, task_type):
    """A new adapter's config from the flags; that of `source.adapter` where the run goes on from an adapter."""
    if not source.adapter:
        targets = args.lora_target_modules or ["all-linear"]
        return LoraConfig(
            r=args.lora_r or 16,
            lora_alpha=32 if args.lora_alpha is None else args.lora_alpha,
            lora_dropout=args.lora_dropout or 0.0,
            target_modules=targets[0] if len(targets) == 1 and not targets[0].isidentifier() else targets,
            task_type=task_type,
        )
    found = read_json(source.adapter / "adapter_config.json")
    with reading(source.adapter / "adapter_config.json"):
        config = LoraConfig.from_pretrained(source.adapter)
        found = {**config.to_dict(), **found}
    if found.get("peft_type") != "LORA":
        raise UserError(f"{source.adapter} is a {found.get('peft_type')} adapter; only LoRA adapters can be trained on")
    if found.get("alora_invocation_tokens"):
        raise UserError(
            f"{source.adapter} is an activated LoRA (alora_invocation_tokens); only plain LoRA is trained on"
        )
    for flag in ("r", "lora_alpha", "lora_dropout"):
        asked = getattr(args, flag if flag.startswith("lora") else f"lora_{flag}")
        if asked is not None and asked != found[flag]:
            raise UserError(
                f"--lora_{flag.removeprefix('lora_')} {asked}: the adapter {source.adapter} has {found[flag]}; leave the flag out"
            )
    if args.lora_target_modules and set(args.lora_target_modules) != set(found["target_modules"]):
        raise UserError(f"--lora_target_modules: the adapter {source.adapter} has its own; leave the flag out")
    config.inference_mode, config.task_type = False, task_type
    return config


def keep_input_dtype(model):
    """Let LoRA layers take their input as it is: PEFT makes it float32, which autocast turns back into 16 bit, and every
    layer keeps a copy of its own for the backward pass."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def make_config(config_class, args, **own):
    """A trainer's config from the shared flags, the script's own fields and --set."""
    fields = {
        "output_dir": args.output_dir,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "use_cpu": not torch.accelerator.is_available(),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_steps": args.warmup_ratio if args.warmup_ratio < 1 else 0.999999,  # below 1: a fraction of the steps
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_checkpointing": args.gradient_checkpointing,
        "seed": args.seed,
        "logging_steps": args.logging_steps,
        "save_steps": args.save_steps,
        "save_total_limit": args.save_total_limit,
        "eval_steps": args.eval_steps,
        "report_to": args.report_to,
        "logging_nan_inf_filter": False,  # a NaN is to be seen
        "accelerator_config": {"dispatch_batches": False},  # with --streaming every process reads for itself
        **own,
    }
    for name in ("accelerator_config", "use_liger_kernel"):  # --set may change these
        if any(pair.startswith(f"{name}=") for pair in args.set):
            fields.pop(name, None)
    try:
        config = config_class(**fields, **set_fields(args.set, config_class, fields))
    except (ValueError, TypeError) as error:
        raise UserError(f"{config_class.__name__}: {error}") from error
    config._n_gpu = min(config.n_gpu, 1)  # one process drives one GPU (no DataParallel); several: accelerate launch
    return config


def estimate_memory(
    args, auto, config, peft_config, tokens, logits, trained_roles=1, frozen_roles=0, models=(), cached=0
):
    """(bytes by part at the peak of training, bytes of a checkpoint), from shapes alone.

    `tokens`: in one forward pass; `logits`: rows of them kept at a time; each role is an adapter on one base, or without
    LoRA a model; `models`: configs of further frozen models; `cached`: tokens whose keys and values generation keeps. Weights are
    counted. Activations are those of a Llama layer, whose autograd graph keeps of each token 4 hidden, 4 intermediate and
    2 key/value vectors, and the inputs of its two norms in float32. benchmarks/memory.py compares with real runs."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = sum(p.numel() for other in models for p in auto.from_config(other).parameters())
        model = auto.from_config(config, trust_remote_code=args.trust_remote_code)
        linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))]
        linear = sum(m.weight.numel() for m in linear if m is not model.get_output_embeddings())
        weights = sum(weight.numel() for weight in model.parameters())
        if args.use_lora:
            with reading("--lora_target_modules"):
                model = get_peft_model(model, copy.deepcopy(peft_config), low_cpu_mem_usage=True)
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    config, width = config.get_text_config(), 2 if args.bf16 or args.fp16 else 4
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, getattr(config, "num_attention_heads", 1)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    head_size = getattr(config, "head_dim", None) or hidden // heads
    kv = 2 * head_size * (getattr(config, "num_key_value_heads", None) or heads)
    layer = tokens * (width * (4 * hidden + 4 * inner + kv) + (8 if args.use_lora else 20) * hidden)
    # NF4 with double quantization: 4 bits, 8 per 64 weights, 32 per 64 * 256 (Dettmers et al. 2023, arXiv:2305.14314)
    packed = (4 + 8 / 64 + 32 / (64 * 256)) / 8 if args.load_in_4bit else 1 if args.load_in_8bit else width
    frozen = linear * packed + (weights - linear) * width
    roles = 4 * (trained_roles + frozen_roles) * trained
    activations = layer + layers * tokens * hidden * width if args.gradient_checkpointing else layers * layer
    logits *= config.vocab_size * (2 * width + 12)
    return {
        "base weights": (frozen if args.use_lora else roles) + others * width,
        "adapters": roles if args.use_lora else 0,
        "copies of autocast": 0 if args.use_lora or width == 4 else weights * width,
        "gradients": 4 * trained_roles * trained,
        "AdamW's moments": 8 * trained_roles * trained,
        "activations": activations,
        "logits": logits,
        "more for generation": max(0, cached * layers * kv * width - activations - logits),
    }, 12 * trained_roles * trained


def foresee(args, auto, source, steps, *sizes, **roles):
    """Compare the memory and the disk space that a run will need with what is free, before any weight is loaded.

    Refuses what does not fit; where gradient checkpointing makes it fit, turns that on."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") or os.environ.get("ACCELERATE_USE_FSDP"):
        return  # they share one model out
    try:
        parts, size = estimate_memory(args, auto, load_config(source, args), *sizes, **roles)
        less = argparse.Namespace(**{**vars(args), "gradient_checkpointing": True})
        least = sum(estimate_memory(less, auto, load_config(source, args), *sizes, **roles)[0].values())
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError, AssertionError) as error:
        print(f"memory: not foreseen, {source.base} cannot be built without its weights ({error})")
        return
    if torch.cuda.is_available():
        device, used, free = "the GPU", 0, torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    else:
        device, used, free = "this machine", psutil.Process().memory_info().rss, psutil.virtual_memory().available
    needed = sum(parts.values())
    if 1.1 * needed > free and not args.gradient_checkpointing:  # the estimate is good to about a tenth
        print(f"gradient checkpointing is on: without it {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")
        args.gradient_checkpointing, needed = True, least
    print(f"memory: about {(used + needed) / 1e9:.2f} GB at the peak, {(used + free) / 1e9:.2f} GB for it on {device}")
    if needed > free and not args.force:
        names = ("use_lora", "gradient_checkpointing", "bf16", "load_in_4bit")
        helps = ", ".join([f"--{name}" for name in names if not getattr(args, name)])
        raise UserError(
            f"the run needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; what helps: {helps}, "
            "shorter texts, smaller batches; --force goes on all the same"
        )
    saves = min(args.save_total_limit, steps // args.save_steps) + 1  # a new one comes before an old one goes
    saves = max(1, saves - len(find_checkpoints(args.output_dir)))
    size = saves * size + size / 3
    folder = next(path for path in Path(args.output_dir, "x").resolve().parents if path.is_dir())
    free = shutil.disk_usage(folder).free
    if size > free and not args.force:
        raise UserError(
            f"{saves} checkpoints and the final one take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {folder}; "
            "see --save_total_limit, --save_steps and --use_lora; --force goes on all the same"
        )


class RunCallback(TrainerCallback):
    """Writes metrics.jsonl, puts run.json into checkpoints, and turns Ctrl-C and SIGTERM into a saved checkpoint."""

    def __init__(self, output_dir, run):
        self.output_dir, self.run, self.interrupted, self.handlers = Path(output_dir), run, False, {}

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resumed run would log and save as often as before
        for name in (signal.SIGINT, signal.SIGTERM):
            self.handlers[name] = signal.signal(name, self.interrupt)

    def interrupt(self, signum, frame):
        self.interrupted = True
        self.restore()  # the second one leaves at once
        print("\nstopping after this step and saving a checkpoint; once more to leave at once", file=sys.stderr)

    def restore(self):
        for name, handler in self.handlers.items():
            signal.signal(name, handler)
        self.handlers = {}

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # all stop after the same step
            flag = torch.tensor(float(self.interrupted), device=args.device)
            self.interrupted = reduce(flag, "sum").item() > 0
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(self.output_dir / f"checkpoint-{state.global_step}" / "run.json", self.run)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()


class NonfiniteGuard:
    """For a Trainer: the first loss or gradient that is NaN or infinite stops the run before it reaches the weights.

    With `skips` > 0 so many such steps are left out instead. `rows`, the training data with a column `row`, and
    `text_column`, its token ids, serve to find the rows that were at fault."""

    skips, skipped, rows, text_column, fault = 0, 0, None, "input_ids", None

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_batches = [*getattr(self, "step_batches", []), (loss, inputs["input_ids"])]
        return loss.nan_to_num(0, 0, 0)  # Trainer adds the losses up until it logs them

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer asks for this norm right before each optimizer step."""
        norm, batches = super()._get_grad_norm(model, grad_norm), getattr(self, "step_batches", [])
        self.step_batches, fault, self.fault = [], self.fault, None
        finite = torch.stack([loss for loss, _ in batches]).isfinite().tolist() if batches else []
        bad = torch.tensor(float(not all(finite)), device=self.accelerator.device)
        anywhere = self.accelerator.reduce(bad, "sum").item()  # processes leave a step out together
        if not all(finite):
            fault = "the loss" + self.find_rows(ids for (_, ids), fine in zip(batches, finite) if not fine)
        elif anywhere:
            fault = "the loss of another process"
        elif norm is not None and not math.isfinite(norm) and not self.args.fp16:  # float16 scales by overflows
            fault = fault or "the gradient" + self.find_rows(ids for _, ids in batches)
        if not fault:
            return norm
        self.skipped += 1
        text = f"{fault} is not finite, in step {self.state.global_step + 1}"
        if self.skipped > self.skips:
            raise UserError(f"{text}; the last checkpoint is good; --skip_nonfinite N leaves out up to N such steps")
        print(f"{text}: left out ({self.skipped} of --skip_nonfinite {self.skips})", file=sys.stderr)
        model.zero_grad()  # without gradients the optimizer changes nothing, its moments neither
        return 0.0

    def find_rows(self, batches):
        batches = [f" {' '.join(map(str, ids.flatten().tolist()))} " for ids in batches]
        pairs = zip(self.rows["row"], self.rows[self.text_column]) if self.rows is not None else ()
        texts = ((row, f" {' '.join(map(str, ids))} ") for row, ids in pairs)
        found = [str(row) for row, text in texts if any(text in batch for batch in batches)]
        return f" of the data rows {', '.join(found)}" if found else ""


def hash_base(base, names=None):
    """{name: hash} of a few tensors (first, middle and last by name, or `names`) of a local base model; {} for others.

    Of each the type, the shape and the first 64 KiB; the layout is that of https://huggingface.co/docs/safetensors."""
    places = {}
    for path in sorted(Path(base).glob("model*.safetensors")):
        with reading(path), safe_open(path, framework="pt"), open(path, "rb") as file:  # safetensors checks the header
            data = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(data - 8))
        places |= {name: (path, data, info) for name, info in header.items() if name != "__metadata__"}
    found = sorted(places)
    hashes = {}
    for name in names or (sorted({found[0], found[len(found) // 2], found[-1]}) if found else ()):
        if name in places:
            path, data, info = places[name]
            with open(path, "rb") as file:
                start, end = info["data_offsets"]
                file.seek(data + start)
                text = f"{info['dtype']} {info['shape']} ".encode() + file.read(min(2**16, end - start))
            hashes[name] = hashlib.sha256(text).hexdigest()[:16]
    return hashes


def check_source(source, args, flag, reward_model=None):
    """Refuse an adapter whose base model is no longer the one that it was trained on, and with `reward_model` True or
    False a checkpoint that is none or is one; as far as run.json tells."""
    recorded, problem = source.run.get("base_hash") if source.adapter else None, None
    stage = source.run.get("parent_stage") or source.run.get("stage")
    if recorded and Path(source.base).is_dir() and hash_base(source.base, recorded) != recorded:
        problem = f"the base model {source.base} is not the one that the adapter {source.adapter} was trained on"
    elif stage and reward_model is not None and (stage == "reward") != reward_model:
        problem = f"{flag} {source.adapter or source.base} comes from the stage {stage!r}: it is {'not ' * reward_model}a reward model"
    if problem and not args.force:
        raise UserError(f"{problem}; use the right one, or --force")
    if problem:
        print(problem)


def describe_run(stage, args, source, prompt_format, tokenizer, rows):
    """run.json: what the next stage, and whoever finds the checkpoint, needs to know."""

    def digest(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    return {
        "stage": stage,
        "base_model": source.base,
        "base_hash": hash_base(source.base) if source.adapter or args.use_lora else {},
        "parent": str(source.adapter or source.base),
        "prompt_format": prompt_format.name,
        "chat_template_hash": digest(tokenizer.chat_template) if prompt_format.name == "chat" else None,
        "tokenizer_hash": digest(tokenizer.get_vocab()),
        "dataset": {"name": args.dataset_name, "subset": args.subset, **rows},
        "arguments": vars(args),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
        },
    }


def train_model(trainer, checkpoint):
    """Trainer's train(), from the checkpoint if there is one; returns its metrics.

    A run that was stopped after its last step takes no other; Trainer would take one, in the middle of a pass over the
    data."""
    if checkpoint:
        for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state"):
            setattr(trainer, name, reading(f"the checkpoint {checkpoint}")(getattr(trainer, name)))
        with reading(checkpoint / "trainer_state.json"):
            state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
        steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        if state.global_step >= steps:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            lines = [line for line in state.log_history if line["step"] == state.global_step]
            return {name: value for line in lines for name, value in line.items()}
    return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics


def finish_run(args, trainer, callback, run, metrics, save):
    """After training: publish final_checkpoint/ and metrics.json, or say how to go on after an interruption.

    `save(directory)` writes the model."""
    if callback.interrupted:
        print(f"saved; go on with the same command and --resume_from_checkpoint ({args.output_dir})", file=sys.stderr)
        raise KeyboardInterrupt
    output_dir = Path(args.output_dir)
    if trainer.is_world_process_zero():
        run["metrics"] = metrics
        with publish(output_dir / "final_checkpoint") as directory:
            save(directory)
            trainer.processing_class.save_pretrained(directory)
            write_json(directory / "run.json", run)
        write_json(output_dir / "metrics.json", metrics)
        print(f"saved {output_dir / 'final_checkpoint'}")
        if args.push_to_hub:
            repo = HfApi().create_repo(output_dir.resolve().name, exist_ok=True).repo_id
            print(f"uploaded {HfApi().upload_folder(repo_id=repo, folder_path=output_dir / 'final_checkpoint')}")
    trainer.accelerator.wait_for_everyone()


# <<< block run

SCHEMAS = [("prompt", "chosen", "rejected"), ("question", "response_j", "response_k")]


def row_pair(row, schema):
    """(chosen, rejected, margin): the row as two lists of messages, and how far apart the data grade them.

    Raises UserError with what is wrong with the row."""
    prompt, *sides = schema[:3]
    grades = [row[column] for column in schema[3:]] or [0, 0]
    is_chat = any(isinstance(row[side], list) for side in sides)
    for column in sides if is_chat else schema[:3]:
        problem = check_messages(row[column], last="assistant") if is_chat else check_text(row[column])
        if problem:
            raise UserError(f"column {column} {problem}")
    if is_chat:  # a conversation stands in both columns as a whole; `prompt` repeats its first question
        chosen, rejected = ([{key: turn[key] for key in ("role", "content")} for turn in row[side]] for side in sides)
    else:
        question = {"role": "user", "content": row[prompt]}
        chosen, rejected = ([question, {"role": "assistant", "content": row[side]}] for side in sides)
    if chosen[:-1] != rejected[:-1]:
        raise UserError(f"columns {sides[0]} and {sides[1]} differ before the last turn; only the answers may differ")
    if not all(isinstance(grade, (int, float)) and math.isfinite(grade) for grade in grades):
        raise UserError(f"columns score_chosen and score_rejected should be numbers for --use_margin: {grades}")
    return chosen, rejected, float(grades[0] - grades[1])


def encode_split(data, prompt_format, args, where, use_margin=False):
    """(rows, counts): pairs as `chosen_ids` and `rejected_ids`, their `margin`, and their tokens: `length`, of both
    texts; `size`, with what they share counted once; `longest`, of the longer text; `prompt_length`.

    Left out and counted: pairs with a text over --max_length tokens (a cut answer is not the one that was judged),
    pairs of two equal texts, and pairs that came before."""
    schemas = [(*schema, "score_chosen", "score_rejected") for schema in SCHEMAS] if use_margin else SCHEMAS
    schema = pick_schema(data, schemas, f"--use_margin: {where}" if use_margin else where)

    def digest(ids):
        return hashlib.sha256(repr(ids).encode()).hexdigest()

    def encode(row):
        chosen_ids, rejected_ids, mask, margin, problem = [], [], [], 0.0, ""
        try:
            chosen, rejected, margin = row_pair(row, schema)
            (chosen_ids, mask), (rejected_ids, _) = prompt_format.encode(chosen), prompt_format.encode(rejected)
        except UserError as error:  # of row_pair, or of the template
            problem = str(error)
        length, prompt_length = len(chosen_ids) + len(rejected_ids), len(mask) - (mask[::-1] + [0]).index(0)
        return {
            "problem": problem,
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "margin": margin,
            "length": length,
            "size": length - len(os.path.commonprefix([chosen_ids, rejected_ids])),
            "longest": max(len(chosen_ids), len(rejected_ids)),
            "prompt_length": prompt_length,
            "prompt": digest(chosen_ids[:prompt_length]),
            "pair": digest([chosen_ids, rejected_ids]),
        }

    first = {}  # where a pair came first; the same in every pass over a stream

    def left_out(row):
        if row["chosen_ids"] == row["rejected_ids"]:
            return "identical"
        if first.setdefault(row["pair"], row["row"]) != row["row"]:
            return "duplicates"
        return "too_long" if row["longest"] > args.max_length else None

    rows = encode_rows(data, encode, where, "Tokenizing")
    note = f"{where}: schema {' + '.join(schema)}, format {prompt_format.name};"
    if isinstance(rows, datasets.IterableDataset):
        print(note, "read as it is needed")
        columns = ["row", "chosen_ids", "rejected_ids", "margin", "length", "size", "longest", "prompt_length"]
        rows = rows.filter(lambda row: not left_out(row)).select_columns(columns)
        return rows.shuffle(args.seed, buffer_size=1000), {}
    reasons = [left_out(row) for row in rows]
    keep = [i for i, reason in enumerate(reasons) if not reason]
    counts = {"rows": len(keep), **{name: reasons.count(name) for name in ("too_long", "identical", "duplicates")}}
    print(
        f"{note} {len(keep)} of {len(rows)} pairs kept; left out: {counts['too_long']} longer than {args.max_length} "
        f"tokens, {counts['identical']} of two equal texts, {counts['duplicates']} repeated"
    )
    if not keep:
        raise UserError(f"{where}: no pair is left to use; see --max_length {args.max_length}")
    return rows.select(keep), counts


def hold_out(rows, fraction, seed):
    """(training rows, held-out rows): `fraction` of the prompts, with all their pairs, is held out."""
    prompts = sorted(set(rows["prompt"]))
    random.Random(seed).shuffle(prompts)
    held = prompts[: max(1, round(fraction * len(prompts)))]
    if len(held) == len(prompts):
        raise UserError(f"--eval_fraction {fraction} of {len(prompts)} prompts leaves none to train on")
    is_held = np.isin(rows["prompt"][:], held)
    print(f"held out for evaluation: {is_held.sum()} pairs, all those of {len(held)} prompts")
    return rows.select(np.flatnonzero(~is_held)), rows.select(np.flatnonzero(is_held))


def show_rows(rows, tokenizer):
    """A histogram of lengths, and two pairs as text: the chosen answer in green, the rejected one in red, or marked."""
    counts, edges = np.histogram(rows["longest"][:], bins=8)
    for count, low, high in zip(counts, edges, edges[1:]):
        print(f"{low:>7.0f} to {high:<6.0f} tokens {count:>8} pairs {'#' * math.ceil(40 * count / max(counts))}")
    marks = ("\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("[[chosen: ", "[[rejected: ", "]]")
    for row in (rows[i] for i in sorted({0, len(rows) // 2})):
        start = row["prompt_length"]
        pieces = row["chosen_ids"][:start], row["chosen_ids"][start:], row["rejected_ids"][start:]
        print(f"--- row {row['row']}: prompt {start} tokens, chosen {len(pieces[1])}, rejected {len(pieces[2])}")
        prompt, chosen, rejected = (
            text if len(text) <= 1000 else f"{text[:480]} (...) {text[-480:]}" for text in map(tokenizer.decode, pieces)
        )
        print(f"{prompt}\n{marks[0]}{chosen}{marks[2]}\n{marks[1]}{rejected}{marks[2]}")


def collate_shared(rows):
    """A batch as one row without padding: of each pair the common beginning, then the two ends.

    `pairs` (pairs, 4) holds where each one starts, where its common beginning ends, and where its two texts end."""
    ids, position_ids, pairs = [], [], []
    for row in rows:
        chosen, rejected, start = row["chosen_ids"], row["rejected_ids"], len(ids)
        common = min(len(os.path.commonprefix([chosen, rejected])), len(rejected) - 1)
        ids += chosen + rejected[common:]
        position_ids += [*range(len(chosen)), *range(common, len(rejected))]
        pairs.append((start, start + common, start + len(chosen), len(ids)))
    batch = {
        "pairs": torch.tensor(pairs),  # first: Trainer takes the length of the first tensor for the batch size
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),  # RewardTrainer counts tokens by it
        "position_ids": torch.tensor([position_ids]),
    }
    if "margin" in rows[0]:
        batch["margin"] = torch.tensor([row["margin"] for row in rows])
    return batch


def attend_pairs(module, query, key, value, attention_mask, pairs, **kwargs):
    """Attention within each pair of `collate_shared`: the rejected end sees the common beginning, not the chosen end.

    One call a text costs less than one masked call over the batch, whose size grows with its square."""
    outputs = []
    for start, common, middle, end in pairs:
        text, rest = slice(start, middle), slice(middle, end)
        chosen = [x[:, :, text] for x in (query, key, value)]
        outputs.append(sdpa_attention_forward(module, *chosen, None, **kwargs)[0])
        seen = [torch.cat([x[:, :, start:common], x[:, :, rest]], dim=2) for x in (key, value)]
        mask = torch.ones(end - middle, seen[0].shape[2], dtype=torch.bool, device=key.device).tril(common - start)
        outputs.append(sdpa_attention_forward(module, query[:, :, rest], *seen, mask[None, None], **kwargs)[0])
    return torch.cat(outputs, dim=1), None


transformers.AttentionInterface.register("pairs", attend_pairs)


def score_texts(self, input_ids, attention_mask=None, position_ids=None, pairs=None, **kwargs):
    """In place of the classifier's forward: scores (texts, 1) at the last token, all chosen before all rejected texts.

    The classifier's own looks for the last token that is not padding, and passes over an EOS that serves as padding.
    The head works in float32: in bfloat16, scores near 2 would come in steps of 0.016."""
    if pairs is None:
        layout = {"attention_mask": attention_mask}
        last = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(1) - 1
    else:
        layout = {"position_ids": position_ids, "pairs": pairs.tolist()}
        last = 0, pairs[:, 2:].T.flatten() - 1
    hidden = self.base_model(input_ids, use_cache=False, **layout).last_hidden_state
    with torch.autocast(hidden.device.type, enabled=False):
        return SequenceClassifierOutput(logits=self.score(hidden[last].float()))


def load_reward_model(source, args):
    """The model of `source` with its score head, or a new one, and with --use_lora its adapter."""
    transformers.set_seed(args.seed)
    trainable, verbosity = not (args.use_lora or args.eval_only), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else a table says that the head is new; a line below does
    model, info = load_model(
        transformers.AutoModelForSequenceClassification, source, args, trainable, num_labels=1, output_loading_info=True
    )
    transformers.logging.set_verbosity(verbosity)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(f"{source.base} loads as {type(model).__name__} without `score` head; it should be a decoder")
    head, new_head = model.score.float(), "score.weight" in info["missing_keys"]
    if new_head:
        # Scores start near 0, as the last layer of a policy does in Andrychowicz et al. 2021 (arXiv:2006.05990, 3.2).
        torch.nn.init.normal_(head.weight, std=0.01 * model.config.get_text_config().initializer_range)
    disable_dropout_in_model(model)  # RewardTrainer would do it after PEFT, and turn --lora_dropout off with it
    model.forward = types.MethodType(score_texts, model)
    if args.use_lora:
        transformers.set_seed(args.seed)
        config = lora_config(args, source, "SEQ_CLS")
        # PEFT adds the names of the head each time that it makes a model of the config.
        config.modules_to_save = sorted({*(config.modules_to_save or [])} - {"score", "classifier"}) or None
        with reading("--lora_target_modules"):
            model = get_peft_model(model, config)
        if source.adapter:
            with reading(f"the adapter {source.adapter}"):
                found, name = load_file(source.adapter / "adapter_model.safetensors"), "base_model.model.score.weight"
                new_head = new_head and name not in found  # PEFT wants one all the same
                missed = set_peft_model_state_dict(model, {name: head.weight, **found}).unexpected_keys
            if missed:
                raise UserError(f"the adapter {source.adapter} does not fit {source.base}: no place for {missed[0]}")
        keep_input_dtype(model)
    if new_head and args.eval_only:
        raise UserError(f"--eval_only: {args.model_path} has no score head; it should be a trained reward model")
    print(f"score head: {'new' if new_head else 'that of ' + args.model_path}")
    return model


def score_batch(model, batch, args):
    """The scores (texts, 1) of a batch, without gradients, in the precision of the training."""
    model.eval()
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=args.fp16 or args.bf16):
        return model(**{name: value.to(model.device) for name, value in batch.items()}).logits


def pick_collator(model, rows, tokenizer, args):
    """`collate_shared` where the model computes with it what it computes with padding, else TRL's collator.

    Tried on the longest pair: a model may not hand `pairs` down to its attention, or attend in a way of its own."""
    padded = DataCollatorForPreference(tokenizer.pad_token_id)
    if args.attn_implementation:
        return padded
    own, hidden = model.config._attn_implementation, []
    hook = model.score.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    longest = rows[int(np.argmax(rows["length"]))]
    score_batch(model, padded([longest]), args)
    try:
        model.set_attn_implementation("pairs")
        score_batch(model, collate_shared([longest]), args)
        error = ((hidden[1] - hidden[0]).norm(dim=-1) / hidden[0].norm(dim=-1)).max().item()
    except (TypeError, ValueError, RuntimeError, LookupError) as reason:
        error = reason
    hook.remove()
    if isinstance(error, float) and error < 0.1:  # rounding: 1e-5 in float32, a few percent in bfloat16
        return collate_shared
    model.set_attn_implementation(own)
    print(f"{model.config.model_type}: batches are padded, attention within flattened pairs does not work ({error})")
    return padded


class GuardedTrainer(NonfiniteGuard, RewardTrainer):
    """RewardTrainer that stops before NaN or infinity reaches the weights, and writes no model card without facts."""

    def create_model_card(self, *args, **kwargs):
        pass


def score_pairs(model, rows, collate, args, tokens=4096):
    """(score_chosen, score_rejected), arrays in the order of `rows`, from batches of similar lengths; the processes
    share the rows out."""
    lengths, state = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows], PartialState()
    mine = range(state.process_index, len(rows), state.num_processes)
    scores, order = np.zeros((2, len(rows))), sorted(mine, key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // lengths[order[0]])
        batch, order = order[:size], order[size:]
        scores[:, batch] = score_batch(model, collate([rows[i] for i in batch]), args).view(2, -1).cpu().numpy()
    if state.num_processes > 1:
        scores = sum(gather_object([scores]))
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=0))
    if len(bad):
        row = rows[int(bad[0])]["row"]
        raise UserError(f"{len(bad)} pairs have scores that are NaN or infinite, the first in row {row}")
    return scores


def mean(values):
    return float(np.mean(values)) if len(values) else None


def make_report(scores, length_difference):
    """What the `scores` (2, pairs), chosen and rejected, say; `length_difference`: chosen - rejected, in tokens.

    Calibration is that of the model's confidence in the side that it prefers, sigmoid(|margin|), in ten bins from 0.5
    to 1; a tie is half right there, and wrong in the accuracy. The interval is Wilson's (1927), the calibration error
    that of Guo et al. 2017 (arXiv:1706.04599)."""
    margin, length_difference = scores[0] - scores[1], np.asarray(length_difference)
    n, right, z = len(margin), margin > 0, 1.96
    p = mean(right)
    center, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    confidence, hit = 1 / (1 + np.exp(-np.abs(margin))), right + 0.5 * (margin == 0)
    bins, reliability = np.minimum((confidence - 0.5) * 20, 9).astype(int), []
    for i in range(10):
        inside = bins == i
        row = {"from": (10 + i) / 20, "to": (11 + i) / 20, "pairs": int(inside.sum())}
        reliability.append({**row, "confidence": mean(confidence[inside]), "accuracy": mean(hit[inside])})
    gaps = [row["pairs"] / n * abs(row["confidence"] - row["accuracy"]) for row in reliability if row["pairs"]]
    longer, shorter = length_difference > 0, length_difference < 0
    varied = margin.std() > 0 and length_difference.std() > 0
    return {
        "pairs": n,
        "accuracy": p,
        "accuracy_interval": [(center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)],
        "ties": int((margin == 0).sum()),
        "loss": mean(np.logaddexp(0, -margin)),
        "mean_margin": mean(margin),
        "mean_score": mean(scores),
        "calibration_error": sum(gaps),
        "reliability": reliability,
        "length_bias": {
            "chosen_longer": {"pairs": int(longer.sum()), "accuracy": mean(right[longer])},
            "chosen_shorter": {"pairs": int(shorter.sum()), "accuracy": mean(right[shorter])},
            "correlation": float(np.corrcoef(margin, length_difference)[0, 1]) if varied else None,
        },
    }


def evaluate_pairs(model, rows, collate, args, where):
    """(report, scores) on the evaluation pairs; the report is printed.

    Up to 64 pairs are scored again with their sides swapped and in other batches: the preference has to follow."""
    scores = score_pairs(model, rows, collate, args)
    report = make_report(scores, [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows])
    some = rows.select(range(min(64, len(rows))))
    swapped = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in some]
    again, first = score_pairs(model, swapped, collate, args, tokens=1024)[::-1], scores[:, : len(some)]
    agreement = mean(np.sign(again[0] - again[1]) == np.sign(first[0] - first[1]))
    report["swapped"] = {"pairs": len(some), "agreement": agreement, "difference": float(np.abs(again - first).max())}

    (low, high), bias, difference = report["accuracy_interval"], report["length_bias"], report["swapped"]["difference"]
    lines = [
        ("accuracy", report["accuracy"], f"95% interval {low:.3f} to {high:.3f}; {report['ties']} ties"),
        ("  chosen is longer", bias["chosen_longer"]["accuracy"], f"{bias['chosen_longer']['pairs']} pairs"),
        ("  chosen is shorter", bias["chosen_shorter"]["accuracy"], f"{bias['chosen_shorter']['pairs']} pairs"),
        ("margin and length", bias["correlation"], "correlation of the differences in score and in tokens"),
        ("mean margin", report["mean_margin"], f"score_chosen - score_rejected; loss {report['loss']:.3f}"),
        ("sides swapped", agreement, f"agree, of {len(some)} pairs; scores within {difference:.0e}"),
        ("calibration error", report["calibration_error"], "of confidence sigmoid(|margin|); accuracy by bins:"),
    ]
    bins = [row for row in report["reliability"] if row["pairs"]]
    lines += [(f"  {row['from']:.2f} to {row['to']:.2f}", row["accuracy"], f"{row['pairs']} pairs") for row in bins]
    if PartialState().is_main_process:
        print(f"report on {len(rows)} pairs of {where}")
        for name, value, note in lines:
            print(f"  {name:20} {'    -' if value is None else format(value, '6.3f')}  {note}")
    return report, scores


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_shared(args, RewardConfig)
    eval_split = args.eval_split or ("test" if args.eval_subset else None)
    if args.eval_fraction and eval_split:
        raise UserError("--eval_fraction holds out rows of --train_split; it excludes --eval_split and --eval_subset")
    if args.eval_steps and not (eval_split or args.eval_fraction):
        raise UserError("--eval_steps needs pairs to evaluate on: --eval_split, --eval_subset or --eval_fraction")
    if args.streaming and (args.eval_fraction or args.eval_only or not args.max_steps):
        raise UserError("--streaming needs --max_steps, and excludes --eval_fraction and --eval_only")
    if args.eval_only and not (eval_split or args.eval_fraction):
        raise UserError("--eval_only needs pairs to evaluate on: --eval_split, --eval_subset or --eval_fraction")
    if args.eval_only and args.resume_from_checkpoint:
        raise UserError("--eval_only trains nothing, so there is nothing to resume: leave --resume_from_checkpoint out")
    source = locate_model(args.model_path, "--model_path")
    check_source(source, args, "--model_path", reward_model=True if args.eval_only else None)
    args.use_lora = args.use_lora or source.adapter is not None
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 1e-5
    checkpoint = pick_checkpoint(args, "reward")
    tokenizer = load_tokenizer(source, args)
    prompt_format = pick_format(args.prompt_format, "chat", source.run.get("prompt_format"), tokenizer)
    # Libraries that score a padded batch read the last token that is not padding; where EOS is that, it gets lost.
    ends = prompt_format.stop_ids()
    spare = [tokenizer.unk_token_id, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)]
    spare = [i for i in spare if i not in (None, *ends)]
    if tokenizer.pad_token_id in ends and spare:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])

    splits = {}
    if not (args.eval_only and eval_split):
        splits["train"] = args.subset, args.train_split
    if eval_split:
        splits["eval"] = args.eval_subset or args.subset, eval_split
    rows, counts, where = {}, {"train": {}, "eval": None}, {}
    for name, (subset, split) in splits.items():
        where[name] = f"{args.dataset_name}{f' {subset}' if subset else ''} [{split}]"
        streaming, use_margin = (flag and name == "train" for flag in (args.streaming, args.use_margin))
        data = load_split(args, args.dataset_name, subset, split, f"--{name}_split", streaming)
        rows[name], counts[name] = encode_split(data, prompt_format, args, where[name], use_margin)
    if args.eval_fraction:
        rows["train"], rows["eval"] = hold_out(rows["train"], args.eval_fraction, args.seed)
        counts["train"]["rows"], counts["eval"] = len(rows["train"]), {"rows": len(rows["eval"])}
        where["eval"] = f"{where['train']}, held out"
    batch_size = args.per_device_train_batch_size
    known = {**rows}
    if args.streaming:  # the first pairs stand for all
        known["train"] = datasets.Dataset.from_list(list(rows["train"].take(256)))
        if not len(known["train"]):
            raise UserError(f"{where['train']}: no pair is left to train on")
    elif not args.eval_only and batch_size > len(rows["train"]):
        raise UserError(
            f"--per_device_train_batch_size {batch_size} is larger than the data set ({len(rows['train'])} pairs)"
        )
    longest = args.max_length if args.streaming else max(max(split["longest"]) for split in known.values())
    positions = getattr(load_config(source, args).get_text_config(), "max_position_embeddings", longest)
    if longest > positions:
        raise UserError(
            f"--max_length {args.max_length}: the model has {positions} positions, a text {longest} tokens; use --max_length "
            f"{positions}"
        )

    # On a CPU a batch runs pair by pair: the same gradient, the memory of one pair, about a tenth slower. A GPU gets
    # the batch as one row without padding.
    pairs_at_once = batch_size if torch.accelerator.is_available() else 1
    if not args.eval_only:
        pairs = known["train"]
        batch = batch_size * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
        steps = args.max_steps or math.ceil(args.num_train_epochs * math.ceil(len(pairs) / batch))
        print(
            f"{steps} steps of {batch} pairs; {'the first' if args.streaming else 'an epoch has'} {len(pairs)} pairs, "
            f"{sum(pairs['length'])} tokens, {sum(pairs['size'])} with what the two texts of a pair share counted once"
        )
        peft_config = lora_config(args, source, "SEQ_CLS") if args.use_lora else None
        tokens = pairs_at_once * (2 * args.max_length if args.streaming else max(pairs["size"]))
        foresee(args, transformers.AutoModelForSequenceClassification, source, steps, peft_config, tokens, 0)
    config = make_config(
        RewardConfig,
        args,
        per_device_train_batch_size=pairs_at_once,
        gradient_accumulation_steps=args.gradient_accumulation_steps * batch_size // pairs_at_once,
        per_device_eval_batch_size=batch_size,
        max_steps=args.max_steps or -1,
        num_train_epochs=args.num_train_epochs,
        max_length=None,  # longer pairs are left out already
        center_rewards_coefficient=args.center_rewards_coefficient,
        disable_dropout=False,  # done in load_reward_model
        eval_strategy="steps" if "eval" in rows and args.eval_steps else "no",
        save_strategy="steps",
    )
    dataset = {**counts["train"], "eval": counts["eval"]}
    run = describe_run("reward", args, source, prompt_format, tokenizer, dataset)
    if args.dry_run:
        show_rows(known["eval" if args.eval_only else "train"], tokenizer)
        print("dry run: everything fits; nothing was loaded or written")
        return

    model = load_reward_model(source, args)
    if args.eval_only:
        if not (args.load_in_4bit or args.load_in_8bit):
            model.to(config.device)
        collate = pick_collator(model, rows["eval"], tokenizer, args)
        report, scores = evaluate_pairs(model, rows["eval"], collate, args, where["eval"])
        if not PartialState().is_main_process:
            return
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        with open(output_dir / "scores.jsonl", "w", encoding="utf-8") as file:
            for row, chosen, rejected in zip(rows["eval"]["row"], *scores.tolist()):
                print(json.dumps({"row": row, "score_chosen": chosen, "score_rejected": rejected}), file=file)
        write_json(output_dir / "metrics.json", {"accuracy": report["accuracy"], "report": report})
        print(f"saved {output_dir / 'scores.jsonl'}")
        return

    open_output_dir(args, checkpoint)
    callback = RunCallback(args.output_dir, run)
    columns = ["chosen_ids", "rejected_ids", "margin"]
    adapters = model.parameters() if args.load_in_4bit or args.load_in_8bit else ()
    weights = [(parameter, parameter.data) for parameter in adapters if parameter.requires_grad]
    trainer = GuardedTrainer(
        model=model,
        args=config,
        train_dataset=rows["train"].select_columns(columns),
        eval_dataset=rows["eval"].select_columns(columns[:2]) if "eval" in rows else None,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    for parameter, data in weights:  # RewardTrainer makes them bfloat16 on a quantized base, see load_model
        parameter.data = data.to(parameter.device)
    if tokenizer.pad_token_id in ends:  # RewardTrainer writes it into the config, which is saved
        model.config.pad_token_id = None
    trainer.data_collator = collate = pick_collator(model, known["train"], tokenizer, args)
    trainer.skips, trainer.text_column = args.skip_nonfinite, "chosen_ids"
    trainer.rows = None if args.streaming else rows["train"]
    metrics = {}
    if "eval" in rows:
        scores = score_pairs(model, rows["eval"], collate, args)
        metrics["accuracy_before"] = mean(scores[0] > scores[1])
        print(f"accuracy before training {metrics['accuracy_before']:.3f}")
    metrics.update(train_model(trainer, checkpoint))
    if "eval" in rows and not callback.interrupted:
        report, _ = evaluate_pairs(model, rows["eval"], collate, args, where["eval"])
        metrics.update(accuracy=report["accuracy"], report=report)
    finish_run(args, trainer, callback, run, metrics, save=trainer.model.save_pretrained)


if __name__ == "__main__":
    run_as_script(main)
