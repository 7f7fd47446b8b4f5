"""Stage: which commit is it?"""

from dataclasses import dataclass

import dagster as dg
from pydantic import Field

from assets.gpu_nodes import gpu_nodes
from assets.partitions import MODELS
from assets.resources import Cluster, Reports
from assets.stage import stage
from k8s.jobs import run_job
from k8s.manifests import resolve_job

DEADLINE_S = 360.0  # the Job's own is 300 s


class RevisionConfig(dg.Config):
    """What to promote instead of what the catalog names."""

    revision: str | None = Field(
        default=None, description="Branch, tag or commit; by default the catalog's."
    )


@dataclass(frozen=True)
class Revision:
    """A revision as it was asked for, and the 40-hex commit that it is now."""

    repo: str
    asked: str
    commit: str


# GPUs are counted first: what no node can serve needn't be fetched.
@dg.asset(partitions_def=MODELS, group_name="promotion", kinds={"huggingface"}, deps=[gpu_nodes])
def model_revision(
    context: dg.AssetExecutionContext, config: RevisionConfig, cluster: Cluster, reports: Reports
) -> dg.MaterializeResult[Revision]:
    """Ask the Hub, once, which commit the branch or tag is. All later stages use the commit."""
    with stage(context, cluster, reports) as promotion:
        model = promotion.model
        asked = config.revision or model.revision
        job = resolve_job(model, promotion.cluster, asked, promotion.id)
        done = run_job(promotion.client, job, deadline_s=DEADLINE_S, on_event=promotion.on_event)
        revision = Revision(model.repo, asked, str(done.result["commit"]))
        promotion.decided_by = f"{asked} is {revision.commit[:12]}"
        return dg.MaterializeResult(
            value=revision,
            metadata={"repo": model.repo, "asked": asked, "commit": revision.commit},
        )
