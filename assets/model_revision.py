"""Stage: which commit is it?"""

from dataclasses import dataclass, field

import dagster as dg
from pydantic import Field, TypeAdapter, ValidationError

from assets.partitions import MODELS
from assets.promotion import Promotion, Refused
from assets.resources import Cluster, Reports
from assets.stage import stage
from catalog import ModelSpec, spec
from catalog.mistakes import mistakes
from catalog.model import Adapter
from k8s.jobs import run_job
from k8s.manifests import resolve_job

DEADLINE_S = 960.0  # the Job's own is 900 s: a node may have to come first


class RevisionConfig(dg.Config):
    """What to promote instead of what the catalog names."""

    revision: str | None = Field(
        default=None,
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
        asked = model.revision if config.revision is None else checked(config.revision)
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


def checked(revision: str) -> str:
    """The revision of the run's config, by the catalog's rule. Raises Refused."""
    try:
        return str(TypeAdapter(spec.Revision).validate_python(revision))
    except ValidationError as error:
        [(_, what)] = mistakes(error, ModelSpec)
        raise Refused(f"ops: model_revision: config: revision: {what}") from None


def resolve(promotion: Promotion, revision: str, adapter: Adapter | None = None) -> str:
    """The commit of a revision of the model, or of its adapter, by a Job in the cluster.

    Raises JobFailed, WaitTimeout.
    """
    job = resolve_job(promotion.model, promotion.cluster, revision, promotion.id, adapter=adapter)
    done = run_job(promotion.client, job, deadline_s=DEADLINE_S, on_event=promotion.on_event)
    return str(done.result["commit"])
