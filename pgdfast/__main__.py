"""`python -m pgdfast`: the same as the `pgdfast` command, which lives beside the library in `pgdfast_experiments`."""

import sys

if __name__ == "__main__":
    from pgdfast_experiments.cli import main

    sys.exit(main())
