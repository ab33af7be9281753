"""Tiny models and tokenizers, made on the spot: no network, CPU, seconds each."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "datasets"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on every machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # quiet on small machines; the numbers hold under any value

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Question: What is the capital of France?\n\nAnswer: The capital of France is Paris.",
    "Why is the sky blue? Because air scatters blue light more than red light.",
    "user assistant system 0 1 2 3 4 5 6 7 8 9 a b c d e f g h i j k l m n o p q r s t u v w x y z",
]


def make_tokenizer(chat=True, vocab_size=400):
    """A byte-level BPE tokenizer trained on a few lines; with `chat`, ChatML turns that end in <|im_end|> = EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    eos = "<|im_end|>" if chat else "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos)
    if chat:
        fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        fast.chat_template = CHATML
    return fast


def make_model(directory, kind="llama", chat=True, seed=0, **config):
    """A random model of about 60,000 weights with its tokenizer in `directory`; returns the directory as text."""
    tokenizer = make_tokenizer(chat)
    torch.manual_seed(seed)
    if kind == "llama":
        settings = {
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
        }  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}, eos_token_id=tokenizer.eos_token_id))
    else:
        settings = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
        model = GPT2LMHeadModel(GPT2Config(**{**settings, **config}, eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def make_adapter(base, directory, kind="CAUSAL_LM", seed=0, **lora):
    """A random LoRA adapter with its tokenizer: CAUSAL_LM, as SFT leaves it, or SEQ_CLS with a scalar head."""
    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    if kind == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        fields["modules_to_save"] = ["score"]
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type=kind, **fields)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return str(directory)


def write_rows(path, rows):
    """Write rows as JSON Lines; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(script, *flags, code=0):
    """`script.main(flags)` in this process; returns (stdout, stderr). Its exit code has to be `code`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            script.main([str(flag) for flag in flags])
            found = 0
        except SystemExit as stop:
            found = stop.code
        except KeyboardInterrupt:
            found = 130
    assert found == code, f"exit code {found}\n{out.getvalue()[-2000:]}\n{err.getvalue()[-2000:]}"
    return out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def usual_verbosity():
    """README's snippets and the quickstart silence transformers, which then prints Trainer's logs another way."""
    transformers.logging.set_verbosity_warning()


@pytest.fixture
def float64(monkeypatch):
    """All that asks for float32 computes in float64 (scripts, trl, transformers, torch): there another order of
    additions changes nothing above 1e-9, on any processor."""
    single = torch.get_default_dtype()
    for table in (torch.storage._dtype_to_storage_type_map, torch.storage._storage_type_to_dtype_map):
        table()  # torch makes them once; made under the patch they would break every later torch.save
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.Module, "float", torch.nn.Module.double)
    # the kernel for experts knows no float64; what transformers does without it does
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *args: False)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(single)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def plain_llama(tmp_path_factory):
    """A Llama whose tokenizer has no chat template."""
    return make_model(tmp_path_factory.mktemp("plain_llama"), chat=False)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("gpt2"), kind="gpt2", chat=False)


@pytest.fixture(scope="session")
def sft():
    return importlib.import_module("training_sft")


@pytest.fixture(scope="session")
def reward():
    return importlib.import_module("training_reward_model")


@pytest.fixture(scope="session")
def rl():
    return importlib.import_module("training_rl")


@pytest.fixture(scope="session")
def merge():
    return importlib.import_module("merge_with_lora")


def pytest_collection_modifyitems(items):
    """What is compared in float64 compares numbers: .ci/run runs it a second time as on another processor."""
    for item in items:
        if "float64" in item.fixturenames:
            item.add_marker(pytest.mark.numerical)
