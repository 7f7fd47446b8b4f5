"""What a run didn't get to that ended while it moved the traffic: its record, its autoscaling."""

from collections.abc import Callable

from catalog import ClusterSpec, ModelSpec, PoolError
from k8s import keda, records, slots, traffic
from k8s.client import Client
from k8s.errors import KubernetesError
from k8s.manifests.release import PROMOTION
from k8s.records import PromotionRecord


def live_promotion(client: Client, model: ModelSpec) -> str | None:
    """The promotion that brought up what users reach now."""
    live = traffic.live_slot(client, model)
    deployment = slots.deployment_of(client, model, live) if live else None
    return slots.annotations(deployment).get(PROMOTION) if deployment else None


def finish_move(
    client: Client, cluster: ClusterSpec, model: ModelSpec, say: Callable[[str], None]
) -> None:
    """Write the record that was announced, if users did move, and lower the replicas' minimum
    that was raised for the move. Hold the model's Lease. Raises KubernetesError.
    """
    announced = records.announced(client, model)
    if announced is not None:
        traffic.settle(client, model)
    promoted = live_promotion(client, model)
    if announced is not None and announced.promotion == promoted:
        records.write(client, announced)
        records.stamp(client, announced)
        say(f"promotion {promoted} ended after users had moved to it: its record is written now")
    current, _ = records.read(client, model)
    if current is not None and current.promotion == promoted:
        try:
            _lower_minimum(client, cluster, current, say)
        except (KubernetesError, PoolError) as error:  # changed by hand: their wish
            say(f"the minimum of replicas of {model.name} stays as it is: {error}")


def _lower_minimum(
    client: Client, cluster: ClusterSpec, current: PromotionRecord, say: Callable[[str], None]
) -> None:
    spec = current.spec
    release = current.release(cluster)
    scaled = client.find("ScaledObject", release.name)
    least = spec.scaling.min_replicas
    if scaled is not None and scaled["spec"].get("minReplicaCount", 0) > least:
        keda.apply_scaled_object(client, release, current.thresholds, min_replicas=least)
        say(f"ScaledObject {release.name}: minimum of replicas is {least} again")
