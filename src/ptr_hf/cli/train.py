"""The command `ptr-train`: inspect demonstrations, then fine-tune a policy on them.

Refuses what cannot be before torch and LeRobot are imported, which takes seconds.
"""

import sys

from ptr_hf.cli import interrupts
from ptr_hf.cli.first_look import first_look
from ptr_hf.cli.help_groups import HELP_FILE
from ptr_hf.cli.refusals import refusals

PROGRAM = "ptr-train"


def main() -> None:
    """Run the command; exit code 2 says that something was refused, 130 that it was interrupted."""
    interrupts.end_quietly(PROGRAM, resumable=True)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP_FILE.read_text(), end="")
        return
    with refusals(PROGRAM):
        first_look(sys.argv[1:])
    from ptr_hf.cli import train_run

    train_run.main(sys.argv[1:])


if __name__ == "__main__":
    main()
