"""Reproductions that need no checkpoint of ours."""
