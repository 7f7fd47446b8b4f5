"""Stage: which commit is it?"""

from dataclasses import dataclass, field

import dagster as dg
from pydantic import Field

from assets.partitions import MODELS
from assets.promotion import Promotion
from assets.resources import Cluster, Reports
from assets.stage import stage
from catalog.model import Adapter
from k8s.jobs import run_job
from k8s.manifests import resolve_job

DEADLINE_S = 960.0  # the Job's own is 900 s: a node may have to come first


class RevisionConfig(dg.Config):
    """What to promote instead of what the catalog names."""

    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Branch, tag or commit; by default the catalog's.",
    )


@dataclass(frozen=True)
class Revision:
    """A revision as it was asked for, and the 40-hex commit that it is now.

    `adapters`: the commit of each LoRA adapter, by name; their revisions are the catalog's.
    """

    repo: str
    asked: str
    commit: str
    adapters: dict[str, str] = field(default_factory=dict)


@dg.asset(partitions_def=MODELS, group_name="promotion", kinds={"huggingface"})
def model_revision(
    context: dg.AssetExecutionContext,
    config: RevisionConfig,
    cluster: Cluster,
    reports: Reports,
    gpu_nodes: str,  # noqa: ARG001  # its value must be there: what no node can serve isn't fetched
) -> dg.MaterializeResult[Revision]:
    """Ask the Hub, once, which commit the branch or tag is. All later stages use the commit.

    So for the model's LoRA adapters.
    """
    with stage(context, cluster, reports) as promotion:
        model = promotion.model
        asked = config.revision or model.revision
        revision = Revision(
            model.repo,
            asked,
            resolve(promotion, asked),
            {
                adapter.name: resolve(promotion, adapter.revision, adapter)
                for adapter in model.adapters
            },
        )
        told = [f"{asked} is {revision.commit[:12]}"]
        told += [f"{name}: {commit[:12]}" for name, commit in revision.adapters.items()]
        promotion.decided_by = ", ".join(told)
        return dg.MaterializeResult(
            value=revision,
            metadata={
                "repo": model.repo,
                "asked": asked,
                "commit": revision.commit,
                "adapters": dg.MetadataValue.json(revision.adapters),
            },
        )


def resolve(promotion: Promotion, revision: str, adapter: Adapter | None = None) -> str:
    """The commit of a revision of the model, or of its adapter, by a Job in the cluster.

    Raises JobFailed, WaitTimeout.
    """
    job = resolve_job(promotion.model, promotion.cluster, revision, promotion.id, adapter=adapter)
    done = run_job(promotion.client, job, deadline_s=DEADLINE_S, on_event=promotion.on_event)
    return str(done.result["commit"])
