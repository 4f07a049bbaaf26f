"""What must hold of streamed text and of server-sent events; and atheris, which looks for what breaks it.

hypothesis tries some in every run of the tests; the nightly run has ten minutes for each:

    python tests/fuzz_serving.py text -max_total_time=600
    python tests/fuzz_serving.py sse -max_total_time=600
"""

import asyncio
import json
import re
import sys
from contextlib import suppress
from functools import partial
from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.serving import backend, sse
from common.serving.detokenize import Detokenizer
from common.serving.schemas import AnswerShape, CompletionRequest

ALPHABET = "xy結果.\ufffd"


def make_syllables(fallback: bool = False) -> PreTrainedTokenizerFast:
    """Tokens of one, two and three bytes, in all ways to cut a text of x, y, 結, 果 (E7 B5 90, E6 9E 9C) and a dot.

    fallback: as in Llama 2, characters and a token such as <0xE7> for each byte.
    """
    if fallback:
        names = [*"xy.結▁", *(f"<0x{byte:02X}>" for byte in "結果x\n".encode())]
        tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(dict.fromkeys(names))}, [], byte_fallback=True))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = list(byte_level.pre_tokenize_str("xy結果.")[0][0])
    vocabulary = [*symbols, *(a + b for a in symbols for b in symbols)]
    vocabulary += [a + b + c for a in symbols[:5] for b in symbols[:5] for c in symbols[:5]]
    vocabulary = {symbol: n for n, symbol in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def streamed(tokenizer, tokens: list[int], stop: list[str]) -> str:
    """What a client gets of these tokens, one after the other."""
    detokenizer, parts = Detokenizer(tokenizer, stop), []
    for n in range(1, len(tokens) + 1):
        parts.append(detokenizer.push(tokens[:n], last=n == len(tokens)))
        if detokenizer.stopped:
            break
    return "".join(parts)


def until_stopped(text: str, stop: list[str]) -> str:
    """By definition, character by character: whichever stop string is complete first ends the text before it."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def check_text(tokenizer, tokens: list[int], stop: list[str]) -> None:
    """Streamed text is the whole text cut at the stop."""
    whole = Detokenizer(tokenizer, []).text(tokens)
    got, expected = streamed(tokenizer, tokens, stop), until_stopped(whole, stop)
    assert got == expected, (tokens, stop, got, expected)


def read_events(body: bytes, cuts: list[int]) -> list[str]:
    """The data of the events in a body that comes in parts."""
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]

    async def chunks():
        for begin, end in pairwise(places):
            yield body[begin:end]

    async def collect(items):
        return [item async for item in items]

    return asyncio.run(collect(sse.read_events(chunks())))


def events_by_the_standard(body: bytes) -> list[str]:
    """The whole body at once, as WHATWG HTML 9.2.6 puts it; an event that no blank line ends is none."""
    events, data = [], []
    lines = re.split(r"\r\n|\n|\r", body.decode())
    for line in lines[:-1]:
        if not line:
            events += ["\n".join(data)] if data else []
            data = []
        elif line == "data" or line.startswith("data:"):
            data.append(re.sub("^data:? ?", "", line))
    return events


def check_written_events(text: str, cuts: list[int]) -> None:
    """Any text comes back from our own events as it was, however they are cut; no line ends within one."""
    shape = AnswerShape(CompletionRequest(model="m", prompt="x"), "id")
    written = sse.event(shape.chunk(text, None, first=True))
    assert len(written.splitlines()) == 2, written
    (data,) = read_events((written * 2).encode(), cuts)[:1]
    assert json.loads(data)["choices"][0]["text"] == text


def check_read_events(body: bytes, cuts: list[int]) -> None:
    """What a model server sends is read as the standard says, or refused; as an answer, too."""
    try:
        expected = events_by_the_standard(body)
    except UnicodeDecodeError:
        expected = None
    try:
        assert read_events(body, cuts) == expected or expected is None, (body, cuts)
    except UnicodeDecodeError:
        assert expected is None, body

    async def answer():
        async def chunks():
            yield body

        return ["" + piece.text async for piece in backend._pieces(chunks())]

    with suppress(backend.UNREADABLE):
        asyncio.run(answer())


def fuzz_text(provider, tokenizers: list[PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers[provider.ConsumeBool()]
    stop = []
    for _ in range(provider.ConsumeIntInRange(0, 3)):
        letters = provider.ConsumeIntListInRange(provider.ConsumeIntInRange(1, 5), 0, len(ALPHABET) - 1)
        stop.append("".join(ALPHABET[n] for n in letters))
    tokens = provider.ConsumeIntListInRange(provider.ConsumeIntInRange(1, 24), 0, len(tokenizer) - 1)
    check_text(tokenizer, tokens, stop)


def fuzz_sse(provider) -> None:
    cuts = provider.ConsumeIntListInRange(provider.ConsumeIntInRange(0, 4), 0, 4096)
    if provider.ConsumeBool():
        check_written_events(provider.ConsumeUnicodeNoSurrogates(200), cuts)
    else:
        check_read_events(provider.ConsumeBytes(400), cuts)


def main() -> None:
    import atheris  # the nightly run alone has it

    tokenizers = [make_syllables(), make_syllables(fallback=True)]
    target = {"text": partial(fuzz_text, tokenizers=tokenizers), "sse": fuzz_sse}[sys.argv.pop(1)]
    for function in (Detokenizer.push, Detokenizer._settled, Detokenizer._begun, sse.read, sse._lines, backend._pieces):
        atheris.instrument_func(function)
    atheris.Setup(sys.argv, lambda data: target(atheris.FuzzedDataProvider(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
