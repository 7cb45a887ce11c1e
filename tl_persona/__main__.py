"""`python -m tl_persona`: the command line without its installed script."""

import sys

from tl_persona.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
