"""`python -m linchain_cli` is `linchain`."""

from linchain_cli.cli import main

main()
