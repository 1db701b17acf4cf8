"""Random networks of all that real models do to a rewriting tool, and a sweep over thousands of them, by hand."""
