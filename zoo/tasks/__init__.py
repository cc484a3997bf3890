"""The tasks by name. A new task is one file here, one line below and one file in conf/task."""

from zoo.tasks.base import Batch, Task
from zoo.tasks.markov import Markov
from zoo.tasks.modules import Modules
from zoo.tasks.noise import Noise
from zoo.tasks.recall import Recall
from zoo.tasks.regression import Regression
from zoo.tasks.text.language import Text
from zoo.tasks.text.prompts import Prompts

TASKS: dict[str, type[Task]] = {
    "regression": Regression,
    "text": Text,
    "prompts": Prompts,
    "noise": Noise,
    "modules": Modules,
    "recall": Recall,
    "markov": Markov,
}

__all__ = ["TASKS", "Batch", "Task"]
