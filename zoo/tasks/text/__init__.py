"""Tasks on text: sources, tokens, and what is asked about them."""
