"""`python -m seqmix` is the command `seqmix`."""

from seqmix.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
