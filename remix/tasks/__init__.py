"""Where prompts come from. One file per kind of task, one row in `mixture.TASKS`.

load_tasks      the tasks of a recipe -> sets of prompts
encode          problems -> the token ids that the model reads
PromptStream    the order in which a run draws from the sets
eval_prompts    the fixed choice that evaluation uses
"""

from remix.tasks.encode import encode
from remix.tasks.mixture import TASKS, PromptStream, TaskSet, eval_prompts, load_tasks, named_apart, task_names
from remix.tasks.rows import Split

__all__ = [
    "TASKS",
    "PromptStream",
    "Split",
    "TaskSet",
    "encode",
    "eval_prompts",
    "load_tasks",
    "named_apart",
    "task_names",
]
