"""What the launcher of the Flex Template runs: `beamsight build` with the template's parameters, on Dataflow.

The launcher names a runner itself, by Beam's name; the preset of that name sets more (docs/dataflow.md).
"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    given = [flag for flag in sys.argv[1:] if not flag.startswith("--runner")]
    sys.exit(main(["build", "--runner", "dataflow", *given]))
