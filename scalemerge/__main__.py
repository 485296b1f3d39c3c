"""`python -m scalemerge` and `accelerate launch -m scalemerge` are the command line."""

from scalemerge.cli import main

if __name__ == "__main__":
    main()
