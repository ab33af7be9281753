"""Merging: every kind of adapter against PEFT, what is refused, what is written; a kill leaves nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, run
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FalconH1Config,
    Mamba2Config,
    MixtralConfig,
)

IDS = torch.tensor([[5, 9, 33, 70, 120, 7], [8, 8, 51, 6, 300, 44]])


def load(path, adapter=None, task="CAUSAL_LM", dtype=None):
    """A model, with an adapter on it; in the default type of torch."""
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    extra = {"num_labels": 1, "pad_token_id": 0} if task == "SEQ_CLS" else {}
    model = auto.from_pretrained(path, dtype=dtype or torch.get_default_dtype(), **extra)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def make_adapter(directory, base, config=LoraConfig, task="CAUSAL_LM", scale=1.0, rows=None, **settings):
    """An adapter with random weights, as PEFT saves it; on a model with `rows` embeddings, if given."""
    model = load(base, task=task)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if config is LoraConfig:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    model = get_peft_model(model, config(task_type=task, **settings))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data += 0.05 * scale * torch.randn_like(weight) * (20 if "lora_embedding_A" in name else 1)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def merge_into(merge, adapter, output, *flags):
    """Runs the command; returns (run.json, standard output)."""
    out, _ = run(merge, "--adapter_path", adapter, "--output_dir", output, *flags)
    return json.loads((output / "run.json").read_text(encoding="utf-8")), out


def edit_json(path, **changes):
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(old | changes), encoding="utf-8")


def assert_same(merged, expected, rtol=1e-12):
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=rtol, atol=rtol, msg=name)


KINDS = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"layers.0.self_attn.v_proj": 3}},
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_rslora": True}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "bias of lora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_as_in_peft(merge, float64, tmp_path, monkeypatch, kind):
    """Every tensor is PEFT's own merge, also where a matrix is summed in many blocks."""
    monkeypatch.setattr(merge, "BLOCK", 100)
    family, settings = KINDS[kind]
    base = make_model(tmp_path / "base", family, chat=family == "llama")
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    _, out = merge_into(merge, adapter, tmp_path / "merged")
    assert ("merged by PEFT" in out) == ("dora" in kind)
    merged, unchanged = load(tmp_path / "merged").state_dict(), load(base).state_dict()
    assert any(not torch.equal(weight, unchanged[name]) for name, weight in merged.items())
    assert_same(merged, load(base, adapter).merge_and_unload().state_dict())


TIED = {
    "lora on the embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "lora on the head": {"target_modules": ["lm_head"]},
    "lora on both": {"target_modules": ["lm_head", "embed_tokens"]},
    "dora on the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "a saved embedding": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "a saved head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "both adapted alike": {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
    "some tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [5, 9, 300]},
    "neither": {"target_modules": ["v_proj"]},
    "neither, dora": {"target_modules": ["v_proj"], "use_dora": True},
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_come_apart_only_where_the_adapter_parts_them(merge, float64, tmp_path, kind):
    """The logits are those of the unmerged model (PEFT's own merge would change the embedding and the head alike)."""
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, **TIED[kind])
    merge_into(merge, adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(load(base, adapter)), rtol=1e-9, atol=1e-9)
    tied = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors"))
    assert tied or kind not in ("neither", "neither, dora", "some tokens")


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("rows", [420, 360])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"use_dora": True}])
def test_a_vocabulary_that_the_training_has_resized(merge, float64, tmp_path, tie, rows, settings):
    base = make_model(tmp_path / "base", tie_word_embeddings=tie)
    adapter = make_adapter(tmp_path / "adapter", base, rows=rows, target_modules=["v_proj"], **settings)
    merge_into(merge, adapter, tmp_path / "merged", "--verify")
    expected = load(base)
    expected.resize_token_embeddings(rows, mean_resizing=False)
    expected = PeftModel.from_pretrained(expected, adapter).eval()
    merged = load(tmp_path / "merged")
    assert merged.config.vocab_size == merged.lm_head.weight.shape[0] == rows
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_model_keeps_its_head(merge, float64, tmp_path, family):
    """The head comes from the adapter, the head of the language model goes, and no text ends with the padding token."""
    base = make_model(tmp_path / "base", family, chat=family == "llama")
    settings = {} if family == "llama" else {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = make_adapter(tmp_path / "adapter", base, task="SEQ_CLS", **settings)
    run_json, _ = merge_into(merge, adapter, tmp_path / "merged", "--verify")
    merged = load(tmp_path / "merged", task="SEQ_CLS")
    assert_same(merged.state_dict(), load(base, adapter, task="SEQ_CLS").merge_and_unload().state_dict())
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [type(merged).__name__] and len(config["id2label"]) == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    pads_with_eos = tokenizer.pad_token == tokenizer.eos_token  # a classifier would pass over it
    assert config.get("pad_token_id") == (None if pads_with_eos else tokenizer.pad_token_id)
    assert not any("lm_head" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    assert run_json["metrics"]["distance"] < 1e-9 < run_json["metrics"]["adapter_changes"]


FAMILIES = {
    "mamba2": Mamba2Config(
        vocab_size=375, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8
    ),
    "falcon-h1": FalconH1Config(
        vocab_size=375, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8,
    ),
    "mixtral": MixtralConfig(
        vocab_size=375, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.1,
    ),
}  # fmt: skip
OF_FAMILIES = {
    "mamba2": ("mamba2", {"target_modules": ["in_proj"]}),
    "falcon-h1": ("falcon-h1", {"target_modules": ["q_proj", "in_proj", "gate_proj"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("kind", OF_FAMILIES)
def test_families_with_odd_configs_and_fused_weights(merge, float64, tmp_path, kind):
    """Infinity in the config of a state-space model; experts that transformers fuses when it loads them."""
    family, settings = OF_FAMILIES[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **settings)
    _, out = merge_into(merge, adapter, tmp_path / "merged")
    assert ("merged by PEFT" in out) == (kind == "experts")
    assert_same(
        load(tmp_path / "merged").state_dict(), load(tmp_path / "base", adapter).merge_and_unload().state_dict()
    )
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == stored.keys()


OTHERS = {
    "loha": (LoHaConfig, {"r": 4, "alpha": 8, "target_modules": ["q_proj"], "init_weights": False}),
    "tokens": (LoraConfig, {"trainable_token_indices": [5, 9], "target_modules": ["q_proj"]}),
    "pissa": (LoraConfig, {"init_lora_weights": "pissa", "target_modules": ["q_proj"]}),
    "bias of B": (LoraConfig, {"lora_bias": True, "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_kinds_go_through_peft_with_a_line(merge, tmp_path, kind):
    base = make_model(tmp_path / "base", attention_bias=True)
    config, settings = OTHERS[kind]
    adapter = make_adapter(tmp_path / "adapter", base, config, **settings)
    _, out = merge_into(merge, adapter, tmp_path / "merged")
    assert "merged by PEFT" in out
    expected = logits(load(base, adapter))
    eps = torch.finfo(torch.float32).eps  # PiSSA's start is a decomposition, which is done in float32
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 1000 * eps * expected.abs().max()


@pytest.fixture(scope="module")
def llama_bf16(llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bf16")
    shutil.copytree(llama, directory, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_the_float32_sum_is_rounded_once(merge, llama_bf16, tmp_path, settings, dtype):
    """Half a unit in the last place from the exact sum, and what float32 itself may be off."""
    adapter = make_adapter(tmp_path / "adapter", llama_bf16, **settings)
    merge_into(merge, adapter, tmp_path / "merged", "--dtype", dtype)
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == kind
    exact = load(llama_bf16, adapter, dtype=torch.float64).double().merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert weight.dtype == kind
        allowed = exact[name].abs() * torch.finfo(kind).eps / 2 + 16 * torch.finfo(torch.float32).eps
        assert ((weight.double() - exact[name]).abs() <= allowed).all(), name


def test_what_does_not_fit_into_float16_is_refused(merge, llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama, lora_alpha=1e7)
    flags = ("--adapter_path", adapter, "--output_dir", tmp_path / "merged", "--dtype", "float16")
    _, err = run(merge, *flags, code=2)
    assert "NaN or infinity in model.layers" in err and "torch.float16" in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_files_of_the_base_and_of_the_result_may_be_many(merge, llama, tmp_path):
    load(llama).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base")
    merge_into(merge, adapter, tmp_path / "one")
    merge_into(merge, adapter, tmp_path / "many", "--max_shard_size", "60KB")
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 63_000 for file in files)
    assert_same(load(tmp_path / "many").state_dict(), load(tmp_path / "one").state_dict(), rtol=0)


def test_names_without_the_prefix_of_the_model(merge, float64, tmp_path):
    """The first GPT-2 checkpoints say h.0.attn where the model says transformer.h.0.attn, and hold masks."""
    base = make_model(tmp_path / "base", "gpt2", chat=False)
    make_adapter(tmp_path / "CAUSAL_LM", base, target_modules=["c_attn"])
    make_adapter(tmp_path / "SEQ_CLS", base, task="SEQ_CLS", target_modules=["c_attn"])
    expected = {task: logits(load(base, tmp_path / task, task)) for task in ("CAUSAL_LM", "SEQ_CLS")}
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for task, value in expected.items():
        merge_into(merge, tmp_path / task, tmp_path / f"merged {task}")
        torch.testing.assert_close(logits(load(tmp_path / f"merged {task}", task=task)), value, rtol=1e-9, atol=1e-9)


def test_a_base_in_the_hub_cache(merge, llama, tmp_path, monkeypatch):
    import huggingface_hub.constants

    adapter = make_adapter(tmp_path / "adapter", llama)
    repo = tmp_path / "cache" / "models--someone--llama"
    shutil.copytree(llama, repo / "snapshots" / ("01234567" * 5))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("01234567" * 5, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    merge_into(merge, adapter, tmp_path / "expected")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/llama")
    assert merge_into(merge, adapter, tmp_path / "merged")[0]["base_model"] == "someone/llama"
    assert_same(load(tmp_path / "merged").state_dict(), load(tmp_path / "expected").state_dict(), rtol=0)


def test_everything_that_belongs_to_a_model_comes_along(merge, llama, tmp_path):
    """Tokenizer, template and stop ids of the adapter's directory; run.json of an earlier version is read."""
    adapter = make_adapter(tmp_path / "adapter", llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    edit_json(adapter / "generation_config.json", eos_token_id=[2, 7], temperature=0.5, do_sample=False)
    edit_json(adapter / "run.json", stage="sft", prompt_format="chat", chat_template_hash="12", base_hash={"x": "y"})
    for output, flags in (("merged", ()), ("whole", ("--verify",))):
        result, _ = merge_into(merge, adapter, tmp_path / output, *flags)
        assert (result["stage"], result["parent_stage"], result["parent"]) == ("merge", "sft", str(adapter))
        assert (result["prompt_format"], result["chat_template_hash"], result["base_model"]) == ("chat", "12", llama)
        assert result["versions"]["scripts"] == 2
        assert AutoTokenizer.from_pretrained(tmp_path / output).chat_template == tokenizer.chat_template
        assert load(tmp_path / output).generation_config.eos_token_id == [2, 7]
        edit_json(adapter / "adapter_config.json", use_dora=False, ensure_weight_tying=True)  # the second time in PEFT


def test_readers_built_on_transformers_4_and_gguf_find_what_they_know(merge, tmp_path):
    """transformers 5 saves rope_theta, the type and the tokenizer under other names, and no tokenizer.model; transformers
    4.57 took a rope_theta of 10000 for this model, and no tokenizer. Code beside the base is not asked for."""
    base = Path(make_model(tmp_path / "base"))
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    older = {"rope_theta": 500000.0, "rope_scaling": {**rope, "rope_type": "llama3"}, "torch_dtype": "float32"}
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    code = {"AutoConfig": "configuration_llama.LlamaConfig"}
    (base / "config.json").write_text(json.dumps({**config, **older, "auto_map": code}), encoding="utf-8")
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    adapter, merged = make_adapter(tmp_path / "adapter", base), tmp_path / "merged"
    merge_into(merge, adapter, merged, "--dtype", "bfloat16")
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in older} == {**older, "torch_dtype": "bfloat16"}
    assert config["dtype"] == "bfloat16" and "auto_map" not in config
    names = json.loads((merged / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert names["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in names
    assert (merged / "tokenizer.model").read_bytes() == b"sentencepiece"
    added = {
        int(number): token["content"] for number, token in names["added_tokens_decoder"].items() if token["special"]
    }
    assert added == {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}  # the sentencepiece file has none of them
    found, expected = (AutoTokenizer.from_pretrained(place) for place in (merged, base))
    assert found.all_special_ids == expected.all_special_ids and found.get_vocab() == expected.get_vocab()
    merge_into(merge, adapter, merged, "--dtype", "float32", "--overwrite_output_dir")
    expected = logits(load(base, adapter))
    room = 1000 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (logits(load(merged)) - expected).abs().max() <= room


def test_a_model_of_text_and_images_keeps_the_older_names_of_its_text(merge, tmp_path):
    """Gemma 3 from 4B on: they stand in text_config."""
    for place in ("draft", "base"):
        (tmp_path / place).mkdir()
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    saved = {"dtype": "bfloat16", "text_config": {"rope_parameters": {}}}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"text_config": older}), encoding="utf-8")
    merge.add_older_names(tmp_path / "draft", tmp_path / "base")
    config = json.loads((tmp_path / "draft" / "config.json").read_text(encoding="utf-8"))
    assert config["text_config"] == {"rope_parameters": {}, **older} and config["torch_dtype"] == "bfloat16"


def test_a_tokenizer_without_tokenizer_json_keeps_its_added_tokens(merge, tmp_path):
    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    added = {"7": {"content": "<|im_end|>", "special": True}}
    place = tmp_path / "tokenizer_config.json"
    place.write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    merge.add_older_names(tmp_path, tmp_path)
    assert json.loads(place.read_text(encoding="utf-8"))["added_tokens_decoder"] == added


def forget_a_layer(weights, base):
    weights.update({name: weight for name, weight in base.items() if ".1." in name})


def zero_a_norm(weights, base):
    weights["model.norm.weight"][3] = 0


def exchange_two(weights, base):
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    weights[one], weights[other] = weights[other], weights[one]


def forget_the_adapter(weights, base):
    weights.update(base)


@pytest.mark.parametrize(
    ("corrupt", "dtype"),
    [
        (forget_a_layer, "float32"),
        (zero_a_norm, "float32"),
        (exchange_two, "float32"),
        (forget_the_adapter, "float32"),
        (forget_the_adapter, "bfloat16"),
    ],
)
def test_verify_catches_a_wrong_result_before_it_is_published(merge, llama, tmp_path, monkeypatch, corrupt, dtype):
    adapter = make_adapter(tmp_path / "adapter", llama)
    stored = load_file(f"{llama}/model.safetensors")

    def save(weights, *rest):
        corrupt(weights, {name: weight.to(weights[name].dtype) for name, weight in stored.items()})
        save_file(weights, *rest)

    monkeypatch.setattr(merge, "save_file", save)
    flags = ("--adapter_path", adapter, "--output_dir", tmp_path / "merged", "--dtype", dtype)
    _, err = run(merge, *flags, "--verify", code=2)
    assert "of what the adapter changes; nothing was saved" in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    run(merge, *flags)
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_verify_measures_what_the_adapter_changes(merge, llama_bf16, tmp_path, settings):
    """An adapter that changes less than rounding does passes, with a line."""
    adapter = make_adapter(tmp_path / "adapter", llama_bf16, **settings)
    metrics = merge_into(merge, adapter, tmp_path / "merged", "--verify")[0]["metrics"]
    assert 0 < metrics["distance"] < 0.1 * metrics["adapter_changes"]
    small = make_adapter(tmp_path / "small", llama_bf16, scale=1e-4, **settings)
    result, out = merge_into(merge, small, tmp_path / "of small", "--verify")
    assert result["metrics"]["distance"] > 0.5 * result["metrics"]["adapter_changes"]
    assert "changes less than rounding" in out


def spoil(kind, adapter, base):
    """Make an adapter or its base wrong; returns what the error should say."""
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    weights = load_file(adapter / "adapter_model.safetensors")
    if kind == "shape":
        weights[name] = torch.zeros(4, 48)
    elif kind == "layer":
        weights = {name.replace("layers.1", "layers.7"): weight for name, weight in weights.items()}
    elif kind == "half":
        del weights[name]
    elif kind == "nan":
        weights[name][0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    if kind == "no weights":
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    elif kind == "pickle":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
    elif kind == "quantized":
        edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    elif kind == "unknown":
        edit_json(base / "config.json", model_type="llamma")
    elif kind == "base is an adapter":
        (base / "config.json").rename(base / "adapter_config.json")
    elif kind == "no base":
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    elif kind == "base gone":
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="/no/such/model")
    elif kind == "task":
        edit_json(adapter / "adapter_config.json", task_type="TOKEN_CLS")


PROBLEMS = {
    "shape": "size mismatch.*q_proj",
    "layer": "does not fit the base model.*layers.7",
    "half": "does not fit the base model.*layers.1.self_attn.q_proj",
    "nan": "NaN or infinity in .*q_proj.weight",
    "no weights": "no adapter_model.safetensors",
    "pickle": "holds no model.safetensors",
    "quantized": "is quantized; see --base_model_path",
    "unknown": "llamma",
    "base is an adapter": "config.json",
    "no base": "names no base model; pass it as --base_model_path",
    "base gone": "\\(--base_model_path\\).*no/such/model does not exist",
    "task": "holds a TOKEN_CLS adapter",
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_what_does_not_fit_is_refused_in_one_line(merge, llama, tmp_path, kind):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(llama, base)
    make_adapter(adapter, base, target_modules=["q_proj", "v_proj"])
    spoil(kind, adapter, base)
    _, err = run(merge, "--adapter_path", adapter, "--output_dir", tmp_path / "merged", code=2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(PROBLEMS[kind], lines[0]), lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_that_was_trained_in_place_is_refused(merge, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base")
    digest = merge_into(merge, adapter, tmp_path / "merged")[0]["base_digest"]
    edit_json(adapter / "run.json", base_digest=digest)
    merge_into(merge, adapter, tmp_path / "again")
    model = load(llama)
    for weight in model.parameters():
        weight.data += 1e-4
    model.save_pretrained(tmp_path / "base")
    _, err = run(merge, "--adapter_path", adapter, "--output_dir", tmp_path / "no", code=2)
    assert "was trained on" in err
    merge_into(merge, adapter, tmp_path / "no", "--base_model_path", llama)


def test_the_output_directory_is_not_overwritten_by_chance(merge, llama, tmp_path):
    """Only a merged model is replaced, and of its directory only what the merge writes."""
    adapter = make_adapter(tmp_path / "run" / "final_checkpoint", llama)

    def refuse(adapter, output, *flags):
        return run(merge, "--adapter_path", adapter, "--output_dir", output, *flags, code=2)[1]

    assert "is no adapter" in refuse(llama, tmp_path / "merged")
    assert "final_checkpoint" in refuse(tmp_path / "run", tmp_path / "merged")
    assert "is in use" in refuse(adapter, tmp_path / "run")
    assert "is in use" in refuse(adapter, tmp_path / "run", "--overwrite_output_dir")
    assert "is in use" in refuse(adapter, llama, "--overwrite_output_dir")
    assert "should be like 500MB" in refuse(adapter, tmp_path / "merged", "--max_shard_size", "big")
    assert "--help" in refuse(adapter, tmp_path / "merged", "--dtyp", "float16")
    merge_into(merge, adapter, tmp_path / "merged", "--max_shard_size", "60KB")
    assert "is in use" in refuse(adapter, tmp_path / "merged")
    (tmp_path / "merged" / "notes.txt").write_text("mine", encoding="utf-8")
    merge_into(merge, adapter, tmp_path / "merged", "--overwrite_output_dir")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"notes.txt", "model.safetensors"} <= names and not any("-of-" in name for name in names)
    load(tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


def test_nothing_of_an_earlier_merge_speaks_for_the_new_one(merge, llama, plain_llama, tmp_path):
    """The chat template of a model that had one, over one that has none."""
    for base in (llama, plain_llama):
        adapter = make_adapter(tmp_path / base.rpartition("/")[2], base)
        merge_into(merge, adapter, tmp_path / "merged", "--overwrite_output_dir")
        assert (AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template is None) == (base == plain_llama)


def test_a_merged_model_with_several_chat_templates_is_replaced(merge, llama, tmp_path):
    """Those beside the default lie in a directory of their own (Hermes 3, Command R)."""
    adapter = make_adapter(tmp_path / "adapter", llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for names in (["tool_use", "rag"], ["tool_use"]):
        tokenizer.chat_template = dict.fromkeys(["default", *names], "{{ messages[0]['content'] }}")
        shutil.rmtree(adapter / "additional_chat_templates", ignore_errors=True)
        tokenizer.save_pretrained(adapter)
        merge_into(merge, adapter, tmp_path / "merged", "--overwrite_output_dir")
        assert sorted(AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template) == sorted(["default", *names])


KILLER = """
import os, random, signal, sys, time
import merge_with_lora as merge

def start():
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            merge.main(["--adapter_path", sys.argv[1], "--output_dir", sys.argv[2]])
        finally:
            os._exit(0)
    return pid

begin = time.monotonic()
os.waitpid(start(), 0)
length = time.monotonic() - begin
os.rename(sys.argv[2], sys.argv[2] + "_whole")
random.seed(0)
for i in range(8):
    pid = start()
    time.sleep(length * random.random())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if os.path.exists(sys.argv[2]):
        os.rename(sys.argv[2], f"{sys.argv[2]}_{i}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_merge_leaves_nothing_in_the_output_directory(merge, tmp_path):
    base = make_model(tmp_path / "base", hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    adapter = make_adapter(tmp_path / "adapter", base)
    command = [sys.executable, "-c", KILLER, str(adapter), str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    expected = load(tmp_path / "out_whole").state_dict()
    survived = list(tmp_path.glob("out_?"))
    assert len(survived) < 6
    for path in survived:
        assert_same(load(path).state_dict(), expected, rtol=0)
    merge_into(merge, adapter, tmp_path / "out")  # what a killed merge left beside it is no obstacle
    assert not (tmp_path / "out.partial").exists()


def test_the_script_runs_alone_from_an_empty_directory(llama, tmp_path):
    make_adapter(tmp_path / "adapter", llama)
    (tmp_path / "empty").mkdir()
    shutil.copy(ROOT / "merge_with_lora.py", tmp_path / "empty")
    command = [
        sys.executable,
        "merge_with_lora.py",
        "--adapter_path",
        "../adapter",
        "--output_dir",
        "merged",
        "--verify",
    ]
    result = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "the merged model is" in result.stdout and "saved merged" in result.stdout
    load(tmp_path / "empty" / "merged")
