"""The course's methods on one model: how much each loses, and how sure that is.

    python -m benchmarks.compare [--profile auto] [--windows N] [--items N] [--nsamples N] [--methods ...]

Perplexity on four texts, KL divergence and flipped tokens on the leads, three tasks; everything paired with the
original on the same windows and items, with 95 % intervals. Calibration sees the train split of `wiki-topics`, so that
two topics are new to every method. Then: how wide the intervals are with fewer items, which pairs of methods can be
told apart, and which rankings of the first edition (`results/`) are no longer so.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations

import pandas as pd
import torch
from torch import Tensor, nn

from common.course.assets import load_model, load_tokenizer
from common.course.environment import prepare
from common.course.settings import PROFILES
from common.course.text import calibration_windows, load_corpus, texts_for_testing
from common.measure import tasks
from common.measure.evaluation import Baseline, Quality, better, compare, estimate, evaluate
from common.measure.results import Recorder
from common.methods.awq import awq_model
from common.methods.blocks import iter_linears
from common.methods.pruning import PruneConfig, prune_model
from common.methods.quantization import QuantizeConfig, gptq_model, rtn_model
from tools import tables

CORPUS_OF = {
    "leads": "wiki-leads",
    "unseen topics": "wiki-topics",
    "chat": "wiki-leads, chat",
    "French": "wiki-leads-fr",
}
FIRST_EDITION = {  # what `make bench` called them
    "RTN 4 bits": "gptq-w4-g64-asym/RTN",
    "GPTQ 4 bits": "gptq-w4-g64-asym/ours",
    "GPTQ 3 bits": "gptq-w3-g64-asym/ours",
    "AWQ 4 bits": "awq-w4-g64-asym/ours",
    "NF4": "nf4/bitsandbytes",
    "Wanda 50 %": "wanda-50/ours",
    "SparseGPT 50 %": "sparsegpt-50/ours",
}
# QLoRA (arXiv:2305.14314), appendix E: quantiles of the normal distribution, with an exact zero.
_BELOW = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
_ABOVE = [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]
NF4 = torch.tensor([*_BELOW, 0.0, *_ABOVE])


def nf4(weight: Tensor, block: int = 64) -> Tensor:
    """`weight` rounded to NF4: blocks of 64, each divided by its largest absolute value (as bitsandbytes does)."""
    blocks = weight.float().view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    levels = NF4.to(weight.device)
    codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * scale).view_as(weight)


@torch.no_grad()
def nf4_model(model: nn.Module) -> None:
    """NF4 for every linear layer of the decoder blocks, in place."""
    for _, linear in iter_linears(model):
        linear.weight.copy_(nf4(linear.weight))


def methods(plain: Tensor, chats: Tensor | None, batch_size: int) -> dict[str, Callable[[nn.Module], object]]:
    """Name → what compresses a model in place, with the calibration windows it gets."""
    four, three = QuantizeConfig(4, 64), QuantizeConfig(3, 64)
    data = {"windows": plain, "batch_size": batch_size}
    found = {
        "RTN 4 bits": partial(rtn_model, config=QuantizeConfig(4, 64, mse=False)),
        "GPTQ 4 bits": partial(gptq_model, config=four, **data),
        "GPTQ 3 bits": partial(gptq_model, config=three, **data),
        "AWQ 4 bits": partial(awq_model, config=four, **data),
        "NF4": nf4_model,
        "Wanda 50 %": partial(prune_model, config=PruneConfig("wanda"), **data),
        "SparseGPT 50 %": partial(prune_model, config=PruneConfig("sparsegpt"), **data),
    }
    if chats is not None:
        found["GPTQ 4 bits, chats"] = partial(gptq_model, config=four, **data | {"windows": chats})
    return found


class Measure:
    """Texts and items, the original's results on them, and the recorder of what is compared with these."""

    def __init__(self, settings, tokenizer, original: nn.Module):
        self.settings, self.tokenizer, self.recorder = settings, tokenizer, Recorder(settings)
        self.texts = texts_for_testing(tokenizer, settings.seqlen, settings.quality_windows)
        self.items = {task: tasks.make_items(task, settings.task_items) for task in tasks.CHANCE}
        self.kept = Baseline(settings.quality_windows)
        self.quality, self.right = {}, {}
        self(original, "original")

    def __call__(self, model: nn.Module, name: str) -> None:
        """Measure a model and record it; the first one is the original."""
        first = not self.quality
        self.quality[name], self.right[name] = {}, {}
        for text, windows in self.texts.items():
            options = {} if text != "leads" else {"keep": self.kept} if first else {"against": self.kept}
            self.quality[name][text] = evaluate(model, windows, **options)
        for task, items in self.items.items():
            self.right[name][task] = tasks.answers(model, self.tokenizer, items)
        self._record(name, first)

    def _record(self, name: str, first: bool) -> None:
        settings, n = self.settings, self.settings.task_items
        for text, quality in self.quality[name].items():
            reference = None if first else self.quality["original"][text]
            self.recorder.quality(quality, artifact=name, reference=reference, corpus=CORPUS_OF[text])
        for task, right in self.right[name].items():
            found = tasks.flips(right, self.right["original"][task])
            protocol = {"task": task, "items": n, "chance": tasks.CHANCE[task], "dtype": str(settings.dtype)}
            same = {"artifact": name, "protocol": protocol, "n": n}
            self.recorder.estimate("accuracy", found.accuracy, "share", **same)
            if not first:
                self.recorder.estimate("accuracy-difference", found.difference, "share", **same)
                for key, value, unit in (
                    ("lost", found.lost, "items"),
                    ("won", found.won, "items"),
                    ("p", found.p, "p"),
                ):
                    self.recorder.record(key, value, unit, **same)

    def table(self) -> pd.DataFrame:
        """A row per model, each figure with its 95 % interval."""
        rows = {}
        for name, texts in self.quality.items():
            row = {}
            for text, quality in texts.items():
                row[text] = f"{quality.perplexity:.2f}"
                if name != "original":
                    ratio = compare(quality, self.quality["original"][text]).ratio
                    row[text] += f"  ×{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            if name != "original":
                row["KL"] = _kl(texts["leads"])
                row["flips"] = f"{compare(texts['leads'], self.quality['original']['leads']).flips:.1%}"
            for task, right in self.right[name].items():
                found = tasks.flips(right, self.right["original"][task])
                row[task] = f"{found.accuracy.value:.1%}"
                if name != "original":
                    row[task] += f"  {100 * found.difference.value:+.1f} ± {100 * _half(found.difference):.1f}"
                    row[task] += f" (−{found.lost} +{found.won})"
            rows[name] = row
        return pd.DataFrame(rows)

    def widths(self, name: str = "GPTQ 3 bits") -> pd.DataFrame:
        """Items → half widths of the intervals of accuracy and of the paired difference, in percentage points."""
        counts = [n for n in (50, 100, 200, 500, 1000, 2000) if n <= self.settings.task_items]
        rows = {}
        for task, right in self.right[name].items():
            for count, (alone, paired) in tasks.widths(right, self.right["original"][task], counts).items():
                rows.setdefault(count, {})[task] = f"± {100 * alone:.1f} alone, ± {100 * paired:.1f} paired"
                for key, value in (("half-width", alone), ("half-width-paired", paired)):
                    protocol = {"task": task, "items": count}
                    self.recorder.record(key, value, "share", artifact=name, protocol=protocol, n=count)
        return pd.DataFrame(rows).T

    def told_apart(self, a: str, b: str) -> str:
        """On which of the texts and tasks a and b differ beyond the interval, and in whose favour."""
        found = {}
        for text in self.texts:
            one, other = self.quality[a][text], self.quality[b][text]
            found[text] = a if better(one, other) else b if better(other, one) else "="
        for task in self.items:
            difference = tasks.flips(self.right[a][task], self.right[b][task]).difference
            found[task] = a if difference.low > 0 else b if difference.high < 0 else "="
        return ", ".join(f"{where} {winner}" for where, winner in found.items())


def _kl(quality: Quality) -> str:
    if len(quality.divergences) < 2:
        return f"{quality.kl:.3f}"
    kl = estimate(quality.divergences)
    return f"{kl.value:.3f} [{kl.low:.3f}, {kl.high:.3f}]"


def _half(interval) -> float:
    return (interval.high - interval.low) / 2


def changed_rankings(quality: dict[str, Quality]) -> list[str]:
    """Pairs of methods that the first edition ranked the other way round, or that the interval does not tell apart."""
    lines = []
    old = [r for r in tables.committed() if r["notebook"] == "bench" and r["key"] == "perplexity"]
    for device in sorted({r["device"] for r in old}):
        before = {r["artifact"]: r["value"] for r in old if r["device"] == device}
        known = [name for name, artifact in FIRST_EDITION.items() if artifact in before and name in quality]
        for a, b in combinations(known, 2):
            if before[FIRST_EDITION[a]] > before[FIRST_EDITION[b]]:
                a, b = b, a  # the first edition said: a is better
            if better(quality[a], quality[b]):
                continue
            verdict = "the other way round" if better(quality[b], quality[a]) else "not told apart"
            figures = f"{before[FIRST_EDITION[a]]:.2f} < {before[FIRST_EDITION[b]]:.2f}"
            now = f"{quality[a].perplexity:.2f}, {quality[b].perplexity:.2f}"
            lines.append(f"{a} before {b} ({device}: {figures}): now {now}, {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="The course's methods on one model, paired with the original.")
    parser.add_argument("--profile", default="auto", choices=("auto", *PROFILES))
    parser.add_argument("--model", default="embedded")
    for name, row in (("windows", "quality_windows"), ("items", "task_items"), ("nsamples", "nsamples")):
        parser.add_argument(f"--{name}", type=int, dest=row, help=f"instead of the profile's {row}")
    parser.add_argument("--methods", nargs="*", help="only these, such as 'GPTQ 4 bits'")
    options = vars(parser.parse_args())
    settings = prepare("benchmark", "compare", options.pop("profile"), options.pop("model"))
    chosen = options.pop("methods")
    settings = settings.replace(**{name: value for name, value in options.items() if value})
    tokenizer, corpus = load_tokenizer(settings.model), load_corpus("wiki-topics")
    sizes = (settings.nsamples, settings.seqlen, settings.seed)
    plain = calibration_windows(tokenizer, corpus, *sizes)
    chats = calibration_windows(tokenizer, corpus, *sizes, chat=True) if tokenizer.chat_template else None

    start = time.perf_counter()
    original = load_model(settings.model, settings.dtype, settings.device)
    measure = Measure(settings, tokenizer, original)
    print(f"original measured, {time.perf_counter() - start:.0f} s", flush=True)
    for name, compress in methods(plain, chats, settings.batch_size).items():
        if chosen is None or name in chosen:
            model = copy.deepcopy(original)
            compress(model)
            measure(model, name)
            print(f"{name}, {time.perf_counter() - start:.0f} s", flush=True)
            del model
    names = [name for name in measure.quality if name != "original"]
    with pd.option_context("display.max_colwidth", None, "display.width", 250):
        print(measure.table().T.to_string())
        if "GPTQ 3 bits" in names:
            print(f"\nitems → 95 % interval of GPTQ 3 bits, percentage points\n{measure.widths().to_string()}")
    print("\nWho is better, beyond the interval (=: not told apart):")
    print("\n".join(f"  {a} | {b}: {measure.told_apart(a, b)}" for a, b in combinations(names, 2)))
    changed = changed_rankings({name: texts["leads"] for name, texts in measure.quality.items()})
    print("\nRankings of the first edition that do not stand:\n  " + ("\n  ".join(changed) or "none"))
    print(f"\nFigures: {measure.recorder.file}")


if __name__ == "__main__":
    main()
