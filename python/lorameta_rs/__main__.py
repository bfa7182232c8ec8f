"""The program: `lorameta-rs`, or `python -m lorameta_rs`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it alike before all of it is imported, and after."""
    try:
        from lorameta_rs.cli import main

        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
