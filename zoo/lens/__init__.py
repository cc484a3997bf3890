"""Instruments that read, apply and plot the weight update that a context amounts to."""
