"""The text block: which token ids a conversation becomes, and which of them are trained on."""

import json
import re
import sys
import types

import pytest
from conftest import CHATML, ROOT, TEXTS, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(ROOT / "benchmarks"))
import templates

CARRIERS = ["training_sft.py", "training_reward_model.py", "training_rl.py"]


def read_block(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    match = re.search(r"^# >>> text: .*?^# <<< text$", text, re.MULTILINE | re.DOTALL)
    assert match, f"{file} has no text block"
    return match[0]


def test_the_block_is_the_same_in_every_training_script():
    assert len({read_block(file) for file in CARRIERS}) == 1


@pytest.fixture(scope="module")
def block():
    """The names of the block, run alone: of its script it uses `import json, re` and nothing else."""
    module = types.ModuleType("text_block")
    module.json, module.re = json, re
    exec(compile(read_block("training_sft.py"), "text block", "exec"), vars(module))
    return module


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# ---------------------------------------------------------------- golden cases


class Words:
    """A tokenizer whose ids can be read: text is cut before each space, `<bos>` and `<eos>` are special."""

    eos_token_id, chat_template, all_special_tokens, added_tokens_decoder = "<eos>", None, ["<bos>", "<eos>"], {}

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        pieces = [text] if split_special_tokens else re.split("(<bos>|<eos>)", text)
        ids = ["<bos>"] if add_special_tokens else []
        for piece in pieces:
            ids += [piece] if piece in self.all_special_tokens else re.findall(r" ?[^ ]+| +", piece)
        return {"input_ids": ids if split_special_tokens else [word for word in ids if word]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, tools=None):
        text = "".join(f"{turn['role'][0].upper()}: {turn['content']}<eos>" for turn in messages)
        return "<bos>" + text + "A:" * add_generation_prompt


def test_question_and_answer(block):
    encode = block.PromptFormat(Words(), "qa").encode
    ids, mask = encode([user("Why?"), assistant("It is so.")])
    assert ids == ["<bos>", "Question:", " Why?\n\nAnswer:", " It", " is", " so.", "<eos>"]
    assert mask == [0, 0, 0, 1, 1, 1, 1]
    assert encode([user("Why?")], open_end=True) == (["<bos>", "Question:", " Why?\n\nAnswer:"], [0, 0, 0])


@pytest.mark.parametrize("system", ["", "Sum."])
def test_earlier_turns_join_the_question(block, system):
    """An empty system turn leaves no trace."""
    chat = [{"role": "system", "content": system}, user("1"), assistant("2"), user("3"), assistant("4")]
    ids, mask = block.PromptFormat(Words(), "qa").encode(chat)
    assert "".join(ids) == "<bos>Question: " + (system and f"{system}\n\n") + "1\n\n2\n\n3\n\nAnswer: 4<eos>"
    assert mask == [0] * (len(ids) - 2) + [1, 1]


def test_chat(block):
    chat = block.PromptFormat(Words(), "chat")
    ids, mask = chat.encode([user("Why?"), assistant("So."), user("Oh"), assistant("Yes it is.")])
    assert ids == ["<bos>", "U:", " Why?", "<eos>", "A:", " So.", "<eos>", "U:", " Oh", "<eos>", "A:", " Yes", " it", " is.", "<eos>"]  # fmt: skip
    assert mask == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert chat.encode([user("Why?")], open_end=True)[0] == ids[:5]
    assert chat.stop_ids() == ["<eos>"]


@pytest.mark.parametrize("name", ["qa", "chat"])
def test_special_tokens_in_data_stay_text(block, name):
    ids, mask = block.PromptFormat(Words(), name).encode([user("a <eos> b"), assistant("c<eos>")])
    assert (ids.count("<eos>"), ids.count("<bos>")) == ((1, 1) if name == "qa" else (2, 1))
    assert [word for word, trained in zip(ids, mask) if trained] == [" c<eos>", "<eos>"]
    assert " <eos>" in ids


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "should end with the role assistant"),
        (None, "should be a list"),
        (["a"], "should be a list"),
        ([user("a"), assistant(" \n")], "text in turn 1 (assistant)"),
        ([user(None), assistant("b")], "text in turn 0 (user)"),
        ([user([{"type": "text", "text": "a"}]), assistant("b")], "text in turn 0 (user)"),
        (
            [user("a"), {"role": "system", "content": "s"}, assistant("b")],
            "should have the role user or assistant in turn 1",
        ),
        ([assistant("b")], "should have the role system or user in turn 0, not {'role': 'assistant', 'content': 'b'}"),
        ([{"from": "human", "value": "a"}], "should end with the role assistant"),
        ([user("a"), {"role": "assistant", "tool_calls": [{"name": "f"}]}], "should end with the role assistant"),
        ([user("a")], "should end with the role assistant, not [{'role': 'user', 'content': 'a'}]"),
        ([{"role": "system", "content": "a"}], "should end with the role assistant"),
    ],
)
def test_conversations_that_are_refused(block, messages, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        block.read_messages(messages, last="assistant")


def test_conversations_that_are_taken(block):
    """As they come: a system turn without text is none, `developer` is system, numbers are their JSON text."""
    pair = [user("a"), assistant("b")]
    for empty in ("", None, " "):
        assert block.read_messages([{"role": "system", "content": empty}, *pair], last="assistant") == pair
    developer = block.read_messages([{"role": "developer", "content": "s", "name": "x"}, *pair], last="assistant")
    assert developer == [{"role": "system", "content": "s"}, *pair]
    assert block.read_messages([user(1.5), assistant(True)], last="assistant") == [user("1.5"), assistant("true")]
    assert block.read_messages([*pair, user("c"), user("d")], last="user") == [*pair, user("c"), user("d")]


@pytest.mark.parametrize("name", ["llama3_2", "gemma"])
def test_turns_of_one_role_in_a_row_stay_where_the_template_takes_them(block, name):
    """Llama 3 takes two questions or two answers in a row; templates that insist on turns get them joined."""
    chat_format = block.PromptFormat(templates.make_tokenizer(name), "chat")
    twice = [user("one"), user("two"), assistant("three"), assistant("four")]
    joined = [user("one\n\ntwo"), assistant("three\n\nfour")]
    ids, mask = chat_format.encode(twice)
    assert (ids == chat_format.encode(joined)[0]) == (name != "llama3_2")
    text = chat_format.tokenizer.apply_chat_template(twice if name == "llama3_2" else joined, tokenize=False)
    assert chat_format.tokenizer.decode(ids) == text.removesuffix(chat_format.tail)
    answers = chat_format.tokenizer.decode([token for token, trained in zip(ids, mask) if trained])
    assert (
        answers.count(chat_format.end) == (2 if name == "llama3_2" else 1) and "three" in answers and "four" in answers
    )


def test_tools_are_handed_to_the_template(block):
    chat_format = block.PromptFormat(templates.make_tokenizer("qwen2_5"), "chat")
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    ids, mask = chat_format.encode([user("a"), assistant("b")], tools=tools)
    text = chat_format.tokenizer.decode(ids)
    assert '"look_up"' in text
    assert [token for token, trained in zip(ids, mask) if trained] == chat_format.encode([user("a"), assistant("b")])[
        0
    ][-2:]


@pytest.mark.parametrize(("name", "tail"), [("qwen2_5", "\n"), ("gemma", "\n"), ("llama3_2", ""), ("glm4moe", "")])
def test_the_whole_text_of_a_template_is_ours_and_its_tail(block, name, tail):
    """What others render and tokenize at once is encode() + tail_ids()."""
    chat_format = block.PromptFormat(templates.make_tokenizer(name), "chat")
    chat = [user("Why?"), assistant("So.")]
    ids = chat_format.encode(chat)[0] + chat_format.tail_ids()
    assert chat_format.tokenizer.decode(chat_format.tail_ids()) == tail
    if name != "glm4moe":  # ends with the token of the next turn
        assert ids == chat_format.tokenizer.apply_chat_template(chat, return_dict=False)


def test_the_format_is_what_is_asked_for_or_recorded_or_natural(block):
    pick, plain, chat = block.pick_format, make_tokenizer(chat=False), make_tokenizer(chat=True)
    assert pick("auto", "chat", None, chat).name == "chat"
    assert pick("auto", "chat", "qa", chat).name == "qa"
    assert pick("auto", "chat", None, plain).name == "qa"
    assert pick("qa", "chat", "chat", chat).name == "qa"
    with pytest.raises(ValueError, match="no chat template"):
        pick("chat", "qa", None, plain)
    plain.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        pick("qa", "qa", None, plain)


# ---------------------------------------------------------------- Question/Answer text, any tokenizer


def bracket(tokenizer, bos, eos, adds):
    """Let the tokenizer add BOS, EOS, both or neither to what it reads."""
    parts = [bos] * ("b" in adds) + ["$A"] + [eos] * ("e" in adds)
    specials = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)


def byte_level(adds):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return bracket(tokenizer, "<s>", "</s>", adds)


def sentencepiece(adds, kind, phrases=False):
    """Llama-2's way (a normalizer prepends the space marker) or a Metaspace pre-tokenizer ("first" or "always").

    With `phrases` some tokens reach across a space, as in models trained without splitting at whitespace."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=not phrases)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    tokenizer.train_from_iterator([line for text in TEXTS for line in text.split("\n")] * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps({**state, "pre_tokenizer": None}))
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bracket(tokenizer, "<s>", "</s>", adds)


def wordpiece(adds):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return bracket(tokenizer, "[CLS]", "[SEP]", adds)


TOKENIZERS = {
    **{f"byte-level{adds and '+'}{adds}": (byte_level, adds) for adds in ("", "b", "e", "be")},
    **{
        f"{kind}+{adds}": (sentencepiece, adds, kind) for kind in ("llama-2", "first", "always") for adds in ("b", "be")
    },
    "phrases+b": (sentencepiece, "b", "llama-2", True),
    "wordpiece+be": (wordpiece, "be"),
}
MADE = {}


def made(name):
    if name not in MADE:
        make, *arguments = TOKENIZERS[name]
        MADE[name] = make(*arguments)
    return MADE[name]


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["</s>", "<s>", "[SEP]", "<|im_end|>", "<|im_start|>", "<think>", "\u2028", "\ue000", "\ue001"]),
    st.sampled_from([" ", "\n", "\n\n", "  ", "\t", "Answer:", "Question: ", "the", " capital", "é", "漢字", "🙂"]),
)
CONTENTS = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(str.strip)
FAST = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", TOKENIZERS)
@FAST
@given(question=CONTENTS, answer=CONTENTS)
def test_question_and_answer_with_every_kind_of_tokenizer(block, name, question, answer):
    tokenizer = made(name)
    qa = block.PromptFormat(tokenizer, "qa")
    prompt, nothing = qa.encode([user(question)], open_end=True)
    ids, mask = qa.encode([user(question), assistant(answer)])

    assert ids[: len(prompt)] == prompt and not any(nothing)
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    starts_with_bos = "b" in name.partition("+")[2]
    assert (
        ids.count(tokenizer.bos_token_id) == starts_with_bos and (ids[0] == tokenizer.bos_token_id) == starts_with_bos
    )
    if name != "wordpiece+be":  # WordPiece loses letters and spaces
        assert tokenizer.decode(ids[starts_with_bos:-1]) == f"Question: {question}\n\nAnswer: {answer}"


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "phrases+b"])
def test_the_space_belongs_to_the_first_token_of_the_answer(block, name):
    """Where no token lies across the cut, the ids are those of the tokenizer's own reading of the whole text."""
    tokenizer = made(name)
    qa = block.PromptFormat(tokenizer, "qa")
    ids, mask = qa.encode([user("What is the capital of France?"), assistant("The capital")])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    prompt, answer = tokens[: mask.index(1)], tokens[mask.index(1) :]
    if name == "wordpiece+be":
        assert prompt[-1] == ":" and answer == ["the", "capital", "[SEP]"]
    else:
        assert prompt[-1].endswith(":") and answer[0][0] in "Ġ▁" and len(answer[0]) > 1
    text = "Question: What is the capital of France?\n\nAnswer: The capital"
    assert ids[len(qa.bos) : -1] == tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- chats, every template that TRL ships

REFUSED = ["idefics3", "idefics3_training", "llava_next", "llava_next_training"]  # contents as lists of parts
TEMPLATES = [name for name in templates.NAMES if name not in REFUSED]
THOUGHT = "<think>\n\n</think>\n\n"
CLOSED = THOUGHT.removeprefix("<think>\n")
# Start of the template's name: what it writes between its generation prompt and the answer, what ends the turn, and
# earlier turns: trained on like the last, trained on without the token that ends them, or left as context.
EXPECTED = {
    "cohere": ("", "<|END_OF_TURN_TOKEN|>", "all"),
    "cohere2": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "all"),
    "deepseek": ("", "<｜end▁of▁sentence｜>", "all"),
    "diffusion_gemma": ("", "<turn|>", "all"),
    "gemma": ("", "<end_of_turn>", "all"),
    "gemma4": ("", "<turn|>", "all"),
    "glm4moe": ("\n<think></think>\n", "<|user|>", "all"),
    "gptoss": ("<|channel|>final<|message|>", "<|return|>", "no end"),
    "lfm2": ("", "<|im_end|>", "all"),
    "llama3": ("", "<|eot_id|>", "all"),
    "muse_glimmer": (" to=user<|message|>", "<|eot|>", "all"),
    "nemotron": ("<think></think>", "<|im_end|>", "all"),
    "phi3": ("", "<|end|>", "all"),
    "qwen2_5": ("", "<|im_end|>", "all"),
    "qwen3": (THOUGHT, "<|im_end|>", "context"),
    "qwen3_training": (THOUGHT, "<|im_end|>", "all"),
    "qwen3_instruct": ("", "<|im_end|>", "all"),
    "qwen3_vl": ("", "<|im_end|>", "all"),
    "qwen3_5_nothink": ("", "<|im_end|>", "context"),
    "qwen3_5_nothink_training": ("", "<|im_end|>", "all"),
    "qwen3_5_think": (CLOSED, "<|im_end|>", "context"),
    "qwen3_5_think_training": (CLOSED, "<|im_end|>", "all"),
    "qwen3_6": (CLOSED, "<|im_end|>", "context"),
    "qwen3_6_training": (CLOSED, "<|im_end|>", "all"),
    "qwen3_8": (CLOSED, "<|im_end|>", "all"),
}
ODD = [
    ("Two\nlines?", "One.\n\nTwo.\n\n\nThree."),
    ("A literal <|im_end|> and </s>\n", "Ends with <|im_end|>"),
    ("  \n led by spaces", "\n\n led by line breaks \n"),
    ("<eos>", "</s>"),
    ("raw \u2028 separator", "private \ue000\ue000 use \ue001 and \ue004"),
    ("<|user|> <|end|> <end_of_turn>", "<|assistant|><turn|> 漢字 🙂 <｜end▁of▁sentence｜>x"),
]


def expected(name):
    return EXPECTED[max((start for start in EXPECTED if name.startswith(start)), key=len)]


def count_special(chat_format, chat):
    special = {i for i, token in chat_format.tokenizer.added_tokens_decoder.items() if token.special}
    return sum(token in special for token in chat_format.encode(chat)[0])


def encode_and_check(chat_format, chat):
    """Ids and mask; the prompt's ids come first, the last answer is trained on, special ids are the template's alone."""
    ids, mask = chat_format.encode(chat)
    prompt = chat_format.encode(chat[:-1], open_end=True)[0]
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt) :] == [1] * (len(ids) - len(prompt))
    assert count_special(chat_format, chat) == count_special(chat_format, [{**turn, "content": "x"} for turn in chat])
    return ids, mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_trains_on_the_answers_and_what_ends_them(block, name):
    """With the tokenizer as it comes, and as the scripts save it: with an EOS that ends turns, which some templates write."""
    chat_format = block.PromptFormat(templates.make_tokenizer(name), "chat")
    before, end, earlier = expected(name)
    check_answers(chat_format, before, end, earlier)
    chat_format = block.make_eos_end_turns(chat_format)
    assert end.endswith(chat_format.tokenizer.eos_token) and chat_format.tokenizer.eos_token_id == chat_format.end_id()
    check_answers(chat_format, before, end, earlier)


def check_answers(chat_format, before, end, earlier):
    for pairs in (ODD[:1], ODD[1:2], ODD[2:4], ODD[4:], ODD):
        for system in ([], [{"role": "system", "content": "Be brief.\n\n</s>"}]):
            chat = system + [turn for question, answer in pairs for turn in (user(question), assistant(answer))]
            encode_and_check(chat_format, chat)
            texts = templates.trained_texts(chat_format, chat)
            answers = [answer for _, answer in pairs]
            if earlier == "context":
                answers = answers[-1:]
            assert len(texts) == len(answers)
            for i, (text, answer) in enumerate(zip(texts, answers)):
                ended = end if earlier != "no end" or i == len(pairs) - 1 else ""
                assert text.startswith(before) and text.endswith(ended)
                assert text.removeprefix(before).removesuffix(ended).strip() == answer.strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_the_tokenizers_own_reading(block, name):
    """Cutting a chat into pieces changes nothing where no token lies across a cut."""
    chat_format = block.make_eos_end_turns(block.PromptFormat(templates.make_tokenizer(name), "chat"))
    chat = [user("The fox"), assistant("The lazy dog."), user("The dog, the fox?"), assistant("The quick fox.")]
    ids = chat_format.encode(chat)[0]
    text = chat_format.tokenizer.apply_chat_template(chat, tokenize=False)
    whole = chat_format.tokenizer(text, add_special_tokens=False)["input_ids"]
    if name.startswith("glm4moe"):
        whole = [*whole, ids[-1]]  # this template leaves the last turn open
    assert ids == whole[: len(ids)]


def test_59_of_the_templates_are_served_and_the_others_refused_in_one_line(block):
    assert len(TEMPLATES) >= 59
    for name in REFUSED:
        with pytest.raises(ValueError, match="chat template"):
            block.PromptFormat(templates.make_tokenizer(name), "chat")


THOUGHTS = [user("1+1?"), assistant("<think>\nEasy.\n</think>\n\n2."), user("2+2?"), assistant("<think>\nSum.\n</think>\n\n4.")]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "nemotron_3_nano", "glm4moe", "deepseek_r1_distill_training"])  # fmt: skip
@pytest.mark.parametrize("special", [False, True])
def test_thoughts_in_the_data_are_trained_on_as_thoughts(block, name, special):
    tokenizer = templates.make_tokenizer(name)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat_format = block.PromptFormat(tokenizer, "chat")
    texts = templates.trained_texts(chat_format, THOUGHTS)
    assert "Sum." in texts[-1] and "</think>" in texts[-1] and "4." in texts[-1]
    ids, mask = chat_format.encode(THOUGHTS)
    thought = tokenizer.convert_tokens_to_ids("</think>")
    assert [token for token, trained in zip(ids, mask) if trained].count(thought) == len(texts)
    if name in ("qwen3", "qwen3_5_think"):  # these drop the thoughts of earlier turns: context, not trained on
        assert len(texts) == 1 and "Easy" not in tokenizer.decode(ids)


@pytest.mark.parametrize(("name", "key"), [("qwen3", "reasoning_content"), ("nemotron_3_nano", "reasoning_content"), ("gptoss", "thinking")])  # fmt: skip
def test_thoughts_beside_the_content_are_trained_on_where_the_template_writes_them(block, name, key):
    chat_format = block.PromptFormat(templates.make_tokenizer(name), "chat")
    chat = block.read_messages([user("2+2?"), {**assistant("4."), key: "Sum it."}], last="assistant")
    (text,) = templates.trained_texts(chat_format, chat)
    assert "Sum it." in text and text.index("4.") > text.index("Sum it.")
    assert (
        chat_format.encode(chat)[0]
        == chat_format.tokenizer.apply_chat_template(chat, return_dict=False)[: len(chat_format.encode(chat)[0])]
    )
    plain = block.PromptFormat(chat_format.tokenizer, "qa")  # which has no place for them
    assert plain.encode(chat) == plain.encode([user("2+2?"), assistant("4.")])


def test_a_template_that_drops_thoughts_of_the_last_answer_is_refused(block):
    chat_format = block.PromptFormat(templates.make_tokenizer("deepseek_r1_distill"), "chat")
    with pytest.raises(ValueError, match="does not write the whole last answer"):
        chat_format.encode(THOUGHTS[:2])


LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("hello", "does not write answers"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'"), "does not write the whole last answer"),
        (LOOP + "{{ m['content'][:1] }}<|im_end|>{% endfor %}", "leaves out text of turn 0 (user)"),
        (LOOP + "{{ m['content'] if m['role'] == 'user' else m['content'][:1] }}<|im_end|>{% endfor %}", "whole last answer"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_right_are_refused_with_the_reason(block, template, problem):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=re.escape(problem)):
        block.PromptFormat(tokenizer, "chat").encode([user("a b"), assistant("c d")])


def test_a_template_without_a_token_that_ends_turns_gets_eos_once(block):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        LOOP + "{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    )
    chat_format = block.PromptFormat(tokenizer, "chat")
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert templates.trained_texts(chat_format, chat) == ["b", "d<|im_end|>"]
    assert chat_format.encode(chat)[0].count(tokenizer.eos_token_id) == 1


def test_bos_comes_once_in_a_chat(block):
    """A tokenizer that adds BOS by itself, with a template that writes it too."""
    tokenizer = byte_level("b")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "</s>")
    ids, mask = block.PromptFormat(tokenizer, "chat").encode([user("a"), assistant("b")])
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([token for token, trained in zip(ids, mask) if trained]) == "b</s>"


def test_stop_ids_are_those_of_tokenizer_model_and_template(block):
    chat_format = block.PromptFormat(templates.make_tokenizer("llama3_2"), "chat")
    turn = chat_format.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert chat_format.stop_ids(types.SimpleNamespace(eos_token_id=[7, 9])) == sorted({7, 9, turn})
    assert chat_format.stop_ids(types.SimpleNamespace(eos_token_id=7)) == sorted({7, turn})
    glm = block.PromptFormat(templates.make_tokenizer("glm4moe"), "chat")
    assert set(glm.tokenizer.convert_ids_to_tokens(glm.stop_ids())) == {"<eos>", "<|user|>"}


# ---------------------------------------------------------------- chats, any text

CHATS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3).map(
    lambda pairs: [turn for question, answer in pairs for turn in (user(question), assistant(answer))]
)
INSTRUCTIONS = (  # in the way of Llama 2 and Mistral
    LOOP + "{% if m['role'] == 'user' %}{{ bos_token + '[INST]' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token + '\n' }}{% endif %}{% endfor %}"
)
FORMATS = {}


def instructed(block, name):
    if name not in FORMATS:
        tokenizer = made(name)
        tokenizer.chat_template = INSTRUCTIONS
        FORMATS[name] = block.PromptFormat(tokenizer, "chat")
    return FORMATS[name]


@pytest.mark.parametrize("name", ["llama3_2", "qwen3", "gemma", "gptoss", "phi3", "glm4moe"])
@FAST
@given(chat=CHATS)
def test_any_text_comes_back_from_the_ids(block, name, chat):
    if name not in FORMATS:
        FORMATS[name] = block.PromptFormat(templates.make_tokenizer(name), "chat")
    ids, mask = encode_and_check(FORMATS[name], chat)
    before, end, _ = expected(name)
    answer = FORMATS[name].tokenizer.decode(ids[len(FORMATS[name].encode(chat[:-1], open_end=True)[0]) :])
    assert answer.removeprefix(before).removesuffix(end).strip() == chat[-1]["content"].strip()


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("wordpiece+be", "phrases+b")])
def test_chats_read_as_the_tokenizer_reads_them(block, name):
    chat_format = instructed(block, name)
    chat = [user("Why"), assistant("The capital"), user("a b"), assistant("of France")]
    text = "<s>[INST]Why [/INST] The capital </s>\n<s>[INST]a b [/INST] of France </s>"
    assert chat_format.encode(chat)[0] == chat_format.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "wordpiece+be"])
@FAST
@given(chat=CHATS)
def test_any_text_comes_back_whatever_the_tokenizer(block, name, chat):
    chat_format = instructed(block, name)
    tokenizer = chat_format.tokenizer
    ids, mask = encode_and_check(chat_format, chat)
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == len(chat) // 2
    assert [token for token, trained in zip(ids, mask) if trained].count(tokenizer.eos_token_id) == len(chat) // 2
    trained = [text.removesuffix("</s>").strip() for text in templates.trained_texts(chat_format, chat)]
    assert trained == [turn["content"].strip() for turn in chat[1::2]]
