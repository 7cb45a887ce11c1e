"""Writes docs/reference/command-line.md from the parser itself: `python docs/site/command_line.py`.

A test compares the two. Not `--help` as it is printed, since its line breaks differ between Python versions.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tl_persona.cli.arguments import build_parser

PAGE = Path(__file__).resolve().parents[1] / "reference" / "command-line.md"

BEGINNING = """# Command line

`tl-persona COMMAND --help` shows the same. Options that take several values take them after one flag:
`--variants templated biography`. An option may be written `--layers=-1` where its value begins with a minus sign.

Exit codes: 0 done; 1 something failed while running (with `--skip-failed`, some persona; for `show`, a checksum); 2 bad
arguments or input; 130 interrupted. Results go to standard output, progress and errors to standard error.

<!-- Written by docs/site/command_line.py: change the parser in tl_persona/cli/arguments.py, then run it again. -->
"""


def page() -> str:
    """The whole page."""
    return "\n".join([BEGINNING, *(_section(name, parser) for name, parser in _commands(build_parser()))])


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its full name; a command that only groups others gives those."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for each in action.choices.values():
            yield from _commands(each)
    if not below:
        yield parser.prog, parser


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    lines = [
        f"## {name.removeprefix('tl-persona ')}",
        "",
        f"`{_usage(name, parser)}`",
        "",
        parser.description or "",
        "",
    ]
    tables: dict[str, list[argparse.Action]] = {}
    for group in parser._action_groups:
        title = "arguments" if group.title in ("positional arguments", "options") else group.title or ""
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        tables.setdefault(title, []).extend(actions)
    for title, actions in tables.items():
        if actions:
            rows = [f"| {_spelled(action)} | {_meaning(action, parser)} |" for action in actions]
            lines += [f"| {title} | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    needed = [[action] for action in parser._actions if action.required and action.option_strings]
    needed += [list(group._group_actions) for group in parser._mutually_exclusive_groups if group.required]
    flags = [
        " or ".join(f"{action.option_strings[-1]} {_values(action)}".rstrip() for action in either) for either in needed
    ]
    places = [_values(action) for action in parser._actions if not action.option_strings]
    return " ".join([name, *places, *flags, "[options]"])


def _values(action: argparse.Action) -> str:
    """What follows the flag, in capitals."""
    if action.nargs == 0:
        return ""
    metavar = action.metavar or action.dest.upper()
    metavar = metavar if isinstance(metavar, str) else " ".join(metavar)
    return {"+": f"{metavar} ...", "*": f"[{metavar} ...]", "?": f"[{metavar}]"}.get(str(action.nargs), metavar)


def _spelled(action: argparse.Action) -> str:
    flags = ", ".join(action.option_strings)
    values = "" if action.choices else _values(action)
    if action.choices:
        values = "\\|".join(map(str, action.choices))
    return f"`{flags} {values}`".replace("` ", "`").replace(" `", "`")


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    said = [action.help] if action.help else []
    if action.required and action.option_strings:
        said.append("required")
    for group in parser._mutually_exclusive_groups:
        if action in group._group_actions:
            others = " or ".join(
                f"`{other.option_strings[-1]}`" for other in group._group_actions if other is not action
            )
            said.append(f"either this or {others}{' is required' if group.required else ''}")
    default = action.default
    if (
        action.nargs != 0
        and default is not None
        and default is not argparse.SUPPRESS
        and "default" not in "".join(said)
    ):
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        said.append(f"default: `{shown}`")
    return "; ".join(said).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
