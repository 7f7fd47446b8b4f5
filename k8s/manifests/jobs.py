"""The Jobs of a promotion: resolve a revision, download weights, benchmark a candidate."""

from catalog import ClusterSpec, ModelSpec
from k8s.manifests.release import Obj, Release


def resolve_job(
    model: ModelSpec, cluster: ClusterSpec, revision: str, promotion: str, attempt: int = 0
) -> Obj:
    """Asks the Hub which commit the revision is. `attempt`: 1, 2, … for a retry."""
    raise NotImplementedError


def download_job(
    model: ModelSpec, cluster: ClusterSpec, commit: str, promotion: str, attempt: int = 0
) -> Obj:
    """Fetches, verifies and publishes the weights of a commit on the claim."""
    raise NotImplementedError


def benchmark_job(release: Release, profile_json: str, *, deadline_s: int) -> tuple[Obj, Obj]:
    """The ConfigMap with the load profile, and the Job that runs it within `deadline_s`."""
    raise NotImplementedError
