"""`python -m pillsnap` is the command line."""
import sys

from pillsnap.cli import main

sys.exit(main())
