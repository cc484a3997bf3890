"""Analysis of trained models: what a context does to their weights."""
