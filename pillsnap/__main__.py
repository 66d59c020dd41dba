"""`python -m pillsnap` is the command line."""
import sys

from pillsnap.cli import main

if __name__ == "__main__":  # processes that render the sample import this file again
    sys.exit(main())
