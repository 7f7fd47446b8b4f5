"""`make ui`: Dagster's UI on the lab, with the history that the demo left."""

import argparse
import subprocess
import sys
from collections.abc import Sequence

from lab import lab as labs
from lab.demo import ROOT, a_lab, end_on_signals, environment, prepare_home


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dagster dev` in the foreground, on the running lab or one of its own."""
    parser = argparse.ArgumentParser(prog="python -m lab.ui", description=__doc__)
    parser.add_argument("--lab", default="lab", help="name of the lab to use or start")
    parser.add_argument("--engine", choices=labs.ENGINES, default="simulator")
    parser.add_argument("--port", type=int, default=3000)
    options = parser.parse_args(argv)
    end_on_signals()
    try:
        with a_lab(options.lab, options.engine) as lab:
            prepare_home()
            print(f"ui: Dagster comes up at http://127.0.0.1:{options.port} (Ctrl-C ends it)")
            process = subprocess.Popen(
                [
                    str(ROOT / ".venv/bin/dagster"),
                    *("dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(options.port)),
                ],
                cwd=ROOT,
                env=environment(lab, labs.CLUSTERS[lab.engine]),
            )
            try:
                return process.wait()
            finally:
                process.terminate()
                process.wait(60)
    except labs.LabError as error:
        print(f"ui: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
