"""The tasks by name. A new task is one file here, one line below and one file in conf/task."""

from zoo.tasks.base import Batch, Task
from zoo.tasks.noise import Noise
from zoo.tasks.regression import Regression
from zoo.tasks.text.language import Text
from zoo.tasks.text.prompts import Prompts

TASKS: dict[str, type[Task]] = {
    "regression": Regression,
    "text": Text,
    "prompts": Prompts,
    "noise": Noise,
}

__all__ = ["TASKS", "Batch", "Task"]
