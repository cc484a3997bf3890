"""The lens: reads, compares, stores and reuses the weight update that a context amounts to in any model of the zoo."""
