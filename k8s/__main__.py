"""Look before you leap: `python -m k8s render MODEL`, `diff MODEL`, `platform`.

render    print what a promotion would apply, without a cluster
diff      compare that with what is live, by a server-side dry run; exit 0: the same, 1: it differs
platform  print what an admin applies once: `… platform | kubectl apply --server-side -f -`
"""

import argparse
import sys

import yaml

from catalog import CatalogError, ClusterSpec, PoolError
from catalog.load import catalog
from k8s.manifests import platform
from k8s.manifests.release import Obj


class Usage(Exception):
    """A mistake of the person at the keyboard, in one line."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 (diff: something differs), 2 (a mistake, or no cluster)."""
    args = _parser().parse_args(argv)
    try:
        cluster = catalog().cluster(args.cluster)
        print(to_yaml(platform(cluster)), end="")
        return 0
    except (CatalogError, PoolError, Usage) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m k8s", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("platform")
    one.add_argument("--cluster", default="lab")
    return parser


class _Plain(yaml.SafeDumper):
    """Without anchors: kubectl reads them, people don't."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def to_yaml(objects: list[Obj]) -> str:
    """Documents as kubectl takes them."""
    return "".join(
        "---\n" + yaml.dump(obj, Dumper=_Plain, sort_keys=False, width=1000) for obj in objects
    )


if __name__ == "__main__":
    sys.exit(main())
