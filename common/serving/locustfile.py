"""Load for Locust: users who stream chat answers, their number rising in steps. Run by `common.serving.loadtest`.

LOAD_PLAN in the environment is JSON: levels, seconds, prompts, request, key, output (a file that gets one JSON line
for each step and each request).
"""

import json
import os
import random
import time

import gevent
from locust import HttpUser, LoadTestShape, task

PLAN = json.loads(os.environ["LOAD_PLAN"])
OUTPUT = open(PLAN["output"], "a", buffering=1)  # noqa: SIM115 - open for the life of the process


def log_line(**line) -> None:
    OUTPUT.write(json.dumps(line) + "\n")


class Steps(LoadTestShape):
    """levels[0] users for `seconds`, then levels[1], ..."""

    step = -1

    def tick(self) -> tuple[int, float] | None:
        step = int(self.get_run_time() // PLAN["seconds"])
        if step > self.step:
            self.step = step
            log_line(step=step, time=time.time())
        if step == len(PLAN["levels"]):
            return None
        return PLAN["levels"][step], 100  # users, and how many may start per second


class Client(HttpUser):
    """Sends the next request when the last one is answered; a refused one waits as long as Retry-After says."""

    @task
    def chat(self):
        body = PLAN["request"] | {"messages": [{"role": "user", "content": random.choice(PLAN["prompts"])}]}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Authorization": f"Bearer {PLAN['key']}"}
        start, arrivals, tokens = time.time(), [], 0
        with self.client.post(
            "/v1/chat/completions", json=body, headers=headers, stream=True, timeout=120, catch_response=True
        ) as answer:
            for line in answer.iter_lines() if answer.status_code == 200 else ():
                if line in (b"", b"data: [DONE]"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                elif event.get("choices") and event["choices"][0]["delta"]["content"]:
                    arrivals.append(time.time() - start)
            if not tokens:
                answer.failure(f"status {answer.status_code}")
            log_line(start=start, status=answer.status_code, arrivals=arrivals, tokens=tokens)
        if answer.status_code == 429:
            gevent.sleep(float(answer.headers["Retry-After"]))
