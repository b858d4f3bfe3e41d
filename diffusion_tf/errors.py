"""The one exception that means "what you gave me is wrong"."""


class InputError(ValueError):
    """A flag, file or record that the user gave is wrong.

    The message is one line that names it and says what to do; the programs print it without a traceback.
    """
