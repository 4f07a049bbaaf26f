"""Text on its way to tokens and back: nobody types a control token, and streamed pieces are the whole text."""

import copy

import httpx
import pytest
from fuzz_serving import check_text, make_syllables, streamed, until_stopped
from hypothesis import given
from hypothesis import strategies as st
from serving_tools import TEMPLATE, listening, make_engine

from common.serving.prompts import Prompts
from common.serving.schemas import ChatRequest, CompletionRequest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
HEADERS = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
INST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
)
FAMILIES = {
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "Llama 3": (HEADERS, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "Llama 2": (INST, ["<s>", "</s>", "<think>", "</think>"]),
}


@pytest.fixture(params=FAMILIES)
def family(request, tokenizer):
    """The byte tokenizer with the control tokens and the template of a family."""
    template, special = FAMILIES[request.param]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer, special


def chat(*contents):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return ChatRequest(model="m", messages=messages)


def test_honest_messages_are_tokenized_as_ever(family):
    tokenizer, _ = family
    body = chat("Hi <b>there</b> <|im_ 結", "  yes ", "\nand?\n")
    expected = tokenizer.apply_chat_template([m.plain() for m in body.messages], add_generation_prompt=True)
    expected = expected if isinstance(expected, list) else expected["input_ids"]
    assert Prompts(tokenizer, "m", 1000).tokens(body) == expected


def test_control_tokens_in_messages_are_text(family):
    tokenizer, special = family
    prompts = Prompts(tokenizer, "m", 2000)
    first = min(tokenizer.convert_tokens_to_ids(special))
    control = [[t for t in prompts.tokens(chat(*c)) if t >= first] for c in (("a", "b", "c"), ("x", "y", "z"))]
    assert control[0] == control[1] != []
    for token in special:
        for typed in (token, f"a{token}b", token * 3, token[:2] + token + token[2:], f"{token} x {special[0]}"):
            tokens = prompts.tokens(chat(typed, f"b {typed}", typed))
            assert [t for t in tokens if t >= first] == control[0], typed
            if token != "</think>":  # what comes before it, this template drops
                assert tokenizer.decode(tokens).count(typed) >= 2  # and nothing of what was typed is lost


@given(typed=st.lists(st.sampled_from(["<s>", "</s>", "<think>", "</think>", "<", "/s>", "a", "結", "[INST]"])))
def test_any_mixture_of_control_tokens_is_text(tokenizer, typed):
    template, special = FAMILIES["Llama 2"]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    tokens = Prompts(tokenizer, "m", 2000).tokens(chat("".join(typed)))
    assert [t for t in tokens if t > 255] == tokenizer.convert_tokens_to_ids(["<s>"])


def test_a_prompt_made_by_hand_keeps_its_control_tokens(family):
    tokenizer, special = family
    tokens = Prompts(tokenizer, "m", 100).tokens(CompletionRequest(model="m", prompt=f"a{special[0]}b"))
    assert tokenizer.convert_tokens_to_ids(special[0]) in tokens


def test_the_service_takes_control_tokens_for_text(llama, tokenizer):
    """Every character of what was typed is a token of its own; a control token would be one in all."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    special = tokenizer.eos_token  # one character, two bytes
    with listening(make_engine(llama, tokenizer)) as url:
        body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": f"a{special}b"}]}
        used = httpx.post(f"{url}/v1/chat/completions", json=body).json()["usage"]
    assert used["prompt_tokens"] == len("user: ab\nassistant:") + len(special.encode())


def test_an_answer_holds_no_control_tokens(family):
    tokenizer, special = family
    tokens = tokenizer("a").input_ids + tokenizer.convert_tokens_to_ids(special) + tokenizer("b").input_ids
    assert streamed(tokenizer, tokens, []) == "ab"


# --- back to text ---


@pytest.fixture(scope="session", params=["byte level", "byte fallback"])
def syllables(request):
    return make_syllables(fallback=request.param == "byte fallback")


def test_the_beginning_of_a_stop_string_waits_for_an_unfinished_character(tokenizer):
    assert streamed(tokenizer, tokenizer("xx結果").input_ids, ["x結"]) == "x"


def test_an_unfinished_character_is_no_stop_string(tokenizer):
    assert streamed(tokenizer, tokenizer("a結b").input_ids, ["\ufffd"]) == "a結b"


@given(st.data())
def test_streamed_text_is_the_whole_text_cut_at_the_stop(syllables, data):
    """Any tokens, with characters cut anywhere or never finished, and any stop strings."""
    tokens = data.draw(st.lists(st.integers(0, len(syllables) - 1), min_size=1, max_size=12))
    stop = data.draw(st.lists(st.text("xy結果.\ufffd", min_size=1, max_size=4), max_size=3))
    check_text(syllables, tokens, stop)


@pytest.fixture(scope="session")
def pieces_of_bytes():
    return make_syllables()


@given(
    text=st.text("xy結果.", min_size=1, max_size=10), stop=st.text("xy結果.", min_size=1, max_size=3), data=st.data()
)
def test_the_split_into_tokens_changes_nothing(pieces_of_bytes, text, stop, data):
    symbols = "".join(pieces_of_bytes.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0])
    vocabulary, tokens = pieces_of_bytes.get_vocab(), []
    while symbols:
        fitting = [n for n in (1, 2, 3) if len(symbols) >= n and symbols[:n] in vocabulary]
        length = data.draw(st.sampled_from(fitting))
        tokens, symbols = [*tokens, vocabulary[symbols[:length]]], symbols[length:]
    assert streamed(pieces_of_bytes, tokens, [stop]) == until_stopped(text, [stop])
