"""The block `text`: which token ids a conversation becomes, and which of them are trained on."""

import json
import re
import sys
import types

import pytest
from conftest import CHATML, ROOT, TEXTS, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_blocks import read_block
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(ROOT / "benchmarks"))
import templates


class UserError(Exception):
    pass


@pytest.fixture(scope="module")
def block():
    """The names of the block, run alone: the standard library's names and UserError are all it may use."""
    module = types.ModuleType("block_text")
    module.re, module.UserError = re, UserError
    exec(compile(read_block("training_sft.py", "text"), "block text", "exec"), vars(module))
    return module


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# ---------------------------------------------------------------- golden cases


class Words:
    """A tokenizer whose ids can be read: text is cut before each space, `<bos>` and `<eos>` are special."""

    eos_token_id, chat_template, is_fast = "<eos>", None, True
    all_special_tokens, added_tokens_decoder = ["<bos>", "<eos>"], {}

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        pieces = [text] if split_special_tokens else re.split("(<bos>|<eos>)", text)
        ids = [word for piece in pieces for word in ([piece] if piece in self.all_special_tokens else self.cut(piece))]
        return {"input_ids": ["<bos>"] * add_special_tokens + ids}

    def cut(self, text):
        return re.findall(r" ?[^ ]+| +", text)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"{m['role'][0].upper()}: {m['content']}<eos>" for m in messages)
        return "<bos>" + text + "A:" * add_generation_prompt


def test_golden_question_and_answer(block):
    encode = block.PromptFormat(Words(), "qa").encode
    ids, mask = encode([user("Why?"), assistant("It is so.")])
    assert ids == ["<bos>", "Question:", " Why?\n\nAnswer:", " It", " is", " so.", "<eos>"]
    assert mask == [0, 0, 0, 1, 1, 1, 1]
    assert encode([user("Why?")], open_end=True) == (["<bos>", "Question:", " Why?\n\nAnswer:"], [0, 0, 0])


def test_golden_earlier_turns_join_the_question(block):
    chat = [{"role": "system", "content": "Sum."}, user("1"), assistant("2"), user("3"), assistant("4")]
    assert block.question_and_answer(chat) == ("Sum.\n\n1\n\n2\n\n3", "4")
    assert block.question_and_answer(chat[:-1], open_end=True) == ("Sum.\n\n1\n\n2\n\n3", "")
    chat[0]["content"] = ""
    assert block.question_and_answer(chat) == ("1\n\n2\n\n3", "4")


def test_golden_chat(block):
    chat = block.PromptFormat(Words(), "chat")
    ids, mask = chat.encode([user("Why?"), assistant("So."), user("Oh"), assistant("Yes it is.")])
    assert ids == ["<bos>", "U:", " Why?", "<eos>", "A:", " So.", "<eos>", "U:", " Oh", "<eos>", "A:", " Yes", " it", " is.", "<eos>"]  # fmt: skip
    assert mask == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert chat.encode([user("Why?")], open_end=True)[0] == ids[:5]
    assert chat.stop_ids() == ["<eos>"]


def test_golden_special_tokens_in_text_stay_text(block):
    for name in ("qa", "chat"):
        ids, mask = block.PromptFormat(Words(), name).encode([user("a <eos> b"), assistant("c<eos>")])
        assert (ids.count("<eos>"), ids.count("<bos>")) == ((1, 1) if name == "qa" else (2, 1))
        assert [word for word, trained in zip(ids, mask) if trained] == [" c<eos>", "<eos>"]
        assert " <eos>" in ids


def test_golden_checks(block):
    check, last = block.check_messages, {"last": "assistant"}
    assert check([user("a"), assistant("b")], **last) is None
    assert check([{"role": "system", "content": ""}, user("a"), assistant("b")], **last) is None
    assert check([user("a"), assistant("b"), user("c")], last="user") is None
    assert "empty one" in check([], **last)
    assert "not NoneType" in check(None, **last)
    assert "turn 1 (assistant) has an empty content" in check([user("a"), assistant(" \n")], **last)
    assert "turn 0 (user) has no content" in check([user(None), assistant("b")], **last)
    assert "turn 1 has the role 'user' where 'assistant'" in check([user("a"), user("b")], **last)
    assert "turn 0 has the role 'assistant' where 'user'" in check([assistant("b")], **last)
    assert "ends with the role 'user'" in check([user("a")], **last)
    assert "keys role and content" in check([{"from": "human", "value": "a"}], **last)
    assert block.check_text("x") is None
    assert "null" in block.check_text(None) and "empty" in block.check_text(" ") and "int" in block.check_text(3)


def test_golden_pick_format(block):
    pick, plain, chat = block.pick_format, make_tokenizer(chat=False), make_tokenizer(chat=True)
    assert pick("auto", "chat", None, chat).name == "chat"
    assert pick("auto", "chat", "qa", chat).name == "qa"  # what the earlier stage was trained on goes on
    assert pick("auto", "chat", None, plain).name == "qa"
    assert pick("qa", "chat", "chat", chat).name == "qa"
    with pytest.raises(UserError, match="no chat template"):
        pick("chat", "qa", None, plain)


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
    tokenizer = made(name)
    qa = block.PromptFormat(tokenizer, "qa")
    ids, mask = qa.encode([user("What is the capital of France?"), assistant("The capital")])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    prompt, answer = tokens[: mask.index(1)], tokens[mask.index(1) :]
    if name == "wordpiece+be":
        assert prompt[-1] == ":" and answer == ["the", "capital", "[SEP]"]
    else:
        assert prompt[-1].endswith(":") and answer[0][0] in "Ġ▁" and len(answer[0]) > 1
    # Where no token lies across the cut, the ids are those of the tokenizer's own reading of the whole text.
    text = "Question: What is the capital of France?\n\nAnswer: The capital"
    assert ids[len(qa.bos) : -1] == tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- chats, every template that TRL ships

THOUGHT = "<think>\n\n</think>\n\n"
# start of the template's name: (what it writes between its generation prompt and the answer, what ends the turn,
# earlier turns: trained on like the last, trained on without the token that ends them, or left as context)
EXPECTED = {
    "cohere": ("", "<|END_OF_TURN_TOKEN|>", "all"),
    "cohere2": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "all"),
    "deepseek": ("", "<｜end▁of▁sentence｜>", "all"),
    "diffusion_gemma": ("", "<turn|>", "all"),
    "gemma": ("", "<end_of_turn>", "all"),
    "gemma4": ("", "<turn|>", "all"),
    "glm4moe": ("\n<think></think>\n", "<|user|>", "all"),
    "gptoss": ("<|channel|>final<|message|>", "<|return|>", "no end"),
    "idefics3": (" ", "<end_of_utterance>", "all"),
    "lfm2": ("", "<|im_end|>", "all"),
    "llama3": ("", "<|eot_id|>", "all"),
    "llava_next": (" ", "</s>", "all"),
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
    "qwen3_5_think": (THOUGHT.removeprefix("<think>\n"), "<|im_end|>", "context"),
    "qwen3_5_think_training": (THOUGHT.removeprefix("<think>\n"), "<|im_end|>", "all"),
    "qwen3_6": (THOUGHT.removeprefix("<think>\n"), "<|im_end|>", "context"),
    "qwen3_6_training": (THOUGHT.removeprefix("<think>\n"), "<|im_end|>", "all"),
    "qwen3_8": (THOUGHT.removeprefix("<think>\n"), "<|im_end|>", "all"),
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


@pytest.mark.parametrize("name", templates.NAMES)
def test_every_template_trains_on_the_answers_and_what_ends_them(block, name):
    tokenizer = templates.make_tokenizer(name)
    chat_format = block.PromptFormat(tokenizer, "chat")
    before, end, earlier = expected(name)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for system in (False, True):
        for turns in range(1, 7):
            for pairs in (templates.make_chat(turns)[::2], ODD):
                chat = [{"role": "system", "content": "Be brief.\n\n</s>"}] if system else []
                for i in range(turns):
                    question, answer = (
                        (pairs[i]["content"], f"Answer {i}.\nIt is.") if pairs is not ODD else ODD[(turns + i) % 6]
                    )
                    chat += [user(question), assistant(answer)]
                ids, mask = chat_format.encode(chat)
                prompt = chat_format.encode(chat[:-1], open_end=True)[0]
                assert ids[: len(prompt)] == prompt
                assert mask[len(prompt) :] == [1] * (len(ids) - len(prompt))

                texts = templates.trained_texts(chat_format, chat)
                answers = [message["content"] for message in chat if message["role"] == "assistant"]
                if earlier == "context":
                    answers = answers[-1:]
                assert len(texts) == len(answers)
                for i, (text, answer) in enumerate(zip(texts, answers)):
                    ended = end if earlier != "no end" or i == turns - 1 else ""
                    assert text.startswith(before) and text.endswith(ended)
                    assert text.removeprefix(before).removesuffix(ended).strip() == answer.strip()
                # Special ids come from the template alone: as many as with harmless contents.
                harmless = [{**message, "content": "x"} for message in chat]
                count = sum(token in special for token in ids)
                assert count == sum(token in special for token in chat_format.encode(harmless)[0])


def test_every_template_is_listed_as_expected():
    assert len(templates.NAMES) >= 60
    assert all(any(name.startswith(start) for start in EXPECTED) for name in templates.NAMES)


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "nemotron_3_nano", "glm4moe", "deepseek_r1_distill_training"]
)
@pytest.mark.parametrize("special", [False, True])
def test_thoughts_in_the_data_are_trained_on_as_thoughts(block, name, special):
    tokenizer = templates.make_tokenizer(name)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat_format = block.PromptFormat(tokenizer, "chat")
    chat = [
        user("1+1?"),
        assistant("<think>\nEasy.\n</think>\n\n2."),
        user("2+2?"),
        assistant("<think>\nSum.\n</think>\n\n4."),
    ]
    texts = templates.trained_texts(chat_format, chat)
    assert "Sum." in texts[-1] and "4." in texts[-1]
    assert "</think>" in texts[-1]
    thought = [i for i, token in chat_format.tokenizer.added_tokens_decoder.items() if str(token) == "</think>"]
    ids, mask = chat_format.encode(chat)
    assert [token for token, trained in zip(ids, mask) if trained].count(thought[0]) == len(texts)
    if name in ("qwen3", "qwen3_5_think"):  # these drop the thoughts of earlier turns: context, not trained on
        assert len(texts) == 1 and "Easy" not in chat_format.tokenizer.decode(ids)


def test_a_template_that_drops_thoughts_of_the_last_answer_is_refused(block):
    chat_format = block.PromptFormat(templates.make_tokenizer("deepseek_r1_distill"), "chat")
    with pytest.raises(UserError, match="does not write the whole answer"):
        chat_format.encode([user("1+1?"), assistant("<think>\nEasy.\n</think>\n\n2.")])


def refused(block, template, chat):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        block.PromptFormat(tokenizer, "chat").encode(chat)
    return str(error.value)


def test_templates_that_cannot_be_right_are_refused_with_the_reason(block):
    chat = [user("a b"), assistant("c d"), user("e"), assistant("f")]
    loop = "{% for m in messages %}"
    assert "does not write the texts" in refused(block, "hello", chat)
    assert "does not write the texts" in refused(block, "{{ raise_exception('no') }}", chat)
    other_prompt = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'")
    assert "after its generation prompt" in refused(block, other_prompt, chat)
    short = loop + "{{ m['content'][:1] }}<|im_end|>{% endfor %}"
    assert "leaves out text of turn 0 (user)" in refused(block, short, chat)
    short = loop + "{{ m['content'] if m['role'] == 'user' else m['content'][:1] }}<|im_end|>{% endfor %}"
    assert "does not write the whole answer" in refused(block, short, chat[:2])


def test_a_template_without_a_token_that_ends_turns_gets_eos_once(block):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
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


def test_stop_ids_are_a_set(block):
    class GenerationConfig:
        eos_token_id = [7, 9]

    chat_format = block.PromptFormat(templates.make_tokenizer("llama3_2"), "chat")
    turn = chat_format.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert chat_format.stop_ids(GenerationConfig) == sorted({7, 9, turn})
    glm = block.PromptFormat(templates.make_tokenizer("glm4moe"), "chat")
    assert set(glm.tokenizer.convert_ids_to_tokens(glm.stop_ids())) == {"<eos>", "<|user|>"}


@pytest.mark.parametrize("name", templates.NAMES)
def test_the_ids_are_those_of_the_tokenizers_own_reading(block, name):
    """Cutting a chat into pieces changes nothing where no token lies across a cut."""
    chat_format = block.PromptFormat(templates.make_tokenizer(name), "chat")
    chat = [user("The fox"), assistant("The lazy dog."), user("The dog, the fox?"), assistant("The quick fox.")]
    ids = chat_format.encode(chat)[0]
    whole = chat_format.tokenizer(chat_format._render(chat), add_special_tokens=False)["input_ids"]
    if name.startswith("glm4moe"):
        whole = [*whole, ids[-1]]  # this template leaves the last turn open
    assert ids == whole[: len(ids)]


SOME = ["llama3_2", "qwen3", "gemma", "gptoss", "phi3", "glm4moe"]
FORMATS = {}


@pytest.mark.parametrize("name", SOME)
@FAST
@given(contents=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
def test_chats_with_any_text(block, name, contents):
    if name not in FORMATS:
        FORMATS[name] = block.PromptFormat(templates.make_tokenizer(name), "chat")
    chat_format = FORMATS[name]
    chat = [turn for question, answer in contents for turn in (user(question), assistant(answer))]
    ids, mask = chat_format.encode(chat)
    prompt = chat_format.encode(chat[:-1], open_end=True)[0]
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt) :] == [1] * (len(ids) - len(prompt))
    before, end, _ = expected(name)
    answer = chat_format.tokenizer.decode(ids[len(prompt) :])
    assert answer.removeprefix(before).removesuffix(end).strip() == contents[-1][1].strip()
    special = [i for i, token in chat_format.tokenizer.added_tokens_decoder.items() if token.special]
    harmless = [{**message, "content": "x"} for message in chat]
    count = [sum(token in special for token in chat_format.encode(turns)[0]) for turns in (chat, harmless)]
    assert count[0] == count[1]


def instructed(block, name):
    """A PromptFormat with the tokenizer `name` and a template in the way of Llama 2."""
    if name not in FORMATS:
        tokenizer = made(name)
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST]' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + ' ' + eos_token + '\n' }}{% endif %}{% endfor %}"
        )
        FORMATS[name] = block.PromptFormat(tokenizer, "chat")
    return FORMATS[name]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("wordpiece+be", "phrases+b")])
def test_chats_read_as_the_tokenizer_reads_them(block, name):
    chat_format = instructed(block, name)
    chat = [user("Why"), assistant("The capital"), user("a b"), assistant("of France")]
    text = "<s>[INST]Why [/INST] The capital </s>\n<s>[INST]a b [/INST] of France </s>"
    assert chat_format.encode(chat)[0] == chat_format.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "wordpiece+be"])
@FAST
@given(contents=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
def test_chats_with_any_text_and_every_kind_of_tokenizer(block, name, contents):
    chat_format = instructed(block, name)
    tokenizer = chat_format.tokenizer
    chat = [turn for question, answer in contents for turn in (user(question), assistant(answer))]
    ids, mask = chat_format.encode(chat)
    prompt = chat_format.encode(chat[:-1], open_end=True)[0]
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt) :] == [1] * (len(ids) - len(prompt))
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == len(contents)
    assert [token for token, trained in zip(ids, mask) if trained].count(tokenizer.eos_token_id) == len(contents)
    trained = [text.removesuffix("</s>").strip() for text in templates.trained_texts(chat_format, chat)]
    assert trained == [answer.strip() for _, answer in contents]
