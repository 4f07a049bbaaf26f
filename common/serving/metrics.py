"""What the service tells Prometheus. Alert rules and dashboard read these names (see Lab 3.1, monitoring/)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60)
TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.5, 1, 2)


class Metrics:
    """One set of metrics per service, in its own registry."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes, process_cpu_seconds_total, ...
        into = {"registry": self.registry}
        self.requests = Counter("llm_requests", "Requests answered, by path and status", ["path", "status"], **into)
        self.errors = Counter("llm_errors", "Requests that failed, by reason", ["reason"], **into)
        self.running = Gauge("llm_requests_running", "Requests being computed", **into)
        self.waiting = Gauge("llm_requests_waiting", "Requests in the queue", **into)
        self.queue_limit = Gauge("llm_queue_limit", "Requests that may wait before others are refused (429)", **into)
        self.first_token = Histogram(
            "llm_time_to_first_token_seconds", "From arrival to the first token (TTFT)", buckets=SECONDS, **into
        )
        self.per_token = Histogram(
            "llm_time_per_output_token_seconds",
            "Mean time between the tokens of a request (TPOT)",
            buckets=TOKEN_SECONDS,
            **into,
        )
        self.duration = Histogram(
            "llm_request_duration_seconds", "From arrival to the last token", buckets=SECONDS, **into
        )
        self.prompt_tokens = Counter("llm_prompt_tokens", "Tokens read", **into)
        self.generated_tokens = Counter("llm_generated_tokens", "Tokens generated", **into)
        # A rate needs a first value: series that appear only with the first failure would hide that failure.
        for reason in ("overloaded", "timeout", "engine", "disconnect"):
            self.errors.labels(reason)
