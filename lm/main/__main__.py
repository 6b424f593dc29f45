"""`python -m lm.main` is the command `lm`."""

from lm.main.verbs import main

if __name__ == "__main__":
    main()
