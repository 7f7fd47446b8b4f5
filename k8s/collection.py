"""Which weights on the volume are in use, and the Lease between a collection and the fetches.

A fetch shows what it wants before it starts (the Lease of those weights), and waits while a
collection holds the Lease below. A collection takes that Lease first and then looks what is in
use. So whichever of the two comes first, the other one knows.
"""

import json
import re
from collections.abc import Callable

from k8s import jobs, records
from k8s.client import Client, Obj
from k8s.lease import Lease
from k8s.manifests.jobs import COLLECT, COLLECT_SECONDS
from k8s.manifests.release import PROMOTION

LEASE = "weights-collection"
TTL_S = 30.0
COMPONENT = "app.kubernetes.io/component"

_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
_SAID = {"current": "live as {}", "previous": "rollback of {}", "next": "announced for {}"}


def lock(client: Client, holder: str, say: Callable[[str], None], *, wait_s: float) -> Lease:
    """The Lease of a collection, with the Jobs of killed ones ended. Raises LeaseHeld."""
    lease = Lease.acquire(client, LEASE, holder, ttl_s=TTL_S, wait_s=wait_s, waiting=say)
    try:
        for name in jobs.end(client, {COMPONENT: COLLECT}):
            say(f"Job {name} of an earlier collection: deleted")
    except BaseException:
        lease.release()
        raise
    return lease


def await_none(client: Client, holder: str, say: Callable[[str], None]) -> None:
    """Wait until no collection runs. Call with the Lease of the weights that are wanted."""
    lock(client, holder, say, wait_s=COLLECT_SECONDS + TTL_S).release()


def in_use(client: Client) -> dict[str, str]:
    """The commits that must stay -> for what, in a few words. Call with the Lease held.

    Whatever names a commit counts: Deployments (both slots of a model, and those of others), Pods,
    promotions under way, and the records of all models, also of those that the catalog no longer
    has. Raises KubernetesError if anything of it can't be read.
    """
    found: dict[str, list[str]] = {}

    def note(what: object, why: str) -> None:
        for commit in _COMMIT.findall(json.dumps(what)):
            if why not in found.setdefault(commit, []):
                found[commit].append(why)

    # In the order in which a promotion goes on: what leaves one place is in the next one by then.
    leases = client.list("Lease")
    holders = {(lease.get("spec") or {}).get("holderIdentity") or "" for lease in leases} - {""}
    for lease in leases:
        if holder := (lease.get("spec") or {}).get("holderIdentity"):
            note(lease["metadata"]["name"], f"fetched by {holder}")
    running = {job["metadata"]["uid"] for job in jobs.running(client, {COMPONENT: "weights"})}
    for job in client.list("Job", labels={COMPONENT: "weights"}):
        run = job["metadata"]["labels"].get(PROMOTION)
        if run in holders or job["metadata"]["uid"] in running:
            note(job["spec"]["template"]["spec"], f"promotion {run} is under way")
    for deployment in client.list("Deployment"):
        meta = deployment["metadata"]
        said = [meta.get("annotations"), deployment["spec"]["template"]]
        note(said, f"Deployment {meta['name']}")
    for pod in client.list("Pod"):
        if not _ended(pod):
            note(
                [pod["metadata"].get("annotations"), pod["spec"]], f"Pod {pod['metadata']['name']}"
            )
    for key, record in records.everything(client):
        for _, commit in record.weights():
            note(commit, _SAID[key].format(record.spec.name))
    # The shortest says the most: records before Deployments before Pods.
    return {commit: ", ".join(reversed(why)) for commit, why in found.items()}


def _ended(pod: Obj) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
