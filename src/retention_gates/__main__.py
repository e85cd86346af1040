"""Lets `python -m retention_gates` be the command `retention-gates`."""

import sys

from retention_gates.cli import main

if __name__ == "__main__":
    sys.exit(main())
