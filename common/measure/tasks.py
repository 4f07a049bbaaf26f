"""Tasks: questions with right answers, scored by log-likelihood as lm-evaluation-harness does.

Three tasks need no network. They are made by code from the leads of the embedded corpus, and written as the harness's
own task files, so that its command line runs them too:

    lead_last_word   the last word of a lead, given everything before it; right where greedy decoding writes it
    title_of_lead    which of four titles belongs to a lead in which its title is blotted out
    lead_of_title    which of four leads, their titles blotted out, belongs to a title

Wrong choices are of the same topic. `answers` is our own short scorer; `harness` is the field's standard and also takes
the names of its own tasks, which are fetched from the Hub (`HUB_TASKS`). Both give the same answers (tests).
"""

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from common.course.text import Article, articles, split_of
from common.measure.evaluation import Estimate, estimate

CHANCE = {"lead_last_word": 0.0, "title_of_lead": 0.25, "lead_of_title": 0.25}
HUB_TASKS = ("arc_easy", "hellaswag", "piqa", "lambada_openai", "winogrande", "gsm8k", "tmmluplus")
CHOICES = 4
WORDS = 40  # of a lead that a choice or a question shows
BLOT = "____"
TOKENS_TOGETHER = 4096  # read in one pass


@dataclass(frozen=True)
class Item:
    """One question. With a single choice the answer counts as right where greedy decoding writes it."""

    context: str
    choices: list[str]
    answer: int  # index of the right choice


# --- making items ----------------------------------------------------------------------------------------------------


def make_items(task: str, count: int) -> list[Item]:
    """The first `count` items of an offline task, the same on every machine.

    Leads of the test split come first, then valid, then train: about a thousand are no calibration text; of more than
    that, 64 × 512 calibration tokens may have held 3 in 100. ValueError where the corpus has fewer.
    """
    if task not in CHANCE:
        raise ValueError(f"No offline task {task!r}; choose {', '.join(CHANCE)}.")
    ordered = sorted(articles(), key=lambda article: ("test", "valid", "train").index(split_of(article.title)))
    usable = [article for article in ordered if len(_blotted(article).split()) >= WORDS // 2]
    if count > len(usable):
        raise ValueError(f"Task {task} has {len(usable)} items, {count} were asked for.")
    if task == "lead_last_word":
        items = (_last_word(article) for article in usable)
        return [item for item in items if item][:count]
    topics: dict[str, list[Article]] = {}
    for article in usable:
        topics.setdefault(article.topic, []).append(article)
    generator = random.Random(0)
    return [_four(task, article, topics[article.topic], generator) for article in usable[:count]]


def _last_word(article: Article) -> Item | None:
    """None where a lead does not end in a plain word and a full stop."""
    match = re.fullmatch(r"(.*\S) ([A-Za-z]{2,})\.", article.document, re.DOTALL)
    return Item(match[1], [match[2]], 0) if match else None


def _four(task: str, article: Article, others: list[Article], generator: random.Random) -> Item:
    chosen = [article]
    while len(chosen) < CHOICES:
        other = others[int(generator.random() * len(others))]
        if other not in chosen:
            chosen.append(other)
    answer = int(generator.random() * CHOICES)
    chosen[0], chosen[answer] = chosen[answer], chosen[0]
    if task == "title_of_lead":
        question = f"{_blotted(article)}\n\nThe title of this article is"
        return Item(question, [other.title for other in chosen], answer)
    return Item(f"{article.title}:", [_blotted(other) for other in chosen], answer)


def _blotted(article: Article) -> str:
    """The first words of a lead without its title, which would give the answer away."""
    title = re.sub(r"\s*\(.*\)$", "", article.title)  # Mercury (planet)
    names = [title, *(word for word in title.split() if len(word) > 3)]
    pattern = "|".join(re.escape(name) for name in names)
    return " ".join(re.sub(pattern, BLOT, article.lead, flags=re.IGNORECASE).split()[:WORDS])


# --- scoring ---------------------------------------------------------------------------------------------------------


def answers(model: nn.Module, tokenizer, items: list[Item]) -> Tensor:
    """Which items a model answers right: bool [items].

    The chosen answer has the highest log-likelihood per character (the harness's acc_norm); a single choice must be
    what greedy decoding writes.
    """
    pairs = [(item.context, " " + choice) for item in items for choice in item.choices]
    scores, right = iter(log_likelihoods(model, tokenizer, pairs)), []
    for item in items:
        scored = [next(scores) for _ in item.choices]
        if len(item.choices) == 1:
            right.append(scored[0][1])
        else:
            per_character = [total / len(choice) for (total, _), choice in zip(scored, item.choices, strict=True)]
            right.append(per_character.index(max(per_character)) == item.answer)
    return torch.tensor(right)


@torch.no_grad()
def log_likelihoods(model: nn.Module, tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """For each (context, continuation): log p(continuation | context) in nats, and whether it is the greedy one."""
    model.eval()
    encoded = [_encode(tokenizer, *pair) for pair in pairs]
    longest_first = sorted(range(len(pairs)), key=lambda i: -len(encoded[i][0]))
    found: list = [None] * len(pairs)
    progress = tqdm(total=len(pairs), desc="answers", unit="choice", leave=False)
    while longest_first:
        width = len(encoded[longest_first[0]][0]) - 1  # the last token predicts nothing
        together = max(1, TOKENS_TOGETHER // width)
        batch, longest_first = longest_first[:together], longest_first[together:]
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # padded on the right, where no real token looks
        for row, i in enumerate(batch):
            ids[row, : len(encoded[i][0]) - 1] = torch.tensor(encoded[i][0][:-1])
        skip = min(encoded[i][1] for i in batch) - 1  # before it, nothing is asked
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - skip).logits
        scored = []
        for row, i in enumerate(batch):
            tokens, start = encoded[i]
            asked = logits[row, start - 1 - skip : len(tokens) - 1 - skip]
            log_probs = F.log_softmax(asked, dim=-1, dtype=torch.float32)
            target = torch.tensor(tokens[start:], device=ids.device)
            greedy = (log_probs.argmax(-1) == target).all()
            scored.append(torch.stack([log_probs.gather(1, target[:, None]).sum(), greedy.float()]))
        for i, (total, greedy) in zip(batch, torch.stack(scored).tolist(), strict=True):  # one wait for the GPU
            found[i] = (total, greedy == 1)
        progress.update(len(batch))
    progress.close()
    return found


def _encode(tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of both together, and where the continuation begins: the harness's way of splitting them."""
    whole = tokenizer(context + continuation).input_ids
    return whole, len(tokenizer(context).input_ids)


# --- the harness -----------------------------------------------------------------------------------------------------


def write_tasks(folder: Path, count: int) -> None:
    """The offline tasks as the harness's task files: `lm_eval --include_path FOLDER --tasks title_of_lead ...`."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, chance in CHANCE.items():
        data = folder / f"{task}.jsonl"
        items = make_items(task, count)
        data.write_text(
            "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items), encoding="utf-8"
        )
        shared = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "metadata": {"version": 1.0, "chance": chance},
        }
        if chance:
            kind = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
            metric = "acc_norm"
        else:
            kind = {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}"}
            metric = "acc"
        metrics = {"metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]}
        # JSON is YAML, too.
        (folder / f"{task}.yaml").write_text(json.dumps(shared | kind | metrics, indent=1), encoding="utf-8")


def harness(model: nn.Module, tokenizer, tasks: list[str], count: int, folder: Path) -> dict[str, Tensor]:
    """Task → which items a model answers right, bool [items], by lm-evaluation-harness.

    tasks: offline ones (written to `folder`) or names of the harness's own, which need a network.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    write_tasks(folder, count)
    library = HFLM(model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32")
    manager = TaskManager(include_path=str(folder), include_defaults=not set(tasks) <= set(CHANCE))
    found = simple_evaluate(library, tasks=tasks, limit=count, task_manager=manager, bootstrap_iters=0)
    return {task: torch.tensor([_right(sample) for sample in rows]) for task, rows in found["samples"].items()}


def _right(sample: dict) -> bool:
    return bool(sample[next(name for name in ("acc_norm", "acc", "exact_match") if name in sample)])


# --- what the answers say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flips:
    """A model's answers beside the original's, on the same items."""

    accuracy: Estimate
    difference: Estimate  # of the accuracies, paired: most items are answered alike and say nothing of it
    lost: int  # right before, wrong now
    won: int  # wrong before, right now
    p: float  # McNemar's exact test: how likely so uneven a split is where neither is better


def flips(right: Tensor, before: Tensor) -> Flips:
    """Compare answers bool [items] with the original's; ValueError where these are other items."""
    if right.shape != before.shape:
        raise ValueError(f"A paired comparison needs the same items: {len(right)} and {len(before)} answers.")
    lost, won = (before & ~right).sum().item(), (right & ~before).sum().item()
    p = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    return Flips(estimate(right.double()), estimate(right.double() - before.double()), lost, won, float(p))


def widths(right: Tensor, before: Tensor, counts: list[int]) -> dict[int, tuple[float, float]]:
    """Number of items → half the 95 % interval's width, of the accuracy and of the paired difference to `before`."""
    table = {}
    for count in counts:
        found = flips(right[:count], before[:count])
        table[count] = tuple((e.high - e.low) / 2 for e in (found.accuracy, found.difference))
    return table
