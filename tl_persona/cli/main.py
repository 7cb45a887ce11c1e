"""The `tl-persona` command: nothing heavy is imported before one of its subcommands runs.

Exit codes: 0 done; 1 something failed while running; 2 bad arguments or input.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from tl_persona.cli.arguments import build_parser
from tl_persona.errors import InputError, ModelError, TLPersonaError

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: The arguments without the program's name; None takes the process's own.
    """
    arguments = build_parser().parse_args(argv)
    if not sys.stderr.isatty():
        # Other libraries' bars are for terminals; this is read when tqdm is imported, which importing torch does.
        os.environ.setdefault("TQDM_DISABLE", "1")
    command = import_module(f"tl_persona.cli.{arguments.command}")
    try:
        code: int = command.run(arguments)
        return code
    except (InputError, ModelError) as error:
        print(f"tl-persona: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except TLPersonaError as error:
        print(f"tl-persona: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("tl-persona: interrupted; what was saved is complete, run again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
