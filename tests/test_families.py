"""Every family of models computes in the four scripts what it computes for each text alone.

For each family a tiny model of its real config class, with windows of 12 tokens where it has any, goes through the
chain: SFT (a LoRA adapter; all weights with --packing), reward model, PPO, merge. Episodes and pairs are longer than
the windows. What the scripts computed is compared, in float64, with the plain model of transformers on one text at a
time. What a family cannot do is one line that names the reason, listed in REFUSED."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tokenizer, run, write_rows
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.numerical

WINDOW, RATE = 12, 0.5
SIZE = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0}

FAMILIES = {  # name: (config class, its own fields)
    "llama": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 with windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", SLIDING),
    "gemma3": ("Gemma3TextConfig", SLIDING),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "gpt-oss": ("GptOssConfig", {**SLIDING, **EXPERTS, "rope_parameters": YARN}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", SLIDING),
    "gpt2": ("GPT2Config", {}),
    "gpt-neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 64}),
    "bloom": ("BloomConfig", {}),
    "falcon with alibi": ("FalconConfig", {"alibi": True, "head_dim": None}),
    "stablelm": ("StableLmConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "glm4": ("Glm4Config", {}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS),
    "deepseek-v3": ("DeepseekV3Config", LATENT),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "falcon-h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "qwen3.5": ("Qwen3_5TextConfig", DELTA),
    "recurrentgemma": ("RecurrentGemmaConfig", {"attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 64, "context_length": 1024}),
    "minimax": ("MiniMaxConfig", {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
    "llama4": ("Llama4TextConfig", {
        "attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2,
        "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "moe_layers": [1], "no_rope_layers": [1, 0],
    }),
    "phimoe": ("PhimoeConfig", {**EXPERTS, "sliding_window": WINDOW}),
    "granite hybrid": ("GraniteMoeHybridConfig", {**EXPERTS, **MAMBA, "mamba_expand": 2, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"], "logits_scaling": 4.0}),
    "jetmoe": ("JetMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "num_key_value_heads": 4}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "seed-oss": ("SeedOssConfig", {}),
    "biogpt": ("BioGptConfig", {}),
    "opt-350m": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}  # fmt: skip
# No family here is one that this version of transformers cannot load.
NO_CLASSIFIER = ["mamba2", "falcon-h1", "recurrentgemma", "rwkv", "llama4", "granite hybrid"]
SEE_EACH_OTHER = [  # in packed rows: recurrent layers, ALiBi, learned positions, and gpt-oss hands no position ids to its mask
    "gpt-oss", "opt", "opt-350m", "biogpt", "bloom", "falcon with alibi", "mamba2", "falcon-h1", "qwen3.5", "recurrentgemma", "rwkv",
    "minimax", "granite hybrid",
]  # fmt: skip
REFUSED = {  # (family, stage): what the line names
    **dict.fromkeys([(name, "reward") for name in NO_CLASSIFIER], "sequence classifi"),
    **dict.fromkeys([(name, "packing") for name in SEE_EACH_OTHER], "--packing"),
}
if Version(transformers.__version__) >= Version("5.24"):  # its ALiBi follows position ids that restart
    del REFUSED["falcon with alibi", "packing"]
NO_CHECKPOINTING = ["jetmoe"]

PROMPTS = [
    "What is 7?",
    "What is very very much?",
    "What is a red light in the sky?",
    "Why?",
    "What is it?",
    "What, and why so?",
]
ANSWERS = [
    "It is light.",
    "No.",
    "The capital of France is Paris, and air scatters blue.",
    "Because.",
    "9 8 7 6 5",
    "So",
]
CHATS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in zip(PROMPTS, ANSWERS)
]
OTHERS = [[chat[0], {"role": "assistant", "content": answer}] for chat, answer in zip(CHATS, ANSWERS[1:] + ANSWERS[:1])]


def close(found, expected, size=None, what=""):
    """Equal to 1e-9 of the largest number; in float64 another order of additions changes less."""
    size = max(expected.abs().max().item(), 1e-3) if size is None else size
    error = (found - expected).abs().max().item() / size
    assert error <= 1e-9, f"{what} {error}"


def make_base(directory, config_class, own):
    """A random model of the family, without dropout and noise in routers (SFT trains with what its base has)."""
    tokenizer = make_tokenizer()
    config_class = getattr(transformers, config_class)
    ids = {"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 0, "vocab_size": len(tokenizer)}
    fields = {**SIZE, **ids, **own}
    config = config_class(**{name: value for name, value in fields.items() if value is not None})
    for name, value in config.to_dict().items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float64).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def change_config(base):
    """Give the base what SFT may use and the other stages switch off: dropout, the experts' auxiliary loss."""
    path = Path(base, "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name, value in config.items() if "drop" in name and isinstance(value, float)]
    config |= dict.fromkeys(names, 0.25)
    if "output_router_logits" in config:
        config["output_router_logits"] = True
    path.write_text(json.dumps(config), encoding="utf-8")
    return names


def logprobs(model, ids, start, temperature=1.0):
    """Log-probabilities of ids[start:] in the plain model, one text at a time."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(ids) - start), ids[start:]]


def scores(model, ids):
    """The score after each token of a text in the plain classifier, which itself would read before an EOS as if it
    were padding."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = getattr(inner, inner.base_model_prefix)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    return inner.score(states[0])[:, 0]


def sft_loss(model, rows):
    """Mean cross entropy of the tokens that the assistant wrote, each text alone."""
    found = [logprobs(model, ids, 1)[[i for i, own in enumerate(mask[1:]) if own]] for ids, mask in rows]
    return -torch.cat(found).mean()


def pair_loss(model, pairs):
    margins = [scores(model, chosen)[-1] - scores(model, rejected)[-1] for chosen, rejected in pairs]
    return -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()


def check_step(model, loss, after):
    """A step of plain SGD from `model` to `after` took the plain loss's gradient: weights differ by RATE times it."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, weights.values(), allow_unused=True)
    largest = max(gradient.abs().max().item() for gradient in gradients if gradient is not None)
    for (name, weight), gradient in zip(weights.items(), gradients):
        step = (weight.detach() - after.get_parameter(name)) / RATE
        gradient = torch.zeros_like(step) if gradient is None else gradient
        close(step, gradient, max(gradient.abs().max().item(), 1e-5 * largest), name)


SGD = ["--set", "optim=sgd", "--lr_scheduler_type", "constant", "--max_grad_norm", 0, "--learning_rate", RATE]
TWO_STEPS = ["--max_steps", 2, "--save_steps", 1, "--logging_steps", 1, "--per_device_train_batch_size", 3,
             "--gradient_accumulation_steps", 2, "--prompt_format", "chat"]  # fmt: skip


class Chain:
    """The commands on one family, in a directory of its own."""

    def __init__(self, name, place, scripts):
        self.name, self.place, self.scripts = name, place, scripts
        self.base = make_base(place / "base", *FAMILIES[name])
        self.format = scripts["sft"].PromptFormat(AutoTokenizer.from_pretrained(self.base), "chat")
        self.tail = self.format.tail_ids()  # after the end of a turn; scores are read behind it
        rows = [{"messages": chat} for chat in CHATS]
        self.sft_data = write_rows(place / "sft.jsonl", rows)
        rows = [
            {"prompt": prompt, "chosen": chat, "rejected": other} for prompt, chat, other in zip(PROMPTS, CHATS, OTHERS)
        ]
        self.pairs = write_rows(place / "pairs" / "train.jsonl", rows)
        self.prompts = write_rows(place / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
        (place / "rules.py").write_text("def length(prompts, responses):\n    return [len(r) / 8 for r in responses]\n")

    def run(self, script, stage, *flags):
        """False where the family is refused in the line that it should be refused in."""
        line = REFUSED.get((self.name, stage))
        _, err = run(self.scripts[script], *flags, code=2 if line else 0)
        if line:
            (error,) = [text for text in err.splitlines() if text.startswith("error: ")]
            assert line in error
        return not line

    def sft(self):
        """An adapter; loss and gradient of its second step are those of the texts alone."""
        out = self.place / "sft"
        flags = ["--model_path", self.base, "--dataset_name", self.sft_data, "--output_dir", out, "--use_lora"]
        self.run("sft", "sft", *flags, *SGD, *TWO_STEPS, *self.no_router_loss())
        rows = [self.format.encode(chat) for chat in CHATS]
        model = self.load_policy(out / "checkpoint-1")
        loss = sft_loss(model, rows)
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        close(torch.tensor([line["loss"] for line in logged if "loss" in line][1]), loss.detach())
        check_step(model, loss, self.load_policy(out / "checkpoint-2"))
        return out / "final_checkpoint"

    def no_router_loss(self):
        """The experts' auxiliary loss is about all tokens of a pass, not of a text: off where it is not asked for."""
        return ["--set", "router_aux_loss_coef=0.0"] if "num_experts_per_tok" in FAMILIES[self.name][1] else []

    def packing(self):
        """All weights, the texts in one row."""
        out = self.place / "packed"
        flags = ["--model_path", self.base, "--dataset_name", self.sft_data, "--output_dir", out, "--packing"]
        flags += ["--max_length", 768, "--max_steps", 1, "--save_steps", 1, "--prompt_format", "chat"]
        if not self.run("sft", "packing", *flags, *SGD, *self.no_router_loss()):
            return
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float64).eval()
        loss = sft_loss(model, [self.format.encode(chat) for chat in CHATS])
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        close(torch.tensor(metrics["train_loss"]), loss.detach())
        check_step(model, loss, AutoModelForCausalLM.from_pretrained(out / "final_checkpoint", dtype=torch.float64))
        kept = [json.loads(Path(folder, "config.json").read_text()) for folder in (self.base, out / "final_checkpoint")]
        assert kept[0].get("output_router_logits") == kept[1].get("output_router_logits")

    def reward(self, more):
        out = self.place / "reward"
        flags = ["--model_path", self.base, "--dataset_name", self.pairs, "--eval_split", "train", "--output_dir", out]
        if not self.run("reward", "reward", *flags, "--use_lora", *SGD, *TWO_STEPS, *more):
            return None
        pairs = [[self.format.encode(chat)[0] + self.tail for chat in pair] for pair in zip(CHATS, OTHERS)]
        model = self.load_reward(out / "checkpoint-1")
        check_step(model, pair_loss(model, pairs), self.load_reward(out / "checkpoint-2"))
        return out / "final_checkpoint"

    def eval_only(self, reward_model):
        """scores.jsonl of the reward model as it is now."""
        out = self.place / "scores"
        flags = ["--model_path", reward_model, "--dataset_name", self.pairs, "--eval_split", "train", "--eval_only"]
        run(self.scripts["reward"], *flags, "--output_dir", out, "--prompt_format", "chat")
        lines = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
        found = torch.tensor([[line["score_chosen"], line["score_rejected"]] for line in lines])
        model = self.load_reward(reward_model)
        with torch.no_grad():
            texts = [[self.format.encode(chat)[0] + self.tail for chat in pair] for pair in zip(CHATS, OTHERS)]
            pairs = [[scores(model, text)[-1] for text in pair] for pair in texts]
        close(found, torch.tensor(pairs))

    def load_policy(self, folder):
        return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype=torch.float64).eval()

    def load_reward(self, folder):
        more = {"num_labels": 1, "is_trainable": True, "dtype": torch.float64}
        return AutoPeftModelForSequenceClassification.from_pretrained(folder, **more).eval()

    def ppo(self, policy, reward_model, monkeypatch, more):
        """One update of six episodes; returns its micro-batches."""
        out, rolled, trainer = self.place / "ppo", [], self.scripts["rl"].PPOTrainer
        roll_out = trainer.roll_out
        monkeypatch.setattr(trainer, "roll_out", lambda *args: rolled.extend(roll_out(*args)) or rolled)
        flags = ["--model_path", policy, "--dataset_name", self.prompts, "--output_dir", out, "--prompt_format", "chat"]
        flags += ["--reward_model_path", reward_model] if reward_model else []
        flags += [] if reward_model else ["--reward_function", f"{self.place / 'rules.py'}:length"]
        flags += ["--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--total_episodes", 6]
        flags += ["--num_ppo_epochs", 1, "--response_length", 10, "--max_prompt_length", 64, "--learning_rate", 1e-3]
        self.run("rl", "ppo", *flags, *more)
        self.check_samples(out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        (update,) = [line for line in lines if "val/ratio" in line]
        assert abs(update["val/ratio"] - 1) < 1e-9 and abs(update["objective/kl"]) < 1e-9
        assert update["policy/approxkl_avg"] < 1e-15
        model = self.load_policy(policy)
        classifier = self.load_reward(reward_model) if reward_model else None
        assert sum(len(batch.rows) for batch in rolled) == 6
        with torch.no_grad():
            for batch in rolled:
                for i, (row, response) in enumerate(zip(batch.rows, batch.responses)):
                    prompt, n = row["prompt_ids"], len(response)
                    assert len(prompt) + n > WINDOW and batch.lengths[i] == n
                    close(batch.logprobs[i, :n], logprobs(model, prompt + response, len(prompt), 0.7))
                    if classifier:
                        found = scores(classifier, prompt + response)
                        close(batch.values[i, :n], found[len(prompt) - 1 : -1])
                        whole = prompt + response + self.tail * int(batch.ended[i])
                        close(batch.scores[i], scores(classifier, whole)[-1])
        return rolled

    def check_samples(self, out):
        """The greedy answers to prompts of several lengths are those that the plain model writes to each alone."""
        model, tokenizer = self.load_policy(out / "final_checkpoint"), self.format.tokenizer
        stops = self.format.stop_ids(model.generation_config)
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        samples = [sample for sample in samples if "policy_answer" in sample]  # the others are episodes
        assert [sample["prompt"] for sample in samples] == PROMPTS
        for sample in samples:
            ids = self.format.encode([{"role": "user", "content": sample["prompt"]}], open_end=True)[0]
            start = len(ids)
            while len(ids) < start + 10 and (len(ids) == start or ids[-1] not in stops):
                with torch.no_grad():
                    ids = [*ids, model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()]
            assert sample["policy_answer"] == tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture
def chain(request, tmp_path, sft, reward, rl, merge, float64):
    made = Chain(request.param, tmp_path, {"sft": sft, "reward": reward, "rl": rl, "merge": merge})
    yield made
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("chain", FAMILIES, indirect=True)
def test_packed_rows_are_texts_alone(chain):
    """With --packing, loss and gradient of all weights are those of the texts alone, or the family is refused."""
    chain.packing()


@pytest.mark.parametrize("chain", FAMILIES, indirect=True)
def test_the_chain_is_texts_alone(chain, monkeypatch):
    """SFT, reward model, PPO and merge, each with what the plain model computes from every text alone."""
    policy = chain.sft()
    dropped = change_config(chain.base)
    more = ["--gradient_checkpointing"] if dropped and chain.name not in NO_CHECKPOINTING else []
    reward_model = chain.reward(more)
    if reward_model:
        chain.eval_only(reward_model)
    batches = chain.ppo(policy, reward_model, monkeypatch, more)
    if chain.name in SHARED:
        assert max(len(batch.rows) for batch in batches) > 1 and all(len(batch.input_ids) == 1 for batch in batches)
    out = chain.place / "merged"
    if chain.run("merge", "merge", "--adapter_path", chain.place / "ppo" / "final_checkpoint", "--output_dir", out):
        kept = [json.loads(Path(folder, "config.json").read_text()) for folder in (chain.base, out)]
        assert all(kept[0].get(name) == kept[1].get(name) for name in [*dropped, "output_router_logits"])


SHARED = {  # episodes share rows where that is the same computation
    "llama", "qwen2", "qwen3", "olmo2", "gpt2", "gpt-neox", "stablelm", "smollm3", "glm4", "mixtral", "qwen3-moe", "deepseek-v3",
}  # fmt: skip
