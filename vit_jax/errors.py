"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend, told in one line.

    The message names the offending value, the rule it breaks and the way out. The command line
    prints it after ``error:`` and exits with code 2; nothing else in the package exits.
    """
