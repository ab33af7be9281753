"""Merging: every kind of adapter against PEFT, tensor by tensor; what does not fit is refused; a kill leaves nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

IDS = torch.tensor([[5, 9, 33, 70, 120, 7], [8, 8, 51, 6, 300, 44]])


def make_adapter(directory, base, config=LoraConfig, task="CAUSAL_LM", dtype=torch.float32, seed=0, **settings):
    """An adapter with random weights, as PEFT saves it; returns the directory as text."""
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    extra = {"num_labels": 1} if task == "SEQ_CLS" else {}
    model = auto.from_pretrained(base, dtype=dtype, **extra)
    if config is LoraConfig:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    model = get_peft_model(model, config(task_type=task, **settings))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight) * (20 if "lora_embedding_A" in name else 1)
    model.save_pretrained(directory)
    return str(directory)


def load(path, adapters=(), task="CAUSAL_LM", merge=False, dtype=torch.float32):
    """A model with adapters on it; with `merge`, merged by PEFT."""
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    extra = {"num_labels": 1, "pad_token_id": 0} if task == "SEQ_CLS" and adapters else {}
    model = auto.from_pretrained(path, dtype=dtype, **extra)
    for i, adapter in enumerate(adapters):
        model = PeftModel.from_pretrained(model, adapter)
        if merge or i < len(adapters) - 1:
            model = model.merge_and_unload()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def run(merge, adapter, output, *flags):
    merge.main(["--adapter_path", str(adapter), "--output_dir", str(output), *flags])
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def llama_bf16(llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bf16")
    shutil.copytree(llama, directory, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(directory)
    return str(directory)


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
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding rslora": ("llama", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "bias of lora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_as_in_peft(merge, llama, gpt2, tmp_path, kind):
    family, settings = KINDS[kind]
    base = {"llama": llama, "gpt2": gpt2}[family]
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    verification = run(merge, adapter, tmp_path / "merged")["verification"]
    expected = load(base, [adapter], merge=True).state_dict()
    merged = load(tmp_path / "merged").state_dict()
    unchanged = load(base).state_dict()
    assert merged.keys() == expected.keys()
    assert any(not torch.equal(merged[name], unchanged[name]) for name in merged)
    for name in expected:  # DoRA's norms are added up in another order
        torch.testing.assert_close(merged[name], expected[name], rtol=2e-6 if "dora" in kind else 0, atol=0, msg=name)
    assert verification["largest_difference"] <= verification["allowed"] < 1e-3


@pytest.mark.parametrize("kind", ["plain", "dora", "embedding", "saved modules", "conv1d", "conv1d dora"])
def test_how_far_the_adapter_moves_the_logits(merge, llama, gpt2, tmp_path, kind):
    """The base model goes through the same sweep as base + adapter, and is measured on the first text."""
    family, settings = KINDS[kind]
    base = {"llama": llama, "gpt2": gpt2}[family]
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    measured = run(merge, adapter, tmp_path / "merged")["verification"]["adapter_moves"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(merge.TEXT)["input_ids"][:8]])
    with torch.no_grad():
        real = (load(base, [adapter])(ids).logits - load(base)(ids).logits).abs().max().item()
    assert measured == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_the_errors_of_rounding_are_those_of_a_changed_matrix(merge, kind):
    torch.manual_seed(0)
    module, x = kind(6, 5), torch.randn(3, 2, 5 if kind is Conv1D else 6)
    weight, bias = module.weight.detach().clone(), module.bias.detach()
    apart = merge.Apart(torch.zeros(3, 2), 1)
    module.weight = merge.Lazy(weight.shape, lambda begin=0, end=None: weight[begin:end], apart, 0.1)
    with torch.no_grad():
        found = module(x)
    apart.generator.manual_seed(0)
    columns, rows = apart.draw_signs(x.shape[2]), apart.draw_signs(found.shape[2])
    assert {*rows.tolist(), *columns.tolist()} == {-1, 1}
    matrix = weight if kind is Conv1D else weight.T
    changed = matrix * (1 + 0.1 * columns[:, None] * rows)
    torch.testing.assert_close(found, torch.cat([x[:2] @ matrix, x[2:] @ changed]) + bias)


TIED = {
    "lora on the embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "lora on the head": {"target_modules": ["lm_head"]},
    "a saved embedding": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "a saved head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "neither": {"target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_are_untied_where_the_adapter_made_them_differ(merge, tied_llama, tmp_path, kind):
    adapter = make_adapter(tmp_path / "adapter", tied_llama, **TIED[kind])
    run(merge, adapter, tmp_path / "merged")
    # Against the unmerged model: PEFT's own merge changes the embedding and the head alike.
    expected = logits(load(tied_llama, [adapter]))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] == (kind == "neither")
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (kind != "neither")


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}])
def test_bfloat16_is_the_float32_sum_rounded_once(merge, llama_bf16, tmp_path, settings):
    adapter = make_adapter(tmp_path / "adapter", llama_bf16, **settings)
    verification = run(merge, adapter, tmp_path / "merged")["verification"]
    exact = load(llama_bf16, [adapter], merge=True).state_dict()
    peft = load(llama_bf16, [adapter], merge=True, dtype=torch.bfloat16).state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        ulp = torch.exp2(torch.floor(torch.log2(exact[name].abs().clamp(min=1e-30))) - 7)
        error = (weight.float() - exact[name]).abs()
        assert (error / ulp).max() <= 0.5 + 1e-3, name
        assert error.max() <= (peft[name].float() - exact[name]).abs().max() * 1.0001, name
    assert 0 < verification["largest_difference"] <= verification["allowed"]


def test_dtype_changes_every_tensor(merge, llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama)
    run(merge, adapter, tmp_path / "merged", "--dtype", "float16")
    exact = load(llama, [adapter], merge=True).state_dict()
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(weight, exact[name].half()), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float16


def test_what_does_not_fit_into_float16_is_refused(merge, llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama, lora_alpha=1e7)
    with pytest.raises(merge.UserError, match="proj.weight would hold NaN or infinity in torch.float16"):
        run(merge, adapter, tmp_path / "merged", "--dtype", "float16")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_model_keeps_its_head(merge, llama, gpt2, tmp_path, family):
    base = {"llama": llama, "gpt2": gpt2}[family]
    settings = {} if family == "llama" else {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = make_adapter(tmp_path / "adapter", base, task="SEQ_CLS", **settings)
    run(merge, adapter, tmp_path / "merged")
    merged = load(tmp_path / "merged", task="SEQ_CLS")
    expected = load(base, [adapter], task="SEQ_CLS", merge=True).state_dict()
    assert merged.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.state_dict().items())
    assert merged.config.num_labels == 1
    assert merged.config.architectures == [type(merged).__name__]
    assert merged.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id is not None
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_chain_of_adapters_is_followed_to_the_full_model(merge, llama, tmp_path):
    first = make_adapter(tmp_path / "first", llama, use_dora=True)
    run(merge, first, tmp_path / "half")
    second = make_adapter(tmp_path / "second", tmp_path / "half", task="SEQ_CLS", seed=1)
    edit_json(tmp_path / "second" / "adapter_config.json", base_model_name_or_path=first)
    run(merge, second, tmp_path / "merged")
    expected = load(tmp_path / "half", [second], task="SEQ_CLS", merge=True).state_dict()
    for name, weight in load(tmp_path / "merged", task="SEQ_CLS").state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=2e-6, atol=0, msg=name)
    # The full model may have moved; the adapter between them stays in the chain.
    shutil.copytree(llama, tmp_path / "moved")
    edit_json(tmp_path / "first" / "adapter_config.json", base_model_name_or_path="/gone")
    with pytest.raises(merge.UserError, match="/gone.*does not exist"):
        run(merge, second, tmp_path / "again")
    run(merge, second, tmp_path / "again", "--base_model_path", str(tmp_path / "moved"))
    assert same_weights(tmp_path / "again", tmp_path / "merged")


@pytest.mark.parametrize("kind", ["embedding dora", "conv1d dora"])
def test_a_chain_on_an_adapter_whose_norms_run_over_all_rows(merge, llama, gpt2, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(merge, "BLOCK", 64)  # the verification reads the first adapter's sum in blocks, or row by row
    family, settings = KINDS[kind]
    base = {"llama": llama, "gpt2": gpt2}[family]
    first = make_adapter(tmp_path / "first", base, **settings)
    run(merge, first, tmp_path / "half")
    second = make_adapter(tmp_path / "second", tmp_path / "half", seed=1, **(settings | {"use_dora": False}))
    edit_json(tmp_path / "second" / "adapter_config.json", base_model_name_or_path=first)
    run(merge, second, tmp_path / "merged")
    expected = load(tmp_path / "half", [second], merge=True).state_dict()
    for name, weight in load(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=2e-6, atol=1e-7, msg=name)


def test_sharded_bases_and_outputs(merge, llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base")
    run(merge, adapter, tmp_path / "merged", "--max_shard_size", "60KB")
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 63_000 for file in files)
    expected = load(llama, [adapter], merge=True).state_dict()
    merged = load(tmp_path / "merged").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())


def test_a_base_in_the_hub_cache(merge, llama, tmp_path, monkeypatch):
    import huggingface_hub.constants

    adapter = make_adapter(tmp_path / "adapter", llama)
    repo = tmp_path / "cache" / "models--someone--llama"
    shutil.copytree(llama, repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567", encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="someone/llama")
    assert run(merge, adapter, tmp_path / "merged")["base_model"] == "someone/llama"
    expected = load(llama, [adapter], merge=True).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in load(tmp_path / "merged").state_dict().items())
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="someone/other")
    with pytest.raises(merge.UserError, match="someone/other is not a directory here"):
        run(merge, adapter, tmp_path / "again")


def test_names_without_the_prefix_of_the_model(merge, gpt2, tmp_path):
    """The first GPT-2 checkpoints say h.0.attn where the model says transformer.h.0.attn."""
    shutil.copytree(gpt2, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)  # they also have the masks
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for task in ("CAUSAL_LM", "SEQ_CLS"):
        adapter = make_adapter(tmp_path / task, tmp_path / "base", task=task, target_modules=["c_attn", "wte"])
        run(merge, adapter, tmp_path / f"merged {task}")
        merged = load(tmp_path / f"merged {task}", task=task)
        expected = load(gpt2, [adapter], task=task)
        torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-5)


def test_experts_stored_one_by_one(merge, llama, tmp_path):
    """transformers joins a Mixtral's experts when it loads them. Adapters on other modules stream past them, adapters of
    earlier versions on single experts stream too, and what only exists joined is left to PEFT."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    expert = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    assert expert in stored
    adapter = make_adapter(tmp_path / "attention", tmp_path / "base", target_modules=["q_proj"])
    run(merge, adapter, tmp_path / "merged attention")
    expected = logits(load(tmp_path / "base", [adapter]))
    torch.testing.assert_close(logits(load(tmp_path / "merged attention")), expected, rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "merged attention" / "model.safetensors").keys() == stored.keys()

    factors = load_file(tmp_path / "attention" / "adapter_model.safetensors")
    factors[f"base_model.model.{expert.removesuffix('.weight')}.lora_A.weight"] = torch.randn(4, 32)
    factors[f"base_model.model.{expert.removesuffix('.weight')}.lora_B.weight"] = torch.randn(16, 4)
    save_file(factors, tmp_path / "attention" / "adapter_model.safetensors")
    run(merge, adapter, tmp_path / "merged expert", "--no_verify")
    merged = load_file(tmp_path / "merged expert" / "model.safetensors")
    delta = (
        factors[f"base_model.model.{expert.removesuffix('.weight')}.lora_B.weight"]
        @ (factors[f"base_model.model.{expert.removesuffix('.weight')}.lora_A.weight"])
    )
    assert torch.equal(merged[expert], stored[expert] + 2 * delta)

    adapter = make_adapter(
        tmp_path / "joined", tmp_path / "base", target_modules=[], target_parameters=["experts.gate_up_proj"]
    )
    run(merge, adapter, tmp_path / "merged joined")
    expected = logits(load(tmp_path / "base", [adapter]))
    torch.testing.assert_close(logits(load(tmp_path / "merged joined")), expected, rtol=1e-4, atol=1e-5)


OTHERS = {
    "loha": (LoHaConfig, {"r": 4, "alpha": 8, "target_modules": ["q_proj"], "init_weights": False}),
    "tokens": (LoraConfig, {"trainable_token_indices": [5, 9], "target_modules": ["q_proj"]}),
    "pissa": (LoraConfig, {"init_lora_weights": "pissa", "target_modules": ["q_proj"]}),
    "bias of B": (LoraConfig, {"lora_bias": True, "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_streamed_goes_through_peft_with_a_line(merge, tmp_path, capsys, kind):
    base = make_model(tmp_path / "base", attention_bias=True)
    config, settings = OTHERS[kind]
    adapter = make_adapter(tmp_path / "adapter", base, config, **settings)
    verification = run(merge, adapter, tmp_path / "merged")["verification"]
    assert "merged by PEFT" in capsys.readouterr().out
    expected = load(base, [adapter])
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(expected), rtol=1e-4, atol=1e-5)
    assert verification["largest_difference"] <= verification["allowed"]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_line_for_a_base_trained_in_4_or_8_bit(merge, tmp_path, capsys, bits):
    base = make_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    adapter = make_adapter(tmp_path / "adapter", base)
    arguments = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"arguments": arguments}), encoding="utf-8")
    measured = run(merge, adapter, tmp_path / "merged")["verification"]["difference_from_quantized"]
    line = f"trained on the base model in {bits} bit, merged into it in full precision: the logits differ, on the same texts"
    assert line in capsys.readouterr().out
    # The same difference on the model that bitsandbytes itself makes.
    double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **(double if bits == 4 else {}))
    trained = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map={"": "cpu"})
    trained = PeftModel.from_pretrained(trained, adapter).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(merge.TEXT)["input_ids"][:32]).view(4, 8)
    with torch.no_grad():
        real = (trained(ids).logits.float() - load(tmp_path / "merged")(ids).logits).abs().max().item()
    # In 8 bit the activations are quantized too.
    assert 0.9 * real < measured < 1.1 * real if bits == 4 else 0 < measured < real


def test_everything_that_belongs_to_a_model_comes_along(merge, llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    earlier = {"stage": "sft", "prompt_format": "chat", "chat_template_hash": "12", "base_hash": {}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(earlier), encoding="utf-8")
    result = run(merge, adapter, tmp_path / "merged")
    assert (result["stage"], result["parent_stage"], result["parent"]) == ("merge", "sft", adapter)
    assert (result["prompt_format"], result["chat_template_hash"], result["base_model"]) == ("chat", "12", llama)
    assert "base_hash" not in result
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == tokenizer.chat_template
    # What ends an answer for the base model still does, and so does the end that the adapter was trained with.
    generation = load(tmp_path / "merged").generation_config
    assert generation.eos_token_id == [tokenizer.eos_token_id, AutoTokenizer.from_pretrained(llama).eos_token_id]


def forget_a_layer(weights, base):
    weights.update({name: weight for name, weight in base.items() if ".1.mlp." in name})


def zero_a_norm(weights, base):
    weights["model.norm.weight"][3] = 0


def exchange_two(weights, base):
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    weights[one], weights[other] = weights[other], weights[one]


def exchange_rows(weights, base):
    rows = weights["model.layers.1.self_attn.v_proj.weight"]
    rows[:2] = rows[:2].flip(0)


def scale_wrongly(weights, base):
    for name, weight in weights.items():
        weight += (0.1 * (weight.float() - base[name].float())).to(weight.dtype)


@pytest.mark.parametrize("corrupt", [forget_a_layer, zero_a_norm, exchange_two, exchange_rows, scale_wrongly])
def test_a_corrupted_result_is_caught_and_not_published(merge, llama_bf16, tmp_path, monkeypatch, corrupt):
    adapter = make_adapter(tmp_path / "adapter", llama_bf16)
    write_weights = merge.write_weights

    def write_and_corrupt(folder, *rest):
        write_weights(folder, *rest)
        weights = load_file(folder / "model.safetensors")
        corrupt(weights, load_file(f"{llama_bf16}/model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "write_weights", write_and_corrupt)
    with pytest.raises(merge.UserError, match="differs from base . adapter.*nothing was saved"):
        run(merge, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    run(merge, adapter, tmp_path / "merged", "--no_verify")
    assert (tmp_path / "merged" / "config.json").is_file()


def spoil(kind, adapter, base):
    """Make an adapter or its base wrong; returns what the error should say."""
    config, name = adapter / "adapter_config.json", "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    weights = load_file(adapter / "adapter_model.safetensors")
    message = "q_proj"
    if kind == "shape":
        weights[name] = torch.zeros(4, 48)
        message = r"model.layers.1.self_attn.q_proj.weight is \(32, 32\) in the base model, \(32, 48\) in the adapter"
    elif kind == "vocabulary":
        weights["base_model.model.lm_head.weight"] = torch.zeros(500, 32)
        message = r"lm_head.weight is \(375, 32\) in the base model, \(500, 32\) in the adapter"
    elif kind == "layer":
        weights = {name.replace("layers.1", "layers.7"): weight for name, weight in weights.items()}
        message = "model.layers.7.self_attn.q_proj.weight is missing in the base model"
    elif kind == "half":
        del weights[name]
        message = "model.layers.1.self_attn.q_proj has only lora_B"
    elif kind == "rank":
        weights[name] = torch.zeros(6, 32)
        message = "the LoRA factors of model.layers.1.self_attn.q_proj do not fit each other"
    elif kind == "nan":
        weights[name][0, 0] = float("nan")
        message = "model.layers.1.self_attn.q_proj.weight would hold NaN"
    save_file(weights, adapter / "adapter_model.safetensors")
    if kind == "no weights":
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        message = "holds no adapter_model.safetensors; weights in other formats"
    elif kind == "cut adapter":
        os.truncate(adapter / "adapter_model.safetensors", 5000)
        message = "adapter_model.safetensors is not a complete safetensors file"
    elif kind == "cut base":
        os.truncate(base / "model.safetensors", 50_000)
        message = "model.safetensors is not a complete safetensors file"
    elif kind == "pickle":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
        message = "holds no model.safetensors; weights in other formats"
    elif kind == "quantized":
        edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        message = "is stored quantized; pass the full-precision one as --base_model_path"
    elif kind == "config":
        edit_json(base / "config.json", intermediate_size=72)
        message = "weights do not have the shapes of its config.json: model.layers.0.mlp.down_proj.weight"
    elif kind == "unknown":
        edit_json(base / "config.json", model_type="llamma")
        message = "the config of .* cannot be loaded"
    elif kind == "no base":
        edit_json(config, base_model_name_or_path=None)
        message = "names no base model; pass it as --base_model_path"
    elif kind == "base gone":
        edit_json(config, base_model_name_or_path="/no/such/model")
        message = "--base_model_path names another.*no/such/model does not exist"
    elif kind == "circle":
        edit_json(config, base_model_name_or_path=str(adapter))
        message = "is its own base model"
    elif kind == "task":
        edit_json(config, task_type="TOKEN_CLS")
        message = "is a TOKEN_CLS adapter"
    elif kind == "other base":
        hashes = {"model.embed_tokens.weight": "0" * 16}
        (adapter / "run.json").write_text(json.dumps({"base_hash": hashes}), encoding="utf-8")
        message = "is not the one that the adapter was trained on: model.embed_tokens.weight"
    elif kind == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["one", "more"])
        tokenizer.save_pretrained(adapter)
        message = "the adapter's tokenizer has 377 tokens, the base model embeddings for 375"
    return message


PROBLEMS = (
    "shape, vocabulary, layer, half, rank, nan, no weights, cut adapter, cut base, pickle, quantized, config, unknown, "
    "no base, base gone, circle, task, other base, tokenizer"
)


@pytest.mark.parametrize("kind", PROBLEMS.split(", "))
def test_what_does_not_fit_is_refused_by_name(merge, llama, tmp_path, kind):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(llama, base)
    make_adapter(adapter, base, target_modules=["q_proj", "v_proj"])
    with pytest.raises(merge.UserError, match=spoil(kind, adapter, base)):
        run(merge, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_base_of_the_training_is_recognized(merge, sft, llama, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "adapter", llama)
    hashes = sft.hash_base(llama)
    assert hashes
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"base_hash": hashes}), encoding="utf-8")
    run(merge, adapter, tmp_path / "merged")
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(merge.UserError, match="not the one that the adapter was trained on: lm_head.weight"):
        run(merge, adapter, tmp_path / "elsewhere", "--base_model_path", other)
    run(merge, adapter, tmp_path / "elsewhere", "--base_model_path", other, "--force")
    assert "was trained on: lm_head.weight" in capsys.readouterr().out


def test_the_output_directory_is_not_overwritten_by_chance(merge, llama, tmp_path):
    adapter = make_adapter(tmp_path / "run" / "final_checkpoint", llama)
    with pytest.raises(merge.UserError, match="a full model, not an adapter"):
        run(merge, llama, tmp_path / "merged")
    with pytest.raises(merge.UserError, match="holds neither.*did you mean .*final_checkpoint"):
        run(merge, tmp_path / "run", tmp_path / "merged")
    with pytest.raises(merge.UserError, match="not empty"):
        run(merge, adapter, tmp_path / "run")
    with pytest.raises(merge.UserError, match="holds no model"):
        run(merge, adapter, tmp_path / "run", "--overwrite_output_dir")
    with pytest.raises(merge.UserError, match="which is merged"):
        run(merge, adapter, merge.Path(llama), "--overwrite_output_dir")
    run(merge, adapter, tmp_path / "merged")
    with pytest.raises(merge.UserError, match="not empty"):
        run(merge, adapter, tmp_path / "merged")
    (tmp_path / "merged" / "stale.safetensors").write_bytes(b"")
    run(merge, adapter, tmp_path / "merged", "--overwrite_output_dir")
    assert not (tmp_path / "merged" / "stale.safetensors").exists()


def test_too_little_disk_space_is_foreseen(merge, llama, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "adapter", llama)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: merge.argparse.Namespace(free=2**20))
    with pytest.raises(merge.UserError, match="more than is free"):
        run(merge, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


KILLER = """
import os, random, signal, sys, time
import merge_with_lora as merge

def child():
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            merge.main(sys.argv[1:])
        finally:
            os._exit(0)
    return pid

output = sys.argv[sys.argv.index("--output_dir") + 1]
start = time.monotonic()
os.waitpid(child(), 0)
length = time.monotonic() - start
assert os.path.exists(output + "/config.json")
os.rename(output, output + "_whole")
random.seed(0)
for i in range(10):
    pid = child()
    time.sleep(length * random.random())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left = output if os.path.exists(output) else output + ".partial"
    if os.path.exists(left):
        os.rename(left, f"{output}_{i}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_merge_leaves_nothing_that_loads(merge, tmp_path):
    base = make_model(tmp_path / "base", hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    adapter = make_adapter(tmp_path / "adapter", base)
    command = [sys.executable, "-c", KILLER, "--adapter_path", adapter, "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    whole, killed = 0, 0
    for left in tmp_path.glob("out_?"):
        if (left / "config.json").exists():
            assert same_weights(left, tmp_path / "out_whole")
            load(left)
            whole += 1
        else:
            with pytest.raises((OSError, ValueError)):
                load(left)
            killed += 1
    assert killed >= 3
    # What a killed merge left beside the target is no obstacle.
    shutil.copytree(sorted(tmp_path.glob("out_?"))[0], tmp_path / "out.partial")
    run(merge, adapter, tmp_path / "out")
    assert same_weights(tmp_path / "out", tmp_path / "out_whole")
    assert not (tmp_path / "out.partial").exists()


def test_the_script_runs_alone_from_an_empty_directory(llama, tmp_path):
    make_adapter(tmp_path / "adapter", llama)
    (tmp_path / "empty").mkdir()
    shutil.copy(ROOT / "merge_with_lora.py", tmp_path / "empty")
    command = [sys.executable, "merge_with_lora.py", "--adapter_path", "../adapter", "--output_dir", "merged"]
    result = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "verified against base + adapter on 4 texts" in result.stdout
    load(tmp_path / "empty" / "merged")
