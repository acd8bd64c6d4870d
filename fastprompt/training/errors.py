"""The one error that user input raises."""


class InputError(ValueError):
    """An argument that cannot be used: names it, says what came and what is expected.

    ``argument`` is the field of the configuration (``label_column``); the command line shows it as the option
    (``--label-column``).
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument = argument
        self.message = message
