"""The command `lorikit`, and `python -m lorikit`: an interrupt while the command line is being imported ends quietly too."""

import sys


def run() -> None:
    """Import the command line and run it; exits with the documented code."""
    try:
        from lorikit.cli import main

        main()
    except KeyboardInterrupt:  # before `main` could take it
        sys.exit(130)


if __name__ == "__main__":
    run()
