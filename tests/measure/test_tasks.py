"""Tasks made by code, our scorer against the harness, and what paired answers say."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from common.course.text import articles
from common.measure import tasks
from common.measure.tasks import BLOT, Item, answers, flips, log_likelihoods, make_items, widths


@pytest.mark.parametrize("task", list(tasks.CHANCE))
def test_items_are_many_whole_and_the_same(task):
    items = make_items(task, 3000)
    assert len(items) == 3000
    assert items[:20] == make_items(task, 20)
    assert all(0 <= item.answer < len(item.choices) for item in items)
    assert len({item.context for item in items}) > 2990
    if tasks.CHANCE[task]:
        assert {len(set(item.choices)) for item in items} == {4}
        places = torch.tensor([item.answer for item in items]).bincount() / 3000
        assert (places - 0.25).abs().max() < 0.04, "the right choice stands anywhere"


def test_the_title_does_not_stand_in_its_lead():
    for item in make_items("title_of_lead", 300):
        title = item.choices[item.answer].split(" (")[0]
        assert title.lower() not in item.context.lower()
        assert item.context.endswith("\n\nThe title of this article is")
    for item in make_items("lead_of_title", 300):
        assert item.context[:-1].split(" (")[0].lower() not in item.choices[item.answer].lower()
    assert sum(BLOT in item.context for item in make_items("title_of_lead", 300)) > 200


def test_choices_are_of_one_topic():
    topics = {article.title: article.topic for article in articles()}
    for item in make_items("title_of_lead", 100):
        assert len({topics[title] for title in item.choices}) == 1


def test_the_last_word_and_what_stands_before_it():
    documents = {article.document for article in articles()}
    for item in make_items("lead_last_word", 100):
        assert f"{item.context} {item.choices[0]}." in documents


def test_what_there_is_not():
    with pytest.raises(ValueError, match="No offline task 'hellaswag'"):
        make_items("hellaswag", 3)
    with pytest.raises(ValueError, match="items, 1000000 were asked for"):
        make_items("title_of_lead", 10**6)


# --- scoring -------------------------------------------------------------------------------------------------------

ITEMS = [
    Item("Ants dig", ["a lot", "no", "nothing", "sand"], 2),
    Item("A bee", ["flies over the hill", "hums"], 0),
    Item("What is it? It", ["is", "was", "will be one day"], 1),
    Item("The end", ["is"], 0),
]


def test_log_likelihoods_are_those_of_one_pair_at_a_time(llama, tokenizer):
    pairs = [(item.context, " " + choice) for item in ITEMS for choice in item.choices]
    for (context, continuation), (total, greedy) in zip(pairs, log_likelihoods(llama, tokenizer, pairs), strict=True):
        ids = torch.tensor([tokenizer(context + continuation).input_ids])
        log_probs = llama(ids).logits[0, :-1].double().log_softmax(-1)[len(context) - 1 :]
        target = ids[0, len(context) :]
        assert total == pytest.approx(log_probs.gather(1, target[:, None]).sum().item(), rel=1e-5)
        assert greedy == (log_probs.argmax(-1) == target).all().item()


def test_a_greedy_continuation_is_found(llama, tokenizer, monkeypatch):
    ids = torch.tensor([tokenizer("The end").input_ids])
    for _ in range(3):
        ids = torch.cat([ids, llama(ids).logits[:, -1:].argmax(-1)], 1)
    ids = ids[0].tolist()
    monkeypatch.setattr(tasks, "_encode", lambda *_: (ids, 7))  # the tokens need not be text
    assert log_likelihoods(llama, tokenizer, [("", "")])[0][1]
    ids[8] = (ids[8] + 1) % 256
    assert not log_likelihoods(llama, tokenizer, [("", "")])[0][1]


def test_answers_are_chosen_by_likelihood_per_character(monkeypatch):
    """-6 nats for 3 characters is worse than -8 nats for 8."""
    scores = [(-6.0, False), (-8.0, False), (-3.0, True), (-1.0, False)]
    monkeypatch.setattr(tasks, "log_likelihoods", lambda *_: scores)
    items = [Item("q", ["abc", "abcdefgh"], 1), Item("q", ["x"], 0), Item("q", ["y"], 0)]
    assert answers(None, None, items).tolist() == [True, True, False]


@pytest.mark.slow
def test_the_harness_gives_the_same_answers(llama, tokenizer, tmp_path, monkeypatch):
    """Same items, same tiny model: item for item, in all three tasks."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "WORDS", 12)
    llama.config.max_position_embeddings = 2048  # rotary: none is stored
    library = tasks.harness(llama, tokenizer, list(tasks.CHANCE), 12, tmp_path)
    for task in tasks.CHANCE:
        ours = answers(llama, tokenizer, make_items(task, 12))
        assert ours.tolist() == library[task].tolist(), task
    assert 0 < library["title_of_lead"].float().mean() < 1


@pytest.mark.slow
def test_task_files_name_their_data(tmp_path):
    tasks.write_tasks(tmp_path, 5)
    for task in tasks.CHANCE:
        config = json.loads((tmp_path / f"{task}.yaml").read_text())
        data = config["dataset_kwargs"]["data_files"]["test"]
        assert [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()] == [
            {"context": i.context, "choices": i.choices, "answer": i.answer} for i in make_items(task, 5)
        ]


# --- paired answers ------------------------------------------------------------------------------------------------


def test_flips_by_hand():
    before = torch.tensor([True] * 60 + [False] * 40)
    right = before.clone()
    right[:12], right[60:63] = False, True
    found = flips(right, before)
    assert (found.lost, found.won) == (12, 3)
    assert found.accuracy.value == pytest.approx(0.51)
    assert found.difference.value == pytest.approx(-0.09)
    # variance of a paired difference: (lost + won) / n - mean²
    expected = math.sqrt((0.15 - 0.09**2) * 100 / 99 / 100)
    assert found.difference.standard_error == pytest.approx(expected)
    assert found.p == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5))
    assert found.difference.high < 0
    same = flips(before, before)
    assert (same.lost, same.won, same.p, same.difference.high) == (0, 0, 1.0, 0.0)
    with pytest.raises(ValueError, match="same items: 99 and 100"):
        flips(right[:99], before)


def test_four_times_the_items_halve_the_interval():
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(4000, generator=generator) < 0.5
    right = before ^ (torch.rand(4000, generator=generator) < 0.1)
    table = widths(right, before, [1000, 4000])
    for small, large in zip(table[1000], table[4000], strict=True):
        assert small == pytest.approx(2 * large, rel=0.1)
    assert table[1000][1] < 0.75 * table[1000][0], "pairing narrows the interval"
