"""The exercises of the notebooks: each checks an answer, says what is wrong with it, gives points.

``check = checker("02_local")`` is what a notebook calls: ``check(1, my_answer)``. The exercises of
a notebook stand in ``nNN_NAME.py`` as the dict ``EXERCISES``, number to exercise.
"""

import importlib
import json
import os
import pkgutil
from pathlib import Path

from refattn.exercises.mark import Mark

MARKS = "REFATTN_MARKS"  # where set, the file that every mark is added to as a line of JSON

__all__ = ["Mark", "checker", "exercises", "notebooks"]


def notebooks():
    """Names of the notebooks that have exercises, in order."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name[1:] for module in found if module.name[1:3].isdigit())


def exercises(notebook):
    """{number: exercise} of a notebook such as "02_local"."""
    if notebook not in notebooks():
        raise ValueError(f"no exercises for {notebook!r}, there are {', '.join(notebooks())}")
    return importlib.import_module(f"refattn.exercises.n{notebook}").EXERCISES


def checker(notebook):
    """The function check(number, answer) of a notebook.

    Examples
    --------
    >>> check = checker("02_local")
    >>> check(1, lambda n, left, right: n * (left + right + 1)).passed
    False
    """
    found = exercises(notebook)

    def check(number, answer):
        """What is right or wrong with an answer to an exercise, and its points."""
        if number not in found:
            raise ValueError(f"{notebook} has exercises {', '.join(map(str, found))}, no {number}")
        mark = found[number].check(answer)
        if os.environ.get(MARKS):
            line = {"notebook": notebook, "exercise": number, **mark.as_dict()}
            with open(os.environ[MARKS], "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return mark

    return check
