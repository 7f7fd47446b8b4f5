"""Autoscaling: thresholds from the benchmark, the ScaledObject, and the proof that it works."""

import math
import time
from dataclasses import dataclass

from catalog import ClusterSpec, ModelSpec
from k8s import manifests, own_requests, pod_http, prometheus, slots
from k8s.client import Client, Obj
from k8s.errors import (
    ConditionFailed,
    HttpStatus,
    KubernetesError,
    PodUnreachable,
    WaitTimeout,
)
from k8s.manifests import Release, Slot, Thresholds, slot_name
from k8s.manifests.release import PORT, SLOTS
from k8s.manifests.scaling import IN_FLIGHT, RUNNING, WAITING, in_flight_query, selector
from k8s.wait import Progress, wait

PAUSED = "autoscaling.keda.sh/paused-replicas"
REMOVE_SECONDS = 60.0
RESUME_SECONDS = 60.0
LOOK_SECONDS = 1.0
PROOF_SECONDS = 90.0  # and PROOF_SCRAPES of Prometheus
PROOF_SCRAPES = 4
# Enough to be seen, too few to be scaled by.
OWN_REQUESTS = 2


class AutoscalingNotProven(KubernetesError):
    """KEDA would not scale this slot as intended; the message says which link is broken."""


@dataclass(frozen=True)
class TriggerProof:
    """What was seen while the proof kept `requests` in flight.

    `value`: of KEDA's query; `pods_value`: the sum over the Pods' /metrics then; `age_seconds`: of
    the oldest of the newest samples; `replicas`: ready ones then.
    """

    query: str
    requests: int
    value: float
    pods_value: float
    series: int
    age_seconds: float
    hpa: str
    replicas: int


def thresholds(
    l_star: float, lambda_star: float, cold_start_s: float, cluster: ClusterSpec, model: ModelSpec
) -> Thresholds:
    """From capacity (λ* req/s, L* requests in flight) and cold start (s) to thresholds.

    in_flight = floor(h·L*), at least 1, where h leaves room for the traffic that
    comes before a new replica helps: h = 1 - growth · lead / λ*, within 0.3 to 0.95, and lead =
    KEDA's poll + Prometheus' scrape + cold start. `growth` (req/s per s) is the catalog's.

    waiting = a tenth of that, at least 1 [reasoned]: at L* next to nothing waits, so where it
    does, running has met a limit (sequences, KV cache) that the benchmark's traffic didn't meet,
    and in_flight alone would answer too late.

    Raises ValueError for a capacity that isn't positive.
    """
    if not (l_star > 0 and lambda_star > 0 and math.isfinite(l_star * lambda_star)):
        raise ValueError(f"no thresholds follow from λ* = {lambda_star} req/s and L* = {l_star}")
    lead = cluster.keda.polling_seconds + cluster.prometheus.scrape_seconds + cold_start_s
    headroom = min(0.95, max(0.3, 1 - model.scaling.growth * lead / lambda_star))
    in_flight = max(1, math.floor(headroom * l_star))
    return Thresholds(in_flight, max(1, in_flight // 10), headroom, lead)


def candidate_min_replicas(client: Client, model: ModelSpec, cluster: ClusterSpec) -> int:
    """Replicas that the candidate needs before it takes over the present load: as many as are
    ready in the busier slot, or were when it made room (strategy recreate); at least the
    catalog's minimum, at most what the GPUs allow.
    """
    ready = 0
    for slot in SLOTS:
        deployment = slots.deployment_of(client, model, slot)
        if deployment is None:
            continue
        aside = slots.standing_aside(deployment)
        ready = max(
            ready,
            int(deployment.get("status", {}).get("readyReplicas", 0)),
            aside.serving if aside else 0,
        )
    wanted = max(model.scaling.min_replicas, ready)
    return max(1, min(wanted, manifests.max_replicas(model, cluster)))


def apply_scaled_object(
    client: Client, release: Release, thresholds: Thresholds, *, min_replicas: int
) -> Obj:
    """Apply the ScaledObject of the slot. Raises Conflict if someone else has changed it."""
    return client.apply(manifests.scaled_object(release, thresholds, min_replicas))


def foreign_scalers(client: Client, model: ModelSpec) -> list[str]:
    """Scalers of someone else on one of the model's Deployments: a sentence each.

    KEDA's webhook refuses a second scaler on a target, and two that get by fight.
    """
    targets = {slot_name(model, slot) for slot in SLOTS}
    found = []
    for scaled in client.list("ScaledObject"):
        target = scaled["spec"]["scaleTargetRef"]["name"]
        if target in targets and scaled["metadata"]["name"] != target:
            found.append(f"ScaledObject {scaled['metadata']['name']} scales {target}")
    for hpa in client.list("HorizontalPodAutoscaler"):
        target = hpa["spec"]["scaleTargetRef"]
        ours = any(o["kind"] == "ScaledObject" for o in hpa["metadata"].get("ownerReferences", []))
        if target["kind"] == "Deployment" and target["name"] in targets and not ours:
            found.append(
                f"HorizontalPodAutoscaler {hpa['metadata']['name']} scales {target['name']}"
            )
    return found


def remove(
    client: Client, model: ModelSpec, slot: Slot, *, progress: Progress = lambda _: None
) -> None:
    """Delete the slot's ScaledObject and wait until KEDA has let go of the Deployment.

    Before that KEDA would scale it up to its minimum again. When KEDA doesn't answer, its
    finalizer keeps the object: then this goes on without it and says so.
    """
    name = slot_name(model, slot)
    if client.find("ScaledObject", name) is None:
        return
    client.delete("ScaledObject", name)
    progress(f"ScaledObject {name}: deleted, waiting for KEDA to let go")
    try:
        wait(
            client,
            "ScaledObject",
            name,
            until=lambda obj: obj is None,
            deadline_s=REMOVE_SECONDS,
            state=lambda _: "still there",
        )
    except WaitTimeout:
        progress(
            f"ScaledObject {name}: KEDA has not removed its finalizer after "
            f"{REMOVE_SECONDS:.0f} s; look at the keda-operator's log"
        )


def pause(client: Client, model: ModelSpec, slot: Slot, replicas: int) -> None:
    """Freeze the slot at `replicas`, if it has a ScaledObject."""
    name = slot_name(model, slot)
    if client.find("ScaledObject", name) is not None:
        client.patch("ScaledObject", name, {"metadata": {"annotations": {PAUSED: str(replicas)}}})


def unpause(client: Client, model: ModelSpec, slot: Slot) -> bool:
    """Take the pause away, without waiting for KEDA; False if the slot has no ScaledObject."""
    name = slot_name(model, slot)
    if client.find("ScaledObject", name) is None:
        return False
    client.patch("ScaledObject", name, {"metadata": {"annotations": {PAUSED: None}}})
    return True


def resume(
    client: Client, model: ModelSpec, slot: Slot, *, progress: Progress = lambda _: None
) -> None:
    """End the pause, and wait until it has ended: Paused is not True, and there is an HPA again.

    The annotation gone proves nothing (keda#6982, #7231). Raises AutoscalingNotProven. Does
    nothing for a slot without ScaledObject.
    """
    name = slot_name(model, slot)
    if not unpause(client, model, slot):
        return
    state = ""
    deadline = time.monotonic() + RESUME_SECONDS
    while time.monotonic() < deadline:
        scaled = client.find("ScaledObject", name)
        if scaled is None:
            return
        state = _paused(scaled) or _hpa_state(client, scaled)[1]
        if not state:
            progress(f"ScaledObject {name}: resumed")
            return
        time.sleep(LOOK_SECONDS)
    raise AutoscalingNotProven(
        f"autoscaling not resumed: {state}. {name} keeps its present number of replicas; look at "
        "the keda-operator's log"
    )


def _paused(scaled: Obj) -> str:
    if slots.condition(scaled, "Paused").get("status") == "True":
        return f"ScaledObject {scaled['metadata']['name']} has Paused=True"
    return ""


def _hpa_state(client: Client, scaled: Obj) -> tuple[str, str]:
    """The HPA's name, and what is wrong with it ("": nothing)."""
    name = scaled["metadata"]["name"]
    hpa_name = scaled.get("status", {}).get("hpaName") or f"keda-hpa-{name}"
    hpa = client.find("HorizontalPodAutoscaler", hpa_name)
    if hpa is None:
        return hpa_name, f"KEDA has made no HorizontalPodAutoscaler {hpa_name}"
    target = hpa["spec"]["scaleTargetRef"]
    if (target["kind"], target["name"]) != ("Deployment", name):
        return hpa_name, f"HPA {hpa_name} scales {target['kind']} {target['name']}, not {name}"
    wanted = (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"])
    limits = (hpa["spec"].get("minReplicas"), hpa["spec"]["maxReplicas"])
    if limits != wanted:
        return hpa_name, f"HPA {hpa_name} has the limits {limits}, the ScaledObject {wanted}"
    return hpa_name, ""


def prove_trigger(
    client: Client,
    release: Release,
    *,
    deadline_s: float | None = None,
    progress: Progress = lambda _: None,
) -> TriggerProof:
    """Prove each link from the engine's metric to the HPA, and that enough Pods are ready.

    The ScaledObject is Ready, not paused and not in its fallback; its HPA has the right target and
    limits, and gets the metrics. While a few completions are kept in flight (at rest 0 = 0 proves
    nothing), KEDA's exact query returns one finite series above 0, of fresh samples, one for each
    series that the Pods themselves show (two monitors would double it), with their sum.

    Tries until `deadline_s` (default: PROOF_SECONDS and PROOF_SCRAPES scrapes), then raises
    AutoscalingNotProven with the broken link.
    """
    if deadline_s is None:
        deadline_s = PROOF_SECONDS + PROOF_SCRAPES * release.cluster.prometheus.scrape_seconds
    deadline = time.monotonic() + deadline_s
    scaled = client.find("ScaledObject", release.name)
    if scaled is None:
        raise AutoscalingNotProven(
            f"autoscaling not proven: there is no ScaledObject {release.name}"
        )
    said = ""
    with own_requests.in_flight(client, release, _bearable(scaled)) as own:
        while True:
            try:
                return _prove(client, release, own.count)
            except ConditionFailed as broken:
                why = str(broken)
            except prometheus.PrometheusError as error:
                why = str(error)
            if own.trouble:
                why += f"; the proof's own requests fail: {own.trouble}"
            if time.monotonic() > deadline:
                raise AutoscalingNotProven(
                    f"autoscaling not proven for {release.name} after {deadline_s:.0f} s: {why}"
                )
            if why != said:
                progress(f"trigger of {release.name}: {why}")
                said = why
            time.sleep(LOOK_SECONDS)


def _bearable(scaled: Obj) -> int:
    """Requests in flight at which the minimum of replicas is still enough."""
    [threshold] = [
        int(trigger["metadata"]["threshold"])
        for trigger in scaled["spec"]["triggers"]
        if trigger["name"] == IN_FLIGHT
    ]
    return min(OWN_REQUESTS, threshold * int(scaled["spec"]["minReplicaCount"]))


def _prove(client: Client, release: Release, requests: int) -> TriggerProof:
    scaled = client.find("ScaledObject", release.name)
    if scaled is None:
        raise ConditionFailed(f"there is no ScaledObject {release.name}")
    _check_scaled_object(scaled)
    replicas = _check_replicas(client, release, scaled["spec"]["minReplicaCount"])
    hpa_name, wrong = _hpa_state(client, scaled)
    if wrong:
        raise ConditionFailed(wrong)
    hpa = client.get("HorizontalPodAutoscaler", hpa_name)
    for kind in ("AbleToScale", "ScalingActive"):
        state = slots.condition(hpa, kind)
        if state.get("status") != "True":
            why = state.get("message", "no such condition yet")
            raise ConditionFailed(f"HPA {hpa_name} is not {kind}: {why}")
    # ScalingActive may be True with one of two metrics.
    metrics = hpa.get("status", {}).get("currentMetrics") or []
    got = sum("current" in (metric.get("external") or {}) for metric in metrics)
    if got < (wanted := len(scaled["spec"]["triggers"])):
        raise ConditionFailed(f"HPA {hpa_name} has got {got} of its {wanted} metrics")
    value, pods_value, series, age = _check_query(client, release)
    query = in_flight_query(release)
    return TriggerProof(query, requests, value, pods_value, series, age, hpa_name, replicas)


def _check_scaled_object(scaled: Obj) -> None:
    name = scaled["metadata"]["name"]
    if paused := _paused(scaled):
        raise ConditionFailed(paused)
    for kind, wanted in (("Ready", "True"), ("Fallback", "False")):
        state = slots.condition(scaled, kind)
        # Fallback is Unknown before KEDA's first poll.
        if state.get("status") != wanted:
            raise ConditionFailed(
                f"ScaledObject {name} has {kind}={state.get('status', 'nothing')}: "
                f"{state.get('message', 'KEDA has not looked at it yet')}"
            )


def _check_replicas(client: Client, release: Release, wanted: int) -> int:
    deployment = client.get("Deployment", release.name)
    ready = int(deployment.get("status", {}).get("readyReplicas", 0))
    if ready < wanted:
        raise ConditionFailed(f"Deployment {release.name} has {ready} of {wanted} replicas ready")
    return ready


def _check_query(client: Client, release: Release) -> tuple[float, float, int, float]:
    """Value of KEDA's query, the Pods' own sum, number of series, age of the oldest in s."""
    where = selector(release)
    before = _pods_metrics(client, release)
    answer = prometheus.query(client, release.cluster, in_flight_query(release))
    if len(answer) != 1 or not math.isfinite(answer[0]):
        raise ConditionFailed(
            f"Prometheus gives {len(answer)} series for KEDA's query {in_flight_query(release)}; "
            "it must be one. Is the Pod scraped (PodMonitor vllm-engines, its labels)?"
        )
    ages = prometheus.query(
        client, release.cluster, f"max(time() - timestamp({RUNNING}{{{where}}}))"
    )
    age = ages[0] if ages else math.inf
    oldest = 2 * release.cluster.prometheus.scrape_seconds + 5
    if age > oldest:
        raise ConditionFailed(f"the newest sample is {age:.0f} s old, more than {oldest:.0f} s")
    counted = prometheus.query(client, release.cluster, f"count({RUNNING}{{{where}}})")
    series = int(counted[0]) if counted else 0
    after = _pods_metrics(client, release)
    if series != before[0]:
        raise ConditionFailed(
            f"Prometheus has {series} series of {RUNNING}, the Pods show {before[0]}: "
            "is a second monitor scraping them, or is one Pod not scraped yet?"
        )
    value = answer[0]
    low, high = sorted((before[1], after[1]))
    # Samples are up to a scrape old; under a larger load the sum moves meanwhile.
    slack = 0.2 * high
    if not (value > 0 and low - slack <= value <= high + slack):
        raise ConditionFailed(
            f"KEDA's query gives {value:g}, the Pods' own /metrics {low:g} to {high:g}"
        )
    return value, min(low, high, key=lambda pods: abs(pods - value)), series, age


def _pods_metrics(client: Client, release: Release) -> tuple[int, float]:
    """Series of running requests, and requests in flight, in the Pods' own /metrics."""
    series, total = 0, 0.0
    for pod in slots.pods(client, release.model, release.slot):
        name = pod["metadata"]["name"]
        try:
            text = pod_http.get_text(client, name, PORT, "/metrics", timeout_s=10)
        except (PodUnreachable, HttpStatus) as error:
            raise ConditionFailed(f"/metrics of Pod {name}: {error}") from None
        running = prometheus.samples(text, RUNNING)
        if not running:
            raise ConditionFailed(f"/metrics of Pod {name} has no {RUNNING}: is it a vLLM?")
        series += len(running)
        total += sum(running) + sum(prometheus.samples(text, WAITING))
    return series, total
