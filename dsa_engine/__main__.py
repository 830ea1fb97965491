"""`python -m dsa_engine` is the command `dsa-engine`."""

import sys

from dsa_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
