"""``python -m pi_convert``."""

from pi_convert.cli import main

if __name__ == "__main__":
    main()
