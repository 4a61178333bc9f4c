"""`python -m lorikit` is the command `lorikit`."""

from lorikit.cli import main

if __name__ == "__main__":
    main()
