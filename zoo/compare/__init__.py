"""Trained runs side by side, from what their folders say."""
