"""`python -m pgdfast`: the same as the `pgdfast` command."""

import sys

from pgdfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
