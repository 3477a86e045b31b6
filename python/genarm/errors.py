"""The package's own exceptions."""


class GenarmError(ValueError):
    """A mistake of the user's that one line explains; the command line prints that line and exits with status 2."""


class PromptError(GenarmError):
    """What is wrong with one prompt of a call: `index` counts from 0, `problem` says it in words."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"prompt {index}: {problem}")
        self.index = index
        self.problem = problem
