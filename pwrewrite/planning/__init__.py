"""Planning under a budget: which layers to rewrite, in which form, at which ranks, and what that loses."""
