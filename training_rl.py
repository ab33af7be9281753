"""PPO on a causal language model against a reward model, with policy, reference, reward and value on one base model.

In: a policy (hub id, model directory or LoRA adapter directory, usually the SFT stage's final_checkpoint), a reward
model (the same three forms) or a Python function, and a data set with `prompt` or `question`.
Out, in --output_dir: `final_checkpoint/` (policy, tokenizer, run.json; the value model in its `value/`), resumable
`checkpoint-N/`, `metrics.jsonl`, `metrics.json`, and `samples.jsonl` with answers to fixed prompts.

    python training_rl.py --model_path checkpoints/sft/final_checkpoint \
        --reward_model_path checkpoints/rm/final_checkpoint --dataset_name json --subset data/rl --split train \
        --output_dir checkpoints/ppo --bf16 --use_lora --per_device_train_batch_size 1 \
        --gradient_accumulation_steps 8 --total_episodes 1024 --response_length 128
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
import hashlib
import importlib.metadata
import importlib.util
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
    add("--model_path", required=True, help="policy: hub id, model directory or LoRA adapter directory")
    add("--reward_model_path", help="reward model: hub id, model directory or LoRA adapter directory")
    add("--reward_function", metavar="FILE.py:NAME", help="fn(prompts, responses) -> list of float, beside or in place")
    add("--value_model_path", help="start of the value model (a copy of the reward model)")
    add("--dataset_name", required=True, help="hub id, folder, file, or json/parquet/arrow/csv")
    add("--subset", help="data_dir of the data set, e.g. data/rl")
    add("--split", default="train", help="split with the prompts")
    add("--eval_subset", help="data_dir of the evaluation prompts (that of --subset)")
    add("--eval_split", help="prompts answered greedily at --eval_steps (the first 8 training prompts)")
    add("--per_device_train_batch_size", type=number(int, 1), default=1, help="sequences per micro-batch")
    add("--total_episodes", type=number(int, 1), help="answers to sample in all (one for each prompt)")
    add("--max_prompt_length", type=number(int, 1), default=512, help="longer prompts are left out, in tokens")
    add("--response_length", type=number(int, 1), default=128, help="longest answer, in tokens")
    add(
        "--temperature",
        type=number(float, 1e-3),
        default=0.7,
        help="sampling temperature, also of the log-probabilities",
    )
    add("--num_ppo_epochs", type=number(int, 1), default=4, help="passes over each batch of answers")
    add("--num_mini_batches", type=number(int, 1), default=1, help="optimizer steps per pass")
    add("--kl_coef", type=number(float, 0), default=0.05, help="weight of the KL penalty in the reward")
    add("--kl_estimator", choices=["k1", "k3"], default="k1", help="see joschu.net/blog/kl-approx.html")
    add("--target_kl", type=number(float, 0), help="adapt --kl_coef to hold this KL, nats per answer")
    add("--max_kl", type=number(float, 0), help="stop, and keep the policy from before, above this KL, nats per answer")
    add("--cliprange", type=number(float, 0), default=0.2, help="clip range of the probability ratio")
    add("--cliprange_value", type=number(float, 0), default=0.2, help="clip range of the value")
    add("--vf_coef", type=number(float, 0), default=0.1, help="weight of the value loss")
    add("--gamma", type=number(float, 0, 1), default=1.0, help="discount factor")
    add("--lam", type=number(float, 0, 1), default=0.95, help="lambda of generalized advantage estimation")
    add("--whiten_rewards", action="store_true", help="divide the rewards by their spread in the batch")
    add("--normalize_reward", action="store_true", help="center and scale the score by the reference's own answers")
    add("--reward_clip", type=number(float, 0), help="clip the score to +- this")
    add(
        "--missing_eos_penalty", type=number(float, 0), default=1.0, help="off the score of an answer that does not end"
    )
    add_shared_flags(parser, learning_rate="5e-5 with LoRA, 3e-6 without")
    parser.set_defaults(logging_steps=1, save_steps=20)
    return parser


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    run_as_script(build_parser().parse_args)
    run_as_script(check_trl)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an optional CPU kernel at every start
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # trl 1.12 uses names of before v6

import datasets
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import reduce
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.integrations import get_available_reporting_integrations
from trl.experimental import ppo as trl_ppo
from trl.trainer.utils import entropy_from_logits, selective_log_softmax


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
                peft_config = copy.deepcopy(peft_config)
                if peft_config.target_modules == "all-linear":
                    peft_config.target_modules = linear_layers(model)
                model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
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


SCHEMAS = [("prompt",), ("question",)]


@dataclasses.dataclass
class Role:
    """One of policy, reference, reward, value: a model, the LoRA adapter in it that plays the role (None: none does),
    and for reward and value the scalar head on the last hidden state."""

    model: torch.nn.Module
    adapter: str | None = None
    head: torch.nn.Module | None = None

    @contextlib.contextmanager
    def active(self, train=False):
        """The model as this role. The active adapter is module state, so a backward pass (which runs the forward again
        under gradient checkpointing) belongs inside."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif self.adapter is None:
            with self.model.disable_adapter():
                yield self.model.get_base_model()
        else:
            self.model.set_adapter(self.adapter, inference_mode=not train)
            yield self.model.get_base_model()

    def parameters(self):
        """What training this role changes."""
        weights = [p for name, p in self.model.named_parameters() if not self.adapter or f".{self.adapter}." in name]
        return weights + (list(self.head.parameters()) if self.head is not None else [])


class Roles(torch.nn.Module):
    """The four roles and the models that they share, as the one module that Trainer places and optimizes."""

    def __init__(self, policy, reference, reward, value):
        super().__init__()
        self.policy, self.reference, self.reward, self.value = policy, reference, reward, value
        roles = [role for role in (policy, reference, reward, value) if role is not None]
        self.models = torch.nn.ModuleList({id(role.model): role.model for role in roles}.values())
        self.heads = torch.nn.ModuleList([role.head for role in roles if role.head is not None])
        self.config = policy.model.config
        self.mark_trained()

    def trained(self):
        return [p for p in self.policy.parameters() + self.value.parameters() if p.is_floating_point()]

    def mark_trained(self):
        """Gradients for the policy and the value model only; `Role.active` leaves them to the role that it was for."""
        self.requires_grad_(False)
        for parameter in self.trained():
            parameter.requires_grad_(True)


def linear_layers(model):
    """Names of the layers that `all-linear` means: all but the output head, routers (their forward returns a tuple), and
    the out_proj of recurrent layers, which PEFT refuses."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and module is not model.get_output_embeddings()
        and name != "score"
        and not type(module).__name__.endswith("Router")
        and not (model._is_stateful and name.endswith("out_proj"))
    ]


def find_body(model):
    """The part of a language model whose last hidden states its head reads."""
    return getattr(model, model.base_model_prefix, None) or model.model  # Llama 4's base_model is the model itself


@torch.no_grad()
def state_width(model):
    """Size of the last hidden states (OPT-350m projects them to another one than hidden_size)."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return find_body(model)(input_ids=ids, use_cache=False).last_hidden_state.shape[-1]


# what a layer may see less than the whole text by, as the configs of transformers name it
WINDOWS = [
    "sliding_window", "sliding_windows", "sliding_window_size", "attention_chunk_size", "window_size", "attention_window",
    "attention_window_size", "local_attention", "index_topk",
]  # fmt: skip
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def is_recurrent(model):
    """Whether some layer carries a state from token to token, so that what lies before a text changes it."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return model._is_stateful or not kinds <= ATTENTION


def sees_whole_texts(model, longest):
    """Whether no layer sees less than `longest` tokens."""
    config = model.config.get_text_config()
    names = set(WINDOWS) - ({"window_size"} if "local" not in getattr(config, "attention_layers", ["local"]) else set())
    windows = [getattr(config, name, None) for name in names]
    return all(window >= longest for window in windows if isinstance(window, int))


def switch_off(model):
    """No dropout and no noise on routers, so that the first ratio is 1; no auxiliary loss of experts, which is SFT's alone.

    `saved_config` keeps what the base has, for saving."""
    model.saved_config = copy.deepcopy(model.config)
    for holder in [model.config, model.config.get_text_config(), *model.modules()]:
        for name, value in vars(holder).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(holder, name, 0.0)
        if getattr(holder, "output_router_logits", False):
            holder.output_router_logits = False
        if isinstance(holder, torch.nn.Dropout):
            holder.p = 0.0


def scalar_head(weight):
    """A linear head without bias and with the given weight (1, hidden), in float32."""
    head = torch.nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight)
    return head


def split_head(weights):
    """(LoRA weights, head weight or None) of an adapter's tensors; None, None if it changes anything else."""
    lora = {name: tensor for name, tensor in weights.items() if "lora_" in name}
    rest = [tensor for name, tensor in weights.items() if "lora_" not in name]
    if not rest:
        return lora, None
    single = len(rest) == 1 and rest[0].ndim == 2 and rest[0].shape[0] == 1
    return (lora, rest[0]) if single else (None, None)


def load_scorer(source):
    """(LoRA weights, head weight) of a reward model's adapter."""
    with reading(f"the adapter {source.adapter}"):
        lora, head = split_head(load_file(source.adapter / "adapter_model.safetensors"))
    if head is None:
        raise UserError(
            f"{source.adapter} is not a reward model's adapter: it should hold LoRA weights and one scalar head"
        )
    return lora, head


def build_roles(args, policy_source, reward_source, value_source, same_tokens):
    """Load every base model once and put the roles on them.

    - policy: an adapter (a copy of the one at --model_path, or a new one), or with neither adapter nor --use_lora a full
      model; reference: the policy as it is at the start, frozen.
    - reward: its adapter on the policy's base if that is the base it was trained on, else a model of its own.
    - value: starts as a copy of the reward model, adapter and head (Stiennon et al. 2020, section 3.4: the value
      function starts from the reward model's weights). Without a reward model that reads the policy's tokens it starts
      from the policy with a zero head, so that the first advantages are those of the rewards alone.
    """
    bases = {}  # base -> PeftModel that holds the adapters on it

    def add_adapter(name, source, config, weights, cls):
        config.modules_to_save = None
        if source.base not in bases:
            model = load_model(cls, source, args, trainable=False)
            if config.target_modules == "all-linear":
                config.target_modules = linear_layers(model)
            bases[source.base] = get_peft_model(model, config, adapter_name=name)
        else:
            bases[source.base].add_adapter(name, config)
        if weights is not None:
            with reading(f"the adapter {source.adapter}"):
                fit = set_peft_model_state_dict(bases[source.base], weights, adapter_name=name)
            if fit.unexpected_keys:
                raise UserError(f"the adapter {source.adapter} does not fit {source.base}: {fit.unexpected_keys[0]}")
        return bases[source.base]

    def add_scorer(name, source, trainable):
        """A Role from a reward model's checkpoint: an adapter where it is one, else a full classifier."""
        if source.adapter:
            lora, head = load_scorer(source)
            with reading(source.adapter / "adapter_config.json"):
                config = LoraConfig.from_pretrained(source.adapter)
            config.task_type = None  # PEFT would make a head of its own for SEQ_CLS
            return Role(
                add_adapter(name, source, config, lora, AutoModelForSequenceClassification), name, scalar_head(head)
            )
        if trainable and args.use_lora:  # a new adapter on the frozen classifier
            shared = reward_source is not None and source.base == reward_source.base
            head = reward.head if shared else load_classifier(source, False).score
            config = lora_config(args, source, None)
            config.exclude_modules = ["score"]
            if config.target_modules == "all-linear" and shared:
                config.target_modules = linear_layers(reward.model)
            if source.base not in bases and shared:
                bases[source.base] = get_peft_model(reward.model, config, adapter_name=name)
                reward.model = bases[source.base]
                return Role(reward.model, name, scalar_head(head.weight))
            return Role(
                add_adapter(name, source, config, None, AutoModelForSequenceClassification),
                name,
                scalar_head(head.weight),
            )
        model = load_classifier(source, trainable)
        return Role(model, None, model.score)

    def load_classifier(source, trainable):
        model = load_model(AutoModelForSequenceClassification, source, args, trainable, num_labels=1)
        if not hasattr(model, "score"):
            raise UserError(
                f"{source.base} has no scalar head named score; use an AutoModelForSequenceClassification of the Llama, GPT-2, Qwen ... kind"
            )
        return model

    policy_config = lora_config(args, policy_source, "CAUSAL_LM") if args.use_lora else None
    if args.use_lora:
        with reading(f"the adapter {policy_source.adapter}"):
            weights = load_file(policy_source.adapter / "adapter_model.safetensors") if policy_source.adapter else None
        model = add_adapter("default", policy_source, policy_config, weights, AutoModelForCausalLM)
        start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        add_adapter("ppo_reference", policy_source, copy.deepcopy(policy_config), start, AutoModelForCausalLM)
        policy, reference = Role(model, "default"), Role(model, "ppo_reference")
    else:
        policy, reference = (
            Role(load_model(AutoModelForCausalLM, policy_source, args, trainable=True)) for _ in range(2)
        )

    reward = add_scorer("ppo_reward", reward_source, trainable=False) if reward_source else None
    if value_source or (reward_source and same_tokens):
        value = add_scorer("ppo_value", value_source or reward_source, trainable=True)
    elif args.use_lora:
        model = add_adapter("ppo_value", policy_source, copy.deepcopy(policy_config), start, AutoModelForCausalLM)
        value = Role(model, "ppo_value", scalar_head(torch.zeros(1, state_width(model.get_base_model()))))
    else:
        value = add_scorer("ppo_value", policy_source, trainable=True)
        value.head.weight.data.zero_()
    for model in bases.values():
        keep_input_dtype(model)
    return Roles(policy, reference, reward, value)


def describe_roles(roles):
    """The start-up message: which base each role stands on, what it adds to it, and the bytes (1 GB = 1e9)."""
    lines, first = [], {}
    for name in ("policy", "reference", "reward", "value"):
        role = getattr(roles, name)
        if role is None:
            lines.append(f"  {name:<10} no model: --reward_function")
            continue
        shared = first.setdefault(id(role.model), name)
        own = sum(p.nbytes for p in role.parameters()) if role.adapter else 0
        part = f"adapter, {own / 1e6:.1f} MB," if role.adapter else "all weights" if shared == name else "no adapter"
        place = f"on the base of {shared}" if shared != name else f"on {role.model.config.name_or_path}"
        lines.append(f"  {name:<10} {'trained' if name in ('policy', 'value') else 'frozen':<8} {part} {place}")
    total = sum(p.nbytes for p in roles.parameters())
    return "\n".join(["roles:", *lines, f"  weights in memory: {total / 1e9:.2f} GB in {len(roles.models)} model(s)"])


@dataclasses.dataclass
class MicroBatch:
    """Some episodes of a rollout as R rows of S tokens. R is 1 where texts may share a row: the tokens that all prompts
    begin with once, then of each episode the rest of its prompt and its response; `mask` keeps the episodes apart. Else
    each episode has its own row, padded behind it.

    B episodes, W response positions; a response of length n has actions at 0..n-1, and where W allows the state after
    its last token at n. Per position (B, W): `logprobs` of the sampled tokens and `ref_logprobs`, their `entropy`,
    `values` of the state before the token, `rewards`, `advantages`, `returns`."""

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
    width: int
    logprobs: torch.Tensor = None
    ref_logprobs: torch.Tensor = None
    entropy: torch.Tensor = None
    values: torch.Tensor = None
    scores: torch.Tensor = None
    rewards: torch.Tensor = None
    advantages: torch.Tensor = None
    returns: torch.Tensor = None


class PPOTrainer(NonfiniteGuard, trl_ppo.PPOTrainer):
    """TRL's PPOTrainer on `transformers.Trainer`'s own loop: one Trainer step is one update (a rollout, and
    num_ppo_epochs x num_mini_batches optimizer steps on it), so that clipping, schedule, mixed precision, logging,
    checkpoints and resume are Trainer's.

    Args:
        roles: the four roles (`build_roles`).
        args: PPOConfig; its per_device_train_batch_size is the number of episodes per process and update.
        micro_batch_size: sequences per forward pass.
        options: the script's flags, for what PPOConfig has no field for.
        longest: tokens of the longest prompt with its answer.
        prompt_format: how messages become tokens, for stop ids and for texts.
        score_texts: function(messages, responses) -> list of float or None: a reward for texts, added to the model's.
        reward_format: PromptFormat of a reward model that reads other tokens than the policy writes, or None.
    """

    def __init__(
        self,
        roles,
        args,
        micro_batch_size,
        options,
        longest,
        prompt_format,
        score_texts=None,
        reward_format=None,
        **kwargs,
    ):
        self.roles, self.options, self.prompt_format, self.skips = roles, options, prompt_format, options.skip_nonfinite
        self.score_texts, self.reward_format = score_texts, reward_format
        self.group_size = min(micro_batch_size, args.per_device_train_batch_size // args.num_mini_batches)
        self.ppo_state = {"kl_coef": args.kl_coef, "reward_mean": 0.0, "reward_std": 1.0, "stopped": None}
        self.snapshot, self.latest, self.references, self.evaluated = None, {}, {}, {}
        self.tokenizer = prompt_format.tokenizer
        self.stop_ids = torch.tensor(prompt_format.stop_ids(roles.policy.model.generation_config))
        args.world_size = transformers.TrainingArguments.world_size.fget(args)  # PPOConfig hides it behind a None
        for model in roles.models:
            switch_off(model.get_base_model() if isinstance(model, PeftModel) else model)
        if options.gradient_checkpointing:
            for model in roles.models:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
        super(trl_ppo.PPOTrainer, self).__init__(
            model=roles, args=args, data_collator=lambda rows: rows, processing_class=self.tokenizer, **kwargs
        )
        self.model_accepts_loss_kwargs = False
        self.device = self.accelerator.device
        self.stop_ids = self.stop_ids.to(self.device)
        self.recurrent = is_recurrent(
            roles.policy.model.get_base_model() if isinstance(roles.policy.model, PeftModel) else roles.policy.model
        )
        self.share_rows = False
        self.share_rows = self.may_share_rows(longest)
        if not self.share_rows:
            print(
                "in this model texts that share a row would see each other, or less than alone: each has a row of its own"
            )
        roles.mark_trained()

    train = Trainer.train
    get_train_dataloader = Trainer.get_train_dataloader
    _save_checkpoint = Trainer._save_checkpoint

    # ---- rollout ----

    @torch.no_grad()
    def generate(self, role, prompts, sample=True):
        """Responses (lists of token ids, at most response_length, ending with the first stop id) to lists of ids."""
        config = GenerationConfig(
            max_new_tokens=self.args.response_length,
            do_sample=sample,
            eos_token_id=self.stop_ids.tolist(),
            pad_token_id=self.tokenizer.pad_token_id,
            **({"temperature": self.args.temperature, "top_k": 0, "top_p": 1.0} if sample else {}),
        )
        responses, size, groups = [[]] * len(prompts), self.args.local_rollout_forward_batch_size, {}
        for i, prompt in enumerate(prompts):  # padding before a text would enter a state that goes from token to token
            groups.setdefault(len(prompt) if self.recurrent else 0, []).append(i)
        chunks = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
        # autocast keeps its 16-bit copies of weights for the next token only where they are trained
        with role.active(train=True) as model, self.accelerator.autocast():
            kept, model.generation_config = model.generation_config, config  # the model's own would fill gaps (top_p)
            try:
                for group in chunks:
                    chunk = [prompts[i] for i in group]
                    width = max(map(len, chunk))
                    ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(p)) + p for p in chunk])
                    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chunk])
                    out = model.generate(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
                    new = out[:, width:]
                    stops = torch.isin(new, self.stop_ids)
                    ends = torch.where(stops.any(1), stops.int().argmax(1) + 1, new.shape[1])
                    for i, row, end in zip(group, new.tolist(), ends.tolist()):
                        responses[i] = row[:end]
            finally:
                model.generation_config = kept
        return responses

    @torch.no_grad()
    def may_share_rows(self, longest):
        """Whether several texts in one row, behind a common beginning and under a mask, are the same computation as each
        text alone, in every model that reads tokens: no layer sees less than `longest` tokens or carries a state, and
        three texts agree in a trial."""
        roles = {id(role.model): role for role in (self.roles.policy, self.roles.value, self.roles.reward) if role}
        if self.reward_format is not None:  # it reads texts, one at a time
            roles.pop(id(self.roles.reward.model), None)
        start = torch.randint(len(self.tokenizer), (longest,), generator=torch.Generator().manual_seed(0)).tolist()
        prompts, responses = [start[: longest // 2]] * 3, [start[-1:], start[longest // 2 :], start[-2:-1]]
        rough = self.args.bf16 or self.args.fp16 or self.options.load_in_8bit or self.options.load_in_4bit
        for role in roles.values():
            with role.active() as model:
                flash = "flash" in (model.config._attn_implementation or "")  # it takes no mask
                if flash or is_recurrent(model) or not sees_whole_texts(model, longest):
                    return False
                self.share_rows = True
                try:
                    batches = [
                        self.collate(group, prompts, responses, [{}] * 3, longest)
                        for group in ([0, 1, 2], [0], [1], [2])
                    ]
                    both, *alone = (self.hidden_states(role, b)[b.state_index[b.actions]].float() for b in batches)
                except Exception:  # what raises here cannot read such a row
                    return False
                finally:
                    self.share_rows = False
            if (both - torch.cat(alone)).abs().max() > (0.05 if rough else 1e-3) * both.abs().max():
                return False
        return True

    def make_groups(self, prompts, responses):
        """Indices of the episodes of each micro-batch, sequences of like length together.

        A row holds the tokens of `group_size` sequences of the longest kind that the flags allow, so that short ones
        share passes, but no more than the hidden size unless one sequence has more: there attention, which is not
        sparse in a shared row, costs about a sixth of the linear layers. With several mini-batches every group has
        `group_size` sequences, so that mini-batches are equal in number."""
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
        shared = len(os.path.commonprefix(prompts))
        allowed = self.group_size * (self.options.max_prompt_length + self.args.response_length)
        limit = min(allowed, self.roles.config.get_text_config().hidden_size)
        groups = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if groups and (self.args.num_mini_batches > 1 or not self.share_rows):
                fits = len(groups[-1]) < self.group_size
            else:
                fits = groups and shared + sum(lengths[k] - shared for k in [*groups[-1], i]) <= limit
            groups[-1].append(i) if fits else groups.append([i])
        return groups

    def collate(self, group, prompts, responses, rows, total_width):
        """A MicroBatch of the episodes `group`: in one row where texts may share it, else each in its own, with padding
        behind it, which a causal model does not see."""
        prompts, responses = [prompts[i] for i in group], [responses[i] for i in group]
        one_row = self.share_rows and len(group) > 1
        shared = 0  # tokens that all prompts begin with; the last one of each stays its own
        if one_row:
            shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        texts = [prompt[shared:] + response for prompt, response in zip(prompts, responses)]
        places = [list(range(shared, shared + len(text))) for text in texts]
        mask = None
        if one_row:
            owner = torch.tensor([-1] * shared + [i for i, text in enumerate(texts) for _ in text], device=self.device)
            seen = ((owner == owner[:, None]) | (owner == -1)).tril()
            # as numbers that are added to the scores: SDPA would make them of a bool mask in every layer, and keep them
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=self.device)
            mask = mask.masked_fill(seen, 0)[None, None]
            ids = [prompts[0][:shared] + [token for text in texts for token in text]]
            positions = [list(range(shared)) + [place for own in places for place in own]]
            firsts = [shared + sum(map(len, texts[:i])) for i in range(len(texts))]  # of each text, in the flat ids
        else:
            size = max(map(len, texts))
            ids = [text + [self.tokenizer.pad_token_id] * (size - len(text)) for text in texts]
            positions = [list(range(size))] * len(texts)
            firsts = [size * i for i in range(len(texts))]
        lengths = [len(response) for response in responses]
        width = min(max(lengths) + 1, total_width)
        starts = [first + len(prompt) - shared - 1 for first, prompt in zip(firsts, prompts)]  # the first states
        index = [[start + min(j, n) for j in range(width)] for start, n in zip(starts, lengths)]
        size = len(ids[0])
        actions = [start + j for start, n in zip(starts, lengths) for j in range(n)]
        columns = {column: k for k, column in enumerate(sorted({place % size for place in actions}))}
        action_index = [place // size * len(columns) + columns[place % size] for place in actions]
        targets = torch.zeros(len(ids) * len(columns), dtype=torch.long)
        targets[action_index] = torch.tensor([token for response in responses for token in response])
        steps, lengths_ = torch.arange(width, device=self.device), torch.tensor(lengths, device=self.device)

        def tensor(values):
            return torch.tensor(values, device=self.device)

        return MicroBatch(
            rows=[rows[i] for i in group],
            responses=responses,
            input_ids=tensor(ids),
            position_ids=tensor(positions),
            mask=mask,
            state_index=tensor(index),
            columns=tensor(list(columns)),
            action_index=tensor(action_index),
            targets=targets.view(len(ids), -1).to(self.device),
            lengths=lengths_,
            ended=torch.isin(tensor([response[-1] for response in responses]), self.stop_ids),
            actions=steps < lengths_[:, None],
            states=steps <= lengths_[:, None],
            width=width,
        )

    def policy_logprobs(self, role, batch, entropy=False):
        """Log-probabilities (B, W) of the response tokens at the sampling temperature, float32, 0 where there is none;
        with `entropy` a pair, with that of the distributions.

        The one code path for old, new and reference log-probabilities: the first ratio is 1 and the first KL is 0."""
        with self.accelerator.autocast():
            model = role.model.get_base_model() if isinstance(role.model, PeftModel) else role.model
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                logits_to_keep=batch.columns,
                use_cache=False,
            ).logits
        logits = (
            logits if logits.shape[1] == len(batch.columns) else logits[:, batch.columns]
        )  # not every model keeps so
        logits = logits.float() / self.args.temperature
        found = [selective_log_softmax(logits, batch.targets)] + ([entropy_from_logits(logits)] if entropy else [])
        found = [values.flatten()[batch.action_index] for values in found]
        spread = [torch.zeros_like(batch.actions, dtype=v.dtype).masked_scatter(batch.actions, v) for v in found]
        return spread if entropy else spread[0]

    def hidden_states(self, role, batch):
        """Last hidden states (R * S, hidden) of the rows."""
        model = role.model.get_base_model() if isinstance(role.model, PeftModel) else role.model
        with self.accelerator.autocast():
            output = find_body(model)(
                input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
            )
        return output.last_hidden_state.flatten(0, 1)

    def state_values(self, batch):
        """Values (B, W) of the state before each response token, float32."""
        states = self.hidden_states(self.roles.value, batch)
        weight = self.roles.value.head.weight.float()
        return torch.nn.functional.linear(states[batch.state_index].float(), weight).squeeze(-1)

    def model_scores(self, batch):
        """The reward model's score (B,) of each response, read at its last token, float32."""
        role = self.roles.reward
        with role.active():
            if self.reward_format is None:
                states = self.hidden_states(role, batch)
                last = states[batch.state_index[:, 0] + batch.lengths]
            else:
                last = []
                for row, text, ended in zip(batch.rows, self.response_texts(batch), batch.ended.tolist()):
                    ids = self.reward_format.encode([*row["messages"], {"role": "assistant", "content": text}])[0]
                    ids = ids if ended else ids[:-1]  # cut off: no end token
                    text = self.collate([0], [ids[:1]], [ids[1:]], [row], len(ids))
                    last.append(self.hidden_states(role, text)[-1])
                last = torch.stack(last)
        return torch.nn.functional.linear(last.float(), role.head.weight.float()).squeeze(-1)

    def response_texts(self, batch):
        texts = self.tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
        # in `qa` the space of "Answer: x" is part of the answer's first token
        return [text.removeprefix(" ") for text in texts] if self.prompt_format.name == "qa" else texts

    def add_scores(self, batches):
        """The score (B,) of each response: reward model plus reward function, before penalty, scaling and clipping.

        The function is called once for all of them."""
        for batch in batches:
            batch.scores = torch.zeros(len(batch.rows), device=self.device)
            if self.roles.reward is not None:
                batch.scores += self.model_scores(batch)
        if self.score_texts is not None:
            rows = [row for batch in batches for row in batch.rows]
            texts = [text for batch in batches for text in self.response_texts(batch)]
            scores = torch.tensor(self.score_texts(rows, texts), device=self.device)
            for batch, part in zip(batches, scores.split([len(batch.rows) for batch in batches])):
                batch.scores += part

    @torch.no_grad()
    def roll_out(self, rows):
        """Sample a response to every prompt and put down all that the update needs; returns a list of MicroBatch."""
        prompts = [row["prompt_ids"] for row in rows]
        responses = self.generate(self.roles.policy, prompts)
        longest = torch.tensor([max(map(len, responses))], device=self.device)
        total_width = self.accelerator.gather(longest).max().item()
        groups = self.make_groups(prompts, responses)
        batches = [self.collate(group, prompts, responses, rows, total_width) for group in groups]
        for role, name in ((self.roles.policy, "logprobs"), (self.roles.reference, "ref_logprobs")):
            with role.active():
                for batch in batches:
                    setattr(batch, name, self.policy_logprobs(role, batch, entropy=name == "logprobs"))
        for batch in batches:
            batch.logprobs, batch.entropy = batch.logprobs
        with self.roles.value.active():
            for batch in batches:
                batch.values = self.state_values(batch) * batch.states
        self.add_scores(batches)
        for batch in batches:
            for what, values in (("log-probability", batch.logprobs), ("reward", batch.scores)):
                if not torch.isfinite(values).all():
                    self.fault = f"a {what} in the prompt rows {', '.join(str(row['row']) for row in batch.rows)}"
            self.shape_rewards(batch)
        if self.args.whiten_rewards:
            mean, rstd = self.moments(batches, "rewards", "states")
            for batch in batches:
                batch.rewards = (batch.rewards * rstd + mean * (1 - rstd)) * batch.states
        for batch in batches:
            self.estimate_advantages(batch)
        mean, rstd = self.moments(batches, "advantages", "actions")
        for batch in batches:
            batch.advantages = (batch.advantages - mean) * rstd * batch.actions
        return batches

    def shape_rewards(self, batch):
        """Per-token rewards: the KL penalty, and at the end the score, normalized, clipped, less the EOS penalty.

        KL estimators k1 and k3: http://joschu.net/blog/kl-approx.html. The score stands at the state after the last
        token where there is one, as in TRL."""
        score = (batch.scores - self.ppo_state["reward_mean"]) / self.ppo_state["reward_std"]
        if self.options.reward_clip:
            score = score.clamp(-self.options.reward_clip, self.options.reward_clip)
        if self.args.missing_eos_penalty:
            score = score - self.args.missing_eos_penalty * ~batch.ended
        batch.shaped_scores = score
        log_ratio = (batch.ref_logprobs - batch.logprobs) * batch.actions
        batch.kl = -log_ratio
        batch.penalty = batch.kl if self.args.kl_estimator == "k1" else log_ratio.exp() - 1 - log_ratio
        batch.rewards = -self.ppo_state["kl_coef"] * batch.penalty
        end = torch.where(batch.lengths < batch.width, batch.lengths, batch.lengths - 1)
        batch.rewards[torch.arange(len(end), device=end.device), end] += score

    def estimate_advantages(self, batch):
        """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16)."""
        advantage, advantages = 0.0, []
        for t in reversed(range(batch.width)):
            following = batch.values[:, t + 1] if t + 1 < batch.width else 0.0
            delta = batch.rewards[:, t] + self.args.gamma * following - batch.values[:, t]
            advantage = delta + self.args.gamma * self.args.lam * advantage
            advantages.append(advantage)
        batch.advantages = torch.stack(advantages[::-1], dim=1)
        batch.returns = batch.advantages + batch.values

    def moments(self, batches, values, mask):
        """(mean, 1 / standard deviation) of a field over all processes, where the mask is set; Bessel's correction."""
        pairs = [(getattr(batch, values), getattr(batch, mask)) for batch in batches]
        count, total = self.accelerator.reduce(
            torch.stack([sum(m.sum() for _, m in pairs).float(), sum((v * m).sum() for v, m in pairs)]), "sum"
        )
        mean = total / count
        squares = self.accelerator.reduce(sum(((v - mean).square() * m).sum() for v, m in pairs), "sum")
        return mean, torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)

    # ---- update ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One PPO update, up to its last optimizer step, which Trainer takes."""
        started = time.perf_counter()
        model.eval()  # there is no dropout, and in train mode gradient checkpointing generates without a cache
        batches = self.roll_out(inputs)
        rolled_out = time.perf_counter()
        faults = torch.tensor(float(self.fault is not None), device=self.device)
        if self.accelerator.reduce(
            faults, "sum"
        ):  # stops or leaves out the update when Trainer asks for its gradient norm
            self.fault = self.fault or "a log-probability or reward of another process"
            self.latest, self.grad_norms = {}, []
            return self.do_nothing()
        kl = self.accelerator.reduce(torch.stack([batch.kl.sum() for batch in batches]).sum(), "sum")
        kl = (kl / (self.args.per_device_train_batch_size * self.accelerator.num_processes)).item()
        if self.state.global_step == 0 and not any(batch.ended.any() for batch in batches):
            print(
                f"none of the first answers ended within {self.args.response_length} tokens: the policy may not have "
                "learned to stop; see --response_length, or train it longer on answers that end (training_sft.py)"
            )
        if self.options.max_kl and kl > self.options.max_kl:
            return self.stop_for_kl(kl)
        if self.options.max_kl:
            self.snapshot = [p.detach().to("cpu", copy=True) for p in self.roles.trained()]
        model.train(self.options.gradient_checkpointing)
        losses = self.optimize(model, batches)
        self.measure(batches, losses, kl, rolled_out - started, time.perf_counter() - rolled_out)
        if self.options.target_kl and math.isfinite(kl):  # Ziegler et al. 2019, section 2.2; horizon 10,000 episodes
            error = min(max(kl / self.options.target_kl - 1, -0.2), 0.2)
            episodes = self.args.per_device_train_batch_size * self.accelerator.num_processes
            self.ppo_state["kl_coef"] *= 1 + error * episodes / 10_000
        return losses["loss"].nan_to_num(0, 0, 0)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.ppo_state["stopped"]:
            model.zero_grad()  # zeros would still let AdamW's momentum move the policy
        return norm

    def stop_for_kl(self, kl):
        print(f"KL {kl:.1f} nats is above --max_kl {self.options.max_kl}: stopped; the policy is the one before that")
        if self.snapshot is not None:
            for parameter, kept in zip(self.roles.trained(), self.snapshot):
                parameter.data.copy_(kept)
        self.ppo_state["stopped"] = f"KL {kl:.2f} above {self.options.max_kl}"
        self.latest, self.grad_norms = {"objective/kl": kl}, []
        self.args.save_strategy = "no"  # a run resumed from here would go on
        self.control.should_training_stop = True
        return self.do_nothing()

    def do_nothing(self):
        """The loss of an update that changes nothing. The loss scaler of float16 has to have seen gradients."""
        if self.args.fp16:
            self.roles.mark_trained()
            self.accelerator.backward(sum(parameter.sum() for parameter in self.roles.trained()) * 0.0)
        return torch.zeros((), device=self.device)

    def optimize(self, model, batches):
        """num_ppo_epochs x num_mini_batches optimizer steps; the gradients of the last are left for Trainer.

        Each token of a mini-batch counts the same, whatever micro-batch or process it is in."""
        args, stats = self.args, []
        size = len(batches) // args.num_mini_batches
        last = args.num_ppo_epochs * args.num_mini_batches - 1
        for step in range(last + 1):
            if step % args.num_mini_batches == 0:
                order = torch.randperm(len(batches)).tolist() if args.num_mini_batches > 1 else range(len(batches))
            start = (step % args.num_mini_batches) * size
            mini_batch = [batches[i] for i in order[start : start + size]]
            counts = torch.stack([sum(b.actions.sum() for b in mini_batch), sum(b.states.sum() for b in mini_batch)])
            actions, states = self.accelerator.reduce(counts, "sum")
            with self.roles.policy.active(train=True):
                found = [self.policy_backward(batch, actions) for batch in mini_batch]
            with self.roles.value.active(train=True):
                stats += [part | self.value_backward(batch, states) for part, batch in zip(found, mini_batch)]
            if self.accelerator.num_processes > 1:  # sums, since the losses are divided by the counts of all processes
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
            if step < last:
                norm = self._clip_grad_norm(model) if args.max_grad_norm else None
                stats[-1]["grad_norm"] = self._get_grad_norm(model, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self.sum_stats(stats)

    def policy_backward(self, batch, actions):
        """Gradients of the clipped policy loss (Schulman et al. 2017, arXiv:1707.06347, equation 7), as a part of the
        mean over `actions` positions. Returns sums for the metrics."""
        difference = (self.policy_logprobs(self.roles.policy, batch) - batch.logprobs) * batch.actions
        ratio = difference.exp()
        clipped = ratio.clamp(1 - self.args.cliprange, 1 + self.args.cliprange)
        loss, clipped_loss = -batch.advantages * ratio, -batch.advantages * clipped
        policy_loss = (torch.max(loss, clipped_loss) * batch.actions).sum() / actions
        self.accelerator.backward(policy_loss)
        with torch.no_grad():
            return {
                "policy_loss": policy_loss.detach(),
                "clipfrac": ((clipped_loss > loss) * batch.actions).sum() / actions,
                "approxkl": 0.5 * difference.square().sum() / actions,
                "ratio": (ratio * batch.actions).sum() / actions,
            }

    def value_backward(self, batch, states):
        """The same for the clipped value loss and `states` positions."""
        values = self.state_values(batch)
        clip = self.args.cliprange_value
        near = torch.max(torch.min(values, batch.values + clip), batch.values - clip)
        errors, near_errors = (values - batch.returns).square(), (near - batch.returns).square()
        value_loss = 0.5 * (torch.max(errors, near_errors) * batch.states).sum() / states
        self.accelerator.backward(self.args.vf_coef * value_loss)
        clipfrac = ((near_errors > errors) * batch.states).sum() / states
        return {"value_loss": value_loss.detach(), "value_clipfrac": clipfrac}

    def sum_stats(self, stats):
        """Means over the optimizer steps of what the micro-batches gave; `loss` is what is minimized."""
        steps = self.args.num_ppo_epochs * self.args.num_mini_batches
        names = [name for name in stats[0] if name != "grad_norm"]
        totals = torch.stack([torch.stack([s[name] for s in stats]).sum() for name in names]) / steps
        means = dict(zip(names, self.accelerator.reduce(totals, "sum")))
        means["loss"] = means["policy_loss"] + self.args.vf_coef * means["value_loss"]
        means["grad_norms"] = [float(s["grad_norm"]) for s in stats if "grad_norm" in s]
        return means

    def measure(self, batches, losses, kl, rollout_seconds, train_seconds):
        """The update's metrics, over response tokens only and all processes, for the next log line (names as in TRL)."""

        def mean(value, count=1):
            total = sum(value(batch).sum().float() for batch in batches)
            return self.accelerator.reduce(total, "sum").item() / count

        n = self.args.per_device_train_batch_size * self.accelerator.num_processes
        length, states, tokens = (
            mean(lambda b: b.lengths, n),
            mean(lambda b: b.states),
            mean(lambda b: b.input_ids > -1),
        )
        score, returned = mean(lambda b: b.scores, n), mean(lambda b: b.returns * b.states, states)
        error = mean(lambda b: (b.returns - b.values) * b.states, states)
        unexplained = mean(lambda b: (b.returns - b.values - error).square() * b.states, states)
        spread = mean(lambda b: (b.returns - returned).square() * b.states, states)
        kl_penalty = self.ppo_state["kl_coef"] * mean(lambda b: b.penalty, n)
        self.latest = {
            "objective/scores": score,
            "objective/scores_std": math.sqrt(mean(lambda b: (b.scores - score).square(), n)),
            "objective/kl": kl,
            "objective/kl_coef": self.ppo_state["kl_coef"],
            "objective/entropy": mean(lambda b: -b.logprobs * b.actions, n),
            "objective/non_score_reward": -kl_penalty,
            "objective/rlhf_reward": mean(lambda b: b.shaped_scores, n) - kl_penalty,
            "policy/entropy_avg": mean(lambda b: b.entropy * b.actions, n * length),
            "policy/approxkl_avg": losses["approxkl"].item(),
            "policy/clipfrac_avg": losses["clipfrac"].item(),
            "loss/policy_avg": losses["policy_loss"].item(),
            "loss/value_avg": losses["value_loss"].item(),
            "val/clipfrac_avg": losses["value_clipfrac"].item(),
            "val/ratio": losses["ratio"].item(),
            "val/explained_variance": 1 - unexplained / spread if spread > 0 else 0.0,
            "response/length": length,
            "response/stop_rate": mean(lambda b: b.ended, n),
            "speed/rollout_seconds": rollout_seconds,
            "speed/train_seconds": train_seconds,
            "speed/episodes_per_second": n / (rollout_seconds + train_seconds),
            "speed/rollout_tokens_per_second": n * length / rollout_seconds,
            "speed/train_tokens_per_second": self.args.num_ppo_epochs * tokens / train_seconds,
            "episode": (self.state.global_step + 1) * n,
        }
        self.grad_norms = losses["grad_norms"]

    def log(self, logs, start_time=None):
        """Trainer's log line with the last update's metrics; the gradient norm is the mean of its optimizer steps."""
        if "grad_norm" in logs and self.latest:
            norms = [*self.grad_norms, logs["grad_norm"]]
            logs["grad_norm"] = sum(norms) / len(norms)
            logs.update(self.latest)
        Trainer.log(self, logs, start_time)

    # ---- fixed prompts ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Greedy answers of the policy and of the reference to the fixed prompts, with their scores.

        Written to samples.jsonl; the first five are printed."""
        if self.evaluated.get("step") == self.state.global_step:
            return self.evaluated["metrics"]
        rows = list(self.eval_dataset)
        self.roles.eval()
        self.references = self.references or self.answer(self.roles.reference, rows)
        answers = {"policy": self.answer(self.roles.policy, rows), "reference": self.references}
        metrics = {
            f"eval_{who}_{key}": sum(found[key] for found in answers[who]) / len(rows)
            for who in answers
            for key in ("score", "length", "ended")
        }
        if self.is_world_process_zero():
            path, step = Path(self.args.output_dir) / "samples.jsonl", self.state.global_step
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
            lines = [line for line in lines if json.loads(line)["step"] < step]  # a resumed run comes by again
            for row, *found in zip(rows, *answers.values()):
                sample = {"step": step, "row": row["row"], "prompt": row["text"]}
                sample |= {f"{who}_{key}": value for who, one in zip(answers, found) for key, value in one.items()}
                lines.append(json.dumps(sample, ensure_ascii=False))
            Path(f"{path}.partial").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(f"{path}.partial", path)
            scores = ", ".join(f"{who} {metrics[f'eval_{who}_score']:+.2f}" for who in answers)
            tqdm.write(f"\nupdate {step}, mean score of the answers to {len(rows)} fixed prompts: {scores}")
            for row, *pair in list(zip(rows, *answers.values()))[:5]:
                tqdm.write(f"\n> {row['text'].strip()[-200:]}")
                for who, found in zip(answers, pair):
                    tqdm.write(f"  {who:<10}{found['score']:+.2f}  {found['answer'].strip()}")
        self.log(metrics)
        self.evaluated = {"step": self.state.global_step, "metrics": metrics}
        return metrics

    @torch.no_grad()
    def answer(self, role, rows):
        """Greedy answers to the rows: text, score, length in tokens, and whether it ends, one dict each."""
        prompts, found = [row["prompt_ids"] for row in rows], []
        responses = self.generate(role, prompts, sample=False)
        batches = [self.collate([i], prompts, responses, rows, len(responses[i])) for i in range(len(rows))]
        self.add_scores(batches)
        for batch, response in zip(batches, responses):
            text, score = self.response_texts(batch)[0], batch.scores.item()
            found.append({"answer": text, "score": score, "length": len(response), "ended": batch.ended.item()})
        return found

    @torch.no_grad()
    def measure_reference(self, rows):
        """Mean and spread of the score on the reference's own sampled answers (--normalize_reward)."""
        prompts = [row["prompt_ids"] for row in rows]
        responses = self.generate(self.roles.reference, prompts)
        batches = [self.collate([i], prompts, responses, rows, len(responses[i])) for i in range(len(rows))]
        self.add_scores(batches)
        scores = self.accelerator.gather(torch.cat([batch.scores for batch in batches]))
        self.ppo_state.update(reward_mean=scores.mean().item(), reward_std=max(scores.std().item(), 1e-4))
        self.roles.mark_trained()  # the optimizer is made after this

    # ---- checkpoints ----

    def _save(self, output_dir=None, state_dict=None):
        """Policy at the top of the directory, value model in `value/` (in the form of a reward model's checkpoint)."""
        if self.args.should_save:
            output_dir = Path(output_dir or self.args.output_dir)
            save_roles(self.roles, output_dir)
            self.tokenizer.save_pretrained(output_dir)
            write_json(output_dir / "ppo_state.json", self.ppo_state)
            if self.snapshot is not None:
                torch.save(self.snapshot, output_dir / "before_update.pt")  # for --max_kl

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint = Path(resume_from_checkpoint)
        for role, directory in ((self.roles.policy, checkpoint), (self.roles.value, checkpoint / "value")):
            if role.adapter:
                lora, head = split_head(load_file(directory / "adapter_model.safetensors"))
                set_peft_model_state_dict(role.model, lora, adapter_name=role.adapter)
                if head is not None:
                    role.head.weight.data.copy_(head)
                continue
            for file in sorted(directory.glob("model*.safetensors")):
                role.model.load_state_dict(load_file(file), strict=False)
        state = read_json(checkpoint / "ppo_state.json")
        numbers = {name: float(state[name]) for name in ("kl_coef", "reward_mean", "reward_std")}
        self.ppo_state = {**numbers, "stopped": None}
        if self.options.max_kl and (checkpoint / "before_update.pt").is_file():
            self.snapshot = torch.load(checkpoint / "before_update.pt", weights_only=True)


def save_full(model, directory):
    """The model with its config as it was before `switch_off`."""
    running, model.config = model.config, model.saved_config
    model.save_pretrained(directory)
    model.config = running


def save_roles(roles, directory):
    """The policy in `directory` and the value model in its `value/`, as one PEFT or transformers call loads each."""
    policy, value = roles.policy, roles.value
    if policy.adapter:
        policy.model.save_pretrained(directory, selected_adapters=["default"])
    else:
        save_full(policy.model, directory)
    if not value.adapter:
        save_full(value.model, directory / "value")
        return
    weights = get_peft_model_state_dict(value.model, adapter_name=value.adapter)
    weights["base_model.model.score.weight"] = value.head.weight.detach()
    config = copy.copy(value.model.peft_config[value.adapter])
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
    config.save_pretrained(directory / "value")
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, directory / "value" / "adapter_model.safetensors", {"format": "pt"})


class EpisodeBar(TrainerCallback):
    """One progress bar, in episodes, with reward, KL and response length on it."""

    def __init__(self, episodes):
        self.episodes, self.bar = episodes, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            done = state.global_step * self.episodes
            self.bar = tqdm(total=state.max_steps * self.episodes, initial=done, unit="episode", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.episodes)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {"reward": "objective/scores", "kl": "objective/kl", "length": "response/length"}
        if self.bar is not None and shown["reward"] in logs:
            self.bar.set_postfix({name: f"{logs[key]:.2f}" for name, key in shown.items()})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def load_reward_function(spec):
    """`file.py:name` as a function(rows, responses) -> list of float, checked on every call."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"--reward_function {spec} should read FILE.py:NAME, with a file that exists")
    module = importlib.util.spec_from_file_location(Path(path).stem, path)
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    function = getattr(loaded, name, None)
    if not callable(function):
        raise UserError(f"--reward_function: {path} has no function {name}")

    def score_texts(rows, responses):
        scores = function([row["text"] for row in rows], responses)
        if len(scores) != len(responses):
            raise UserError(f"--reward_function {spec} returned {len(scores)} numbers for {len(responses)} responses")
        for score, response in zip(scores, responses):
            if not isinstance(score, (int, float)) and not hasattr(score, "item"):
                raise UserError(
                    f"--reward_function {spec} returned {score!r} for the response {response[:40]!r}, not a number"
                )
        return [float(score) for score in scores]

    return score_texts


def load_prompts(args, subset, split, flag, prompt_format):
    """One split as rows with `prompt_ids`, `messages`, `text`; prompts over --max_prompt_length are left out.

    Returns (rows, counts)."""
    data, where = load_split(args, args.dataset_name, subset, split, flag), f"{args.dataset_name} [{split}]"
    (column,) = pick_schema(data, SCHEMAS, where)

    def encode(row):
        value, ids, text = row[column], [], ""
        problem = check_text(value) if not isinstance(value, list) else check_messages(value, last="user")
        messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
        messages = [] if problem else [{"role": m["role"], "content": m["content"]} for m in messages]
        problem = problem and f"column {column} {problem}"
        try:
            if not problem:
                ids, text = prompt_format.encode(messages, open_end=True)[0], messages[-1]["content"]
        except UserError as error:
            problem = f"column {column}: {error}"
        return {"problem": problem, "prompt_ids": ids, "messages": messages, "text": text}

    rows = encode_rows(data, encode, where, "Tokenizing")
    kept = rows.filter(lambda row: len(row["prompt_ids"]) <= args.max_prompt_length)
    counts = {"rows": len(kept), "too_long": len(rows) - len(kept)}
    print(
        f"{where}: column {column}, format {prompt_format.name}; {len(kept)} prompts, {counts['too_long']} left out "
        f"(over {args.max_prompt_length} tokens)"
    )
    if not len(kept):
        raise UserError(f"{where}: no prompt is within --max_prompt_length {args.max_prompt_length} tokens")
    return kept, counts


def check_reward_model(source, args):
    """Refuse a reward model that its own evaluation found no better than chance."""
    report = source.run.get("metrics", {}).get("report")
    if not report:
        print(f"--reward_model_path {args.reward_model_path}: no evaluation on record, so nobody knows how good it is")
        return
    accuracy, (low, high) = report["accuracy"], report["accuracy_interval"]
    text = (
        f"--reward_model_path {args.reward_model_path} prefers the chosen answer in {accuracy:.3f} of {report['pairs']} pairs "
        f"(95% interval {low:.3f} to {high:.3f}), which is not above chance"
    )
    if accuracy <= 0.5 and not args.force:
        raise UserError(f"{text}: PPO would follow noise; train it further, or pass --force")
    if low <= 0.5:
        print(text)


def check_classifier(source, args, hint):
    """Refuse a model without a sequence classifier in transformers, before any weight is loaded."""
    config = load_config(source, args)
    remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not remote:
        raise UserError(
            f"{source.base} is a {config.model_type}, which has no sequence classifier in transformers: {hint}"
        )


def locate_roles(args):
    """The Sources of policy, reward model and value model; None for one without a flag."""
    policy = locate_model(args.model_path, "--model_path")
    check_source(policy, args, "--model_path", reward_model=False)
    reward = value = None
    if args.reward_model_path:
        reward = locate_model(args.reward_model_path, "--reward_model_path")
        check_source(reward, args, "--reward_model_path", reward_model=True)
        check_reward_model(reward, args)
    if args.value_model_path:
        value = locate_model(args.value_model_path, "--value_model_path")
        check_source(value, args, "--value_model_path")
    lora = args.use_lora or policy.adapter is not None
    for source in (reward, value):
        if source and source.adapter:
            load_scorer(source)
        if source and not (source.adapter and lora and source.base == policy.base):
            check_classifier(source, args, "use --reward_function in place of --reward_model_path")
    if not (reward or value or lora):
        check_classifier(policy, args, "the value model needs one, or --use_lora beside --reward_function")
    return policy, reward, value


def pick_reward_format(args, source, prompt_format):
    """(PromptFormat of a reward model that reads other tokens than the policy writes, or None; whether their
    vocabulary is the same)."""
    tokenizer = load_tokenizer(source, args)
    same_tokens = tokenizer.get_vocab() == prompt_format.tokenizer.get_vocab()
    recorded = source.run.get("prompt_format", prompt_format.name if same_tokens else None)
    found = pick_format("auto", "chat", recorded, tokenizer)
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if same_tokens and found.encode(probe) == prompt_format.encode(probe):
        return None, True
    same_format = found.name == prompt_format.name
    other = "tokenizer" if not same_tokens else "chat template" if same_format else "prompt format"
    print(
        f"the reward model reads other tokens than the policy writes, since it was trained with another {other}: "
        f"it gets texts, in its own format ({found.name})"
    )
    return found, same_tokens


def foresee_roles(args, policy, reward, value, config, longest, episodes, updates):
    """foresee() for the four roles; `longest`: tokens of a prompt and its answer, `episodes`: of an update."""
    peft_config = lora_config(args, policy, "CAUSAL_LM") if args.use_lora else None
    tokens = min(args.per_device_train_batch_size * longest, max(config.hidden_size, longest))  # as in make_groups
    shared = policy.base if args.use_lora else None  # where adapters of other roles find their base
    others = {other.base: other for other in (reward, value) if other and not (other.adapter and other.base == shared)}
    foresee(
        args,
        AutoModelForCausalLM,
        policy,
        updates,
        peft_config,
        tokens,
        tokens * args.response_length // longest,
        trained_roles=2 if args.use_lora or not (value or reward or policy).adapter else 1,
        frozen_roles=2 if args.use_lora and reward else 1,
        models=[load_config(other, args) for other in others.values()],
        cached=longest * min(episodes, trl_ppo.PPOConfig.local_rollout_forward_batch_size),
    )


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_shared(args, trl_ppo.PPOConfig)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):  # its backward pass takes an optimizer step
        raise UserError("PPO does not run under DeepSpeed; use DDP (accelerate launch --multi_gpu)")
    if not args.reward_model_path and not args.reward_function:
        raise UserError("a reward is needed: --reward_model_path, --reward_function, or both")
    episodes = args.per_device_train_batch_size * args.gradient_accumulation_steps
    mini_batch = episodes // args.num_mini_batches
    if episodes % args.num_mini_batches or mini_batch % min(args.per_device_train_batch_size, max(mini_batch, 1)):
        raise UserError(
            f"--num_mini_batches {args.num_mini_batches} does not divide the {episodes} episodes of an update "
            "(--per_device_train_batch_size x --gradient_accumulation_steps) into whole micro-batches"
        )
    score_texts = load_reward_function(args.reward_function) if args.reward_function else None
    policy_source, reward_source, value_source = locate_roles(args)
    args.use_lora = args.use_lora or policy_source.adapter is not None
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.use_lora else 3e-6
    checkpoint = pick_checkpoint(args, "rl")

    tokenizer = load_tokenizer(policy_source, args)
    prompt_format = pick_format(args.prompt_format, "chat", policy_source.run.get("prompt_format"), tokenizer)
    reward_format, same_tokens = None, True
    if reward_source:
        reward_format, same_tokens = pick_reward_format(args, reward_source, prompt_format)
    if value_source and load_tokenizer(value_source, args).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--value_model_path {args.value_model_path} has another tokenizer than the policy, whose tokens it reads"
        )

    train_rows, counts = load_prompts(args, args.subset, args.split, "--split", prompt_format)
    eval_rows = train_rows.select(range(min(8, len(train_rows))))
    if args.eval_split or args.eval_subset:
        subset, split = args.eval_subset or args.subset, args.eval_split or "test"
        eval_rows, counts["eval"] = load_prompts(args, subset, split, "--eval_split", prompt_format)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if episodes * processes > len(train_rows):
        raise UserError(
            f"an update takes {episodes * processes} episodes (--per_device_train_batch_size x "
            f"--gradient_accumulation_steps x processes), but there are only {len(train_rows)} prompts"
        )
    longest = max(len(ids) for rows in (train_rows, eval_rows) for ids in rows["prompt_ids"]) + args.response_length
    text_config = load_config(policy_source, args).get_text_config()
    positions = getattr(text_config, "max_position_embeddings", longest)
    if longest > positions:
        raise UserError(
            f"the model has {positions} positions, but a prompt and its answer may have {longest} tokens: lower "
            f"--max_prompt_length {args.max_prompt_length} or --response_length {args.response_length}"
        )
    if score_texts:  # a fault in it is to show before anything slow
        score_texts(list(train_rows.select([0, len(train_rows) - 1])), ["Yes.", "No."])
    updates = math.ceil((args.total_episodes or len(train_rows)) / (episodes * processes))
    foresee_roles(args, policy_source, reward_source, value_source, text_config, longest, episodes, updates)

    config = make_config(
        trl_ppo.PPOConfig,
        args,
        per_device_train_batch_size=episodes,  # one Trainer step is one update
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,  # PPOTrainer asks it of each model; Trainer would of the wrapper around them
        max_steps=updates,
        total_episodes=updates * episodes * processes,
        data_seed=args.seed,  # one order of prompts for all processes, which sample with seeds of their own
        dataloader_drop_last=True,
        remove_unused_columns=False,
        eval_strategy="steps" if args.eval_steps else "no",
        save_strategy="steps",
        **{
            name: getattr(args, name)
            for name in (
                "response_length", "temperature", "num_ppo_epochs", "num_mini_batches", "kl_coef", "kl_estimator", "cliprange",
                "cliprange_value", "vf_coef", "gamma", "lam", "whiten_rewards", "missing_eos_penalty",
            )
        },
    )  # fmt: skip
    run = describe_run("rl", args, policy_source, prompt_format, tokenizer, counts)
    print(
        f"{updates} updates of {episodes * processes} episodes, {args.num_ppo_epochs * args.num_mini_batches} optimizer steps each"
    )
    if args.dry_run:
        for row in train_rows.select(range(min(2, len(train_rows)))):
            print(f"--- row {row['row']}, {len(row['prompt_ids'])} tokens\n{tokenizer.decode(row['prompt_ids'])}")
        print("dry run: everything fits; nothing was loaded or written")
        return

    transformers.set_seed(args.seed)
    roles = build_roles(args, policy_source, reward_source, value_source, same_tokens)
    print(describe_roles(roles))
    open_output_dir(args, checkpoint)
    if not checkpoint and PartialState().is_main_process:
        Path(args.output_dir, "samples.jsonl").unlink(missing_ok=True)
    callback = RunCallback(args.output_dir, run)
    trainer = PPOTrainer(
        roles,
        config,
        micro_batch_size=args.per_device_train_batch_size,
        options=args,
        longest=longest,
        prompt_format=prompt_format,
        score_texts=score_texts,
        reward_format=reward_format,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        callbacks=[callback, EpisodeBar(episodes * processes)],
    )
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    if not checkpoint:
        torch.manual_seed(args.seed + 100_003 * trainer.args.process_index)  # processes sample different answers
        if args.normalize_reward:
            trainer.measure_reference(list(train_rows.select(range(min(64, len(train_rows))))))
    metrics = train_model(trainer, checkpoint)
    if "eval_policy_score" in metrics:  # resumed after the last step, which was evaluated
        trainer.evaluated = {"step": trainer.state.global_step, "metrics": {}}
    if not callback.interrupted:
        metrics.update(trainer.latest, **trainer.evaluate(), stopped=trainer.ppo_state["stopped"])

    def save(directory):
        save_roles(roles, directory)
        ends = {"eos_token_id": prompt_format.stop_ids(roles.policy.model.generation_config)}
        write_json(directory / "generation_config.json", roles.policy.model.generation_config.to_diff_dict() | ends)
        tokenizer.save_pretrained(directory / "value")

    finish_run(args, trainer, callback, run, metrics, save)


if __name__ == "__main__":
    run_as_script(main)
