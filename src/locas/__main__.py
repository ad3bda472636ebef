"""`python -m locas` is the command line."""

import sys

from locas.cli import main

if __name__ == "__main__":
    sys.exit(main())
