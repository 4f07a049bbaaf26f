"""The load test's figures, and that alert rules and dashboard read metrics which the service exports."""

import copy
import json
from collections import Counter

import httpx
import numpy as np
import pandas as pd
import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from serving_tools import LIMITS, listening, make_engine

from common.course.settings import ROOT, load_settings
from common.measure import plots
from common.serving import loadtest
from common.serving.loadtest import LoadTest, histogram_quantile, scrape, summarize
from common.serving.loadtest import ServiceLevelObjective as SLO
from common.serving.metrics import SECONDS

MONITORING = ROOT / "03-Model_Compression" / "Lab-3.1-Quantization" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
EXPRESSIONS = [rule["expr"] for rule in RULES] + [t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]]


def request(start, ttft, gap, tokens, status=200):
    return {
        "start": start,
        "status": status,
        "arrivals": [ttft + n * gap for n in range(tokens)],
        "tokens": tokens,
    }


def test_summary_of_known_requests():
    """Ten requests a second apart; every second one misses the SLO's first-token limit."""
    requests = [request(n, 0.5 if n % 2 else 0.1, 0.02, 11) for n in range(10)]
    requests += [request(3, 0, 0, 0, status=429), request(4, 0, 0, 0, status=500), request(20, 0.1, 0.1, 5)]
    figures = summarize(requests, 0, 10, SLO(ttft=0.3, tpot=0.05))
    assert (figures["answered"], figures["refused"], figures["failed"]) == (10, 1, 1)
    assert figures["tokens/s"] == pytest.approx(11)
    assert figures["goodput req/s"] == pytest.approx(0.5)
    assert figures["in SLO"] == pytest.approx(5 / 12)  # a refused or failed request is not good
    assert figures["TTFT P50 ms"] == pytest.approx(300)
    assert figures["TPOT P50 ms"] == pytest.approx(20)
    assert figures["E2E P50 ms"] == pytest.approx(500)
    assert np.isnan(figures["TTFT P95 ms"])  # ten requests are not enough


def test_an_event_with_two_tokens_counts_twice():
    merged = request(0, 0.1, 0.1, 5) | {"tokens": 10}
    assert summarize([merged], 0, 1, SLO(1, 1))["tokens/s"] == pytest.approx(10)


def test_knee_is_where_twice_the_users_bring_less_than_41_percent():
    levels = pd.DataFrame({"tokens/s": [10, 19, 35, 45, 46]}, index=[1, 2, 4, 8, 16])
    assert LoadTest(levels, pd.DataFrame(), []).knee == 4


def test_the_objective_breaks_with_the_first_level_that_misses_it():
    def breaks(*shares):
        return LoadTest(pd.DataFrame({"in SLO": shares}, index=[1, 4, 16]), pd.DataFrame(), []).breaks

    assert breaks(1.0, 0.9, 0.89) == 16
    assert breaks(1.0, 0.5, 0.95) == 4
    assert breaks(1.0, 1.0, 1.0) is None


def test_histogram_quantile_is_prometheus_own():
    """Prometheus' documentation: linear interpolation within the bucket; checked against observations."""
    name, values = "x", np.random.default_rng(0).gamma(2, 0.4, 4000)
    cumulative = {f"{name}_bucket:{bound}": (values <= bound).sum() for bound in SECONDS}
    after = Counter(cumulative | {f"{name}_bucket:+Inf": len(values)})
    for q in (0.5, 0.95):
        assert histogram_quantile(q, Counter(), after, name) == pytest.approx(np.quantile(values, q), rel=0.1)
    assert np.isnan(histogram_quantile(0.5, after, after, name))


@pytest.mark.slow
def test_load_test_of_a_running_service(llama, chatty):
    """Real Locust against the tiny model: more users than slots and queue, so that some are refused."""
    with listening(make_engine(llama, chatty, delay=0.005), api_key="k") as url:
        before = scrape(url, "k")
        test = loadtest.run(
            url,
            "tiny",
            levels=[1, 4, 16],
            seconds=3,
            max_tokens=8,
            objective=SLO(0.2, 0.1),
            api_key="k",
        )
        after = scrape(url, "k")
    assert list(test.levels.index) == [1, 4, 16]
    assert (test.levels["failed"] == 0).all()
    assert (test.levels["answered"] > 5).all()
    assert test.levels.loc[[1, 4], "refused"].sum() == 0
    assert test.levels.loc[16, "refused"] > 0
    assert test.levels.loc[4, "tokens/s"] > 1.5 * test.levels.loc[1, "tokens/s"]
    assert test.series["llm_requests_running"].max() == LIMITS.slots
    assert test.series["llm_requests_waiting"].max() <= LIMITS.queue
    assert len(test.steps) == 4
    answered = after["llm_request_duration_seconds_count"] - before["llm_request_duration_seconds_count"]
    assert answered >= test.levels["answered"].sum()
    labels = {f"{users} users": begin for users, begin in zip(test.levels.index, test.steps, strict=False)}
    assert len(plots.load_curve(test.levels, test.knee, {"TTFT": 200, "TPOT": 100}, breaks=1).axes) == 4
    assert len(plots.service_series(test.series, labels).axes) == 3


def test_load_test_without_a_service_says_so():
    with pytest.raises(httpx.ConnectError):
        scrape("http://127.0.0.1:9")


# --- monitoring ---


def selectors(expression: str) -> list:
    """The metrics that a PromQL expression reads; ValueError when it is no PromQL."""
    found = []

    def look(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), look)
    return found


def exported(url) -> dict[str, set[str]]:
    """Sample name → its label names, from a service that has answered and refused something."""
    httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 3})
    families = loadtest.text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_alerts_and_dashboard_read_exported_metrics_only(llama, tokenizer):
    with listening(make_engine(llama, tokenizer)) as url:
        names = exported(url) | {"up": set()}  # Prometheus itself makes `up`, and adds job and instance to all
    read = [s for e in EXPRESSIONS for s in selectors(e.replace("$__rate_interval", "1m"))]
    assert len(read) >= len(EXPRESSIONS) > 25
    for selector in read:
        assert selector.name in names, selector
        for matcher in selector.matchers.matchers:
            assert matcher.name in names[selector.name] | {"job"}, selector
    own = {name for name in names if name.startswith("llm_") and not name.endswith(("_created", "_sum", "_count"))}
    assert own <= {selector.name for selector in read}, "a metric that nobody looks at"


def test_both_sides_of_a_comparison_carry_the_same_labels():
    """`rate(a{reason="x"}) > sum(b)` parses and never fires: an aggregate has no labels to match."""
    for rule in RULES:
        comparison = promql_parser.parse(rule["expr"])
        if selectors(str(comparison.rhs)):
            both = ["sum(" in str(side) for side in (comparison.lhs, comparison.rhs)]
            assert both[0] == both[1], rule["alert"]


def test_every_alert_says_what_to_do():
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["action"]
        assert promql_parser.parse_duration(rule["for"]).total_seconds() >= 60
        assert isinstance(promql_parser.parse(rule["expr"]), promql_parser.BinaryExpr)
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_alert_thresholds_are_the_labs_objective():
    settings = load_settings("quantization", "cpu")
    thresholds = {rule["alert"]: promql_parser.parse(rule["expr"]).rhs for rule in RULES}
    assert thresholds["SlowFirstToken"].val == settings.slo_ttft_ms / 1e3
    assert thresholds["SlowTokens"].val == settings.slo_tpot_ms / 1e3


def test_grafana_reads_the_whole_dashboard():
    """Grafana's own model of a dashboard keeps every field we wrote, as we wrote it."""
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(DASHBOARD))))
    assert kept(DASHBOARD, read) == []
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered = [
        (column, row)
        for place in (panel["gridPos"] for panel in panels)
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(covered) == len(set(covered)), "panels overlap"
    assert max(column for column, _ in covered) < 24


def kept(ours, theirs, path="") -> list[str]:
    """Places where what Grafana read differs from what we wrote; its additional defaults do not count."""
    if isinstance(ours, dict):
        return [p for key in ours for p in (kept(ours[key], theirs[key], f"{path}/{key}") if key in theirs else [path])]
    if isinstance(ours, list) and len(ours) == len(theirs):
        return [p for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) for p in kept(a, b, f"{path}[{n}]")]
    return [] if ours == theirs else [path]


def test_prometheus_scrapes_the_services_default_port():
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    job = config["scrape_configs"][0]
    assert job["job_name"] == "llm"
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8080"]
    assert config["rule_files"] == ["alerts.yml"]


def test_histogram_quantile_by_hand():
    """Two observations before; then 4 up to 1, 4 more up to 3, and 2 beyond: linear within a bucket, as Prometheus."""
    before = Counter({"x_bucket:1.0": 2, "x_bucket:3.0": 2, "x_bucket:+Inf": 2})
    after = Counter({"x_bucket:1.0": 6, "x_bucket:3.0": 10, "x_bucket:+Inf": 12})
    for q, expected in ((0.2, 0.5), (0.4, 1.0), (0.5, 1.5), (0.7, 2.5), (0.95, 3.0)):
        assert histogram_quantile(q, before, after, "x") == pytest.approx(expected)


def test_only_tokens_that_came_within_the_level_count():
    """Four tokens from 0.5 s on, half a second apart: two of them come before the level ends at 1.25 s."""
    late = request(0, 0.5, 0.5, 4)
    assert summarize([late], 0, 1.25, SLO(1, 1))["tokens/s"] == pytest.approx(2 / 1.25)
    assert summarize([late], 1.25, 2.25, SLO(1, 1))["tokens/s"] == pytest.approx(2)  # it began earlier


def test_a_request_is_good_when_its_first_and_its_later_tokens_come_in_time():
    requests = [
        request(0, 0.1, 0.02, 11),
        request(0, 0.5, 0.02, 11),
        request(0, 0.1, 0.1, 11),
        request(0, 0.5, 0.1, 11),
    ]
    assert summarize(requests, 0, 10, SLO(ttft=0.3, tpot=0.05))["in SLO"] == pytest.approx(1 / 4)


def test_an_answer_of_one_token_has_no_later_ones():
    figures = summarize([request(n, 0.1, 0, 1) for n in range(3)], 0, 10, SLO(ttft=0.3, tpot=0.05))
    assert figures["TPOT P50 ms"] == 0
    assert figures["in SLO"] == 1


@pytest.mark.parametrize(("q", "enough"), [(50, 3), (95, 20), (99, 100)])
def test_no_percentile_of_too_few_requests(q, enough):
    for count in (enough - 1, enough):
        figures = summarize([request(0, 0.1, 0.1, 2)] * count, 0, 1, SLO(1, 1))
        assert np.isnan(figures[f"TTFT P{q} ms"]) == (count < enough)


def test_a_request_belongs_to_the_level_in_which_it_begins():
    requests = [request(begin, 0.1, 0.1, 2) for begin in (0, 5, 10)]
    assert [summarize(requests, a, a + 5, SLO(1, 1))["answered"] for a in (0, 5, 10)] == [1, 1, 1]
