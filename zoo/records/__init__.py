"""What is kept of runs, and what a new one takes from it: weights, a budget, models that come with the package."""
