"""`python -m linchain_cli` is `linchain`."""

from linchain_cli.cli import main

if __name__ == "__main__":
    main()
