"""Load test: Locust steps through numbers of users while the service's own metrics are recorded beside it.

python -m common.serving.loadtest                     of a service that it starts itself on the embedded model
python -m common.serving.loadtest --url URL --model NAME    of one that runs (its key in COURSE_API_KEY)
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
from prometheus_client.parser import text_string_to_metric_families

from common.course.settings import load_settings, work_folder
from common.serving import serve

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
ENOUGH_FOR = {50: 3, 95: 20, 99: 100}  # a percentile of fewer requests would be a guess
PROMPTS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a library.",
    "List five fruits and one fact about each.",
    "What is a neural network?",
    "How do plants make food?",
    "Describe a day in the life of a baker.",
    "Why do we sleep?",
]


@dataclass(frozen=True)
class ServiceLevelObjective:
    """The service level objective: a request is good when its first token and its later tokens come in time."""

    ttft: float  # seconds to the first token
    tpot: float  # mean seconds per later token


@dataclass(frozen=True)
class LoadTest:
    """`levels`: one row per number of users. `series`: the service's metrics over time, `seconds` from the start."""

    levels: pd.DataFrame
    series: pd.DataFrame
    steps: list[float]  # seconds at which each level began, and the end

    @property
    def knee(self) -> int:
        """The number of users with the best throughput per latency (power; Kleinrock, 1979).

        By Little's law that is throughput² / users: twice the users must bring 41 % more throughput.
        """
        return int((self.levels["tokens/s"] ** 2 / self.levels.index).idxmax())

    @property
    def breaks(self) -> int | None:
        """The fewest users of whom less than nine in ten answers meet the objective; None if it holds throughout."""
        missed = self.levels.index[self.levels["in SLO"] < 0.9]
        return int(missed[0]) if len(missed) else None


def scrape(url: str, api_key: str = "") -> Counter:
    """The service's metrics now: name → value, summed over labels; histogram buckets as name:upper bound."""
    values, headers = Counter(), {"Authorization": f"Bearer {api_key}"}
    answer = httpx.get(f"{url}/metrics", headers=headers, timeout=10, trust_env=False).raise_for_status()
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            bound = sample.labels.get("le")
            values[f"{sample.name}:{bound}" if bound else sample.name] += sample.value
    return values


def histogram_quantile(q: float, before: Counter, after: Counter, name: str) -> float:
    """What Prometheus' histogram_quantile(q, increase(name_bucket)) gives: linear within a bucket; NaN without data."""
    grown = {float(key.split(":")[1]): after[key] - before[key] for key in after if key.startswith(f"{name}_bucket:")}
    bounds = sorted(grown)
    wanted, lower, below = q * grown[bounds[-1]], 0.0, 0.0
    if not grown[bounds[-1]]:
        return float("nan")
    for bound in bounds:
        if grown[bound] >= wanted:
            inside = grown[bound] - below
            return lower if bound == float("inf") else lower + (bound - lower) * (wanted - below) / inside
        lower, below = bound, grown[bound]
    raise AssertionError("The last bucket holds everything.")


def run(
    url: str,
    model: str,
    *,
    levels: list[int],
    seconds: float,
    max_tokens: int,
    objective: ServiceLevelObjective,
    api_key: str = "",
) -> LoadTest:
    """Load the service at `url` with each number of users in `levels` for `seconds`. Raises when Locust fails."""
    output = work_folder() / "logs" / f"load-{time.time_ns()}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    plan = {
        "levels": levels,
        "seconds": seconds,
        "prompts": PROMPTS,
        "request": {"model": model, "max_tokens": max_tokens, "temperature": 0},
        "key": api_key,
        "output": str(output),
    }
    command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--stop-timeout", "60", "--host", url]
    command += ["--locustfile", str(LOCUSTFILE), "--exit-code-on-error", "0", "--loglevel", "ERROR"]
    rows, done = [], threading.Event()
    watcher = threading.Thread(target=_watch, args=(url, api_key, rows, done), daemon=True)
    watcher.start()
    environment = os.environ | {"LOAD_PLAN": json.dumps(plan)}
    try:
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        done.set()
        watcher.join()
    if finished.returncode != 0:
        raise RuntimeError(f"Locust failed:\n{finished.stderr[-1500:]}")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    begins = [line["time"] for line in lines if "step" in line]
    requests = [line for line in lines if "start" in line]
    table = pd.DataFrame(
        {users: summarize(requests, *begins[n : n + 2], objective) for n, users in enumerate(levels)}
    ).T.rename_axis("users")
    series = pd.DataFrame(rows)
    series.insert(0, "seconds", series.pop("time") - begins[0])
    return LoadTest(table, series, [begin - begins[0] for begin in begins])


def _watch(url: str, api_key: str, rows: list[dict], done: threading.Event) -> None:
    while not done.wait(0.5):
        rows.append({"time": time.time(), **scrape(url, api_key)})


def summarize(requests: list[dict], begin: float, end: float, objective: ServiceLevelObjective) -> dict[str, float]:
    """The figures of one level: requests that began in [begin, end), tokens that came in it."""
    mine = [r for r in requests if begin <= r["start"] < end]
    good = [r for r in mine if r["tokens"]]
    ttft = np.array([r["arrivals"][0] for r in good])
    e2e = np.array([r["arrivals"][-1] for r in good])
    tpot = (e2e - ttft) / np.maximum(1, [r["tokens"] - 1 for r in good])
    came = 0.0  # an event may carry more than one token
    for r in (r for r in requests if r["tokens"]):
        inside = sum(begin <= r["start"] + arrival < end for arrival in r["arrivals"])
        came += inside * r["tokens"] / len(r["arrivals"])
    within = int(((ttft <= objective.ttft) & (tpot <= objective.tpot)).sum())
    figures = {
        "answered": len(good),
        "refused": sum(r["status"] == 429 for r in mine),
        "failed": sum(r["status"] != 429 and not r["tokens"] for r in mine),
        "tokens/s": came / (end - begin),
        "goodput req/s": within / (end - begin),
        "in SLO": within / len(mine) if mine else float("nan"),
    }
    for name, values in (("TTFT", ttft), ("TPOT", tpot), ("E2E", e2e)):
        for q, enough in ENOUGH_FOR.items():
            figures[f"{name} P{q} ms"] = np.percentile(values, q) * 1e3 if len(values) >= enough else float("nan")
    return figures


def main(arguments: list[str] | None = None) -> None:
    settings = load_settings("quantization")
    parser = argparse.ArgumentParser(description="Load-test the service with Locust.")
    parser.add_argument("--url", help="of a running service; without it one is started")
    parser.add_argument("--model", default="embedded", help="model spec, or the name of the running service's model")
    parser.add_argument("--levels", type=int, nargs="+", default=settings.load_levels, help="numbers of users")
    parser.add_argument("--seconds", type=float, default=30, help="per level")
    options = parser.parse_args(arguments)
    objective = ServiceLevelObjective(settings.slo_ttft_ms / 1e3, settings.slo_tpot_ms / 1e3)
    request = {"levels": options.levels, "seconds": options.seconds, "max_tokens": settings.load_tokens}
    if options.url:
        key = os.environ.get("COURSE_API_KEY", "")
        test = run(options.url, options.model, objective=objective, api_key=key, **request)
    else:
        sizes = ("--slots", str(settings.service_slots), "--queue", str(settings.service_queue))
        with serve(options.model, *sizes) as url:
            name = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
            test = run(url, name, objective=objective, **request)
    print(test.levels.round(2).T.to_string())
    print(
        f"\nSLO: first token ≤ {settings.slo_ttft_ms} ms, later tokens ≤ {settings.slo_tpot_ms} ms. Knee: {test.knee}"
    )


if __name__ == "__main__":
    main()
