"""The command line `tl-persona`: its arguments, and a module for what each command does.

- `arguments`: the parser of all commands.
- `inputs`: what several commands read from their arguments.
- `extract`, `show`, `caa`, `steer`, `preview`, `export`, `verify`, `merge`, `report`: the commands.
- `main`: the entry, and its exit codes.

A command is imported when it runs, so that `--help` loads no torch. Declined: whatever a recipe can do.
"""
