"""Show where a run stands, live or dead, from its workspace alone.

    python pipelines/show_run.py WORKSPACE [--follow] [--json]

WORKSPACE is the run's folder or URI. Reads only, so it may be used beside a run and by anybody who can read the folder.
"""

import argparse
import json
import sys
import time

from orchestrator.report_reading import without_nan
from orchestrator.run_state import read_state, render_state
from orchestrator.stores import open_named, unreadable
from shearing.errors import UserError

CLEAR = "\033[H\033[2J"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line to options. Exits with status 2 for a wrong one."""
    parser = argparse.ArgumentParser(description="Where a run stands, from its workspace alone.")
    parser.add_argument("workspace", metavar="WORKSPACE", help="the run's folder or URI")
    parser.add_argument("--follow", action="store_true", help="show it again until every stage is finished")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="with --follow; default 5")
    parser.add_argument("--json", action="store_true", help="print JSON, one line each time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Show once, or until the run is done. Returns the exit status: 2 where there is no run."""
    options = parse(arguments)
    try:
        workspace = open_named("WORKSPACE", options.workspace)
        if not options.follow:  # who looks once wants to know now
            workspace = workspace.hasty()
        while True:
            state = read_state(workspace, time.time())
            if options.json:
                print(json.dumps(without_nan(state)), flush=True)
            else:
                print((CLEAR if options.follow and sys.stdout.isatty() else "") + render_state(state), flush=True)
            if not options.follow or state["finished"]:
                return 0
            time.sleep(options.every)
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(unreadable("WORKSPACE", options.workspace, error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
