"""The network and the language of ΔW; knows no task, no Lightning, no family."""
