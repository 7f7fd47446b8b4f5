"""`python -m lab.hub --root DIR [--host H] [--port P]`: serve the repositories of a folder."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.hub.faults import Fault
from lab.hub.server import HubServer
from lab.hub.store import Hub


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted. Returns 0, or 1 with one message if the port is taken."""
    parser = argparse.ArgumentParser(prog="python -m lab.hub", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8880)
    parser.add_argument("--faults", type=Path, help="JSON list of faults to start with")
    options = parser.parse_args(argv)
    try:
        server = HubServer(Hub(options.root), options.host, options.port)
    except OSError as error:
        print(
            f"lab hub: {options.host}:{options.port} can't be served: {error.strerror}. "
            "Choose another --port, or end what listens there.",
            file=sys.stderr,
        )
        return 1
    if options.faults:
        server.faults.add(*map(Fault.parse, json.loads(options.faults.read_text())))
    print(f"lab hub: {server.url} serves {', '.join(server.hub.repos()) or 'nothing yet'}")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
