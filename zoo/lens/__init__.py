"""Looking into models: the weight updates that contexts amount to, and figures of them."""
