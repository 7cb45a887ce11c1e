"""What the subcommands of `tl-persona` do, one module each; `cli` has their arguments.

They are imported when they run, so that `--help` loads no torch.
"""
