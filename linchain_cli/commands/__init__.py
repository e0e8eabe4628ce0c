"""One module per command. Each `run` is what Typer calls: its parameters are the command's arguments and
options.

Modules here import nothing heavy at their top level; stages are imported inside `run`, so that
`linchain --help` stays quick.
"""
