"""`python -m lorameta_rs`."""

from lorameta_rs.cli import main

if __name__ == "__main__":
    main()
