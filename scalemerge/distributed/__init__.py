"""What runs over many ranks have in common: who takes part, and watching that all of them live."""
