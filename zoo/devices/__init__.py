"""Several processes beside the models: what is cut over them, and what one says when another is gone."""
